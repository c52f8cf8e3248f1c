"""localize: train and evaluate localizers, which predict one box per class (DRL appendix C)."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reslearn.cli.detect import DROP, BadBoxPolicy
from reslearn.cli.options import (
    Batch,
    Device,
    Epochs,
    Json,
    JsonFile,
    Out,
    Rate,
    Recipe,
    Resume,
    Seed,
    Seeds,
    Set,
    Size,
    check_folder,
    refuse_ranks,
)
from reslearn.cli.training import train_command

app = typer.Typer(help="Train and evaluate localizers: one box per class.", no_args_is_help=True)


@app.callback()
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand != "train":
        refuse_ranks(f"localize {context.invoked_subcommand}")


@app.command(no_args_is_help=True)
def crops(
    data: Annotated[Path, typer.Argument(help="VOC or COCO set with any number of objects per image.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder to write.")],
    per_class: Annotated[int, typer.Option("--per-class", min=1, help="Training crops per class.")] = 600,
    tested: Annotated[int, typer.Option("--tested", min=1, help="Maximum number of test crops per class, one per object.")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.")] = 0,
    bad_boxes: Annotated[BadBoxPolicy, typer.Option("--bad-boxes", help="Drop objects with invalid boxes, or fail.")] = "fail",
) -> None:
    """Crop a detection set to one object per image.

    Writes square crops with one whole object each, as a data set for localize train and, by its class folders, for train.

    \b
    Examples:
      reslearn localize crops bccd -o cells --bad-boxes drop
    """
    from reslearn.data.boxes.box_set import bad_boxes_left_out_by
    from reslearn.localize.windows import cut_out

    with bad_boxes_left_out_by(DROP):
        counts = cut_out(data, out, per_class=per_class, tested=tested, seed=seed, bad=bad_boxes)
    for split, per_split in counts.items():
        typer.echo(f"{split:<6}" + ", ".join(f"{name} {n:,}" for name, n in per_split.items()))
    typer.echo(f"wrote {out}")


@app.command(no_args_is_help=True)
def train(
    data: Annotated[Path | None, typer.Argument(help="VOC or COCO set with objects of one class per image.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Network [default: that of --init, else resnet18].")] = None,
    recipe: Recipe = None,
    epochs: Epochs = None,
    size: Size = None,
    batch: Batch = None,
    lr: Rate = None,
    settings: Set = None,
    seed: Seed = None,
    seeds: Seeds = None,
    init: Annotated[
        Path | None, typer.Option("--init", help="Model or run to start from (recipe localize-regions: a localizer).")
    ] = None,
    out: Out = None,
    resume: Resume = None,
    device: Device = "auto",
) -> None:
    """Train a localizer, or resume an interrupted run.

    Recipe localize-regions trains the second stage of a localizer.

    \b
    Examples:
      reslearn localize train cells --init runs/cells --out runs/where
      reslearn localize train cells --model resnet18 --set data.size=96 --set schedule.epochs=30 --set batch.size=64
      reslearn localize train cells --recipe localize-regions --init runs/where --out runs/refined
      reslearn localize train --resume runs/where
    """
    options = {"model": model, "recipe": recipe, "epochs": epochs, "size": size, "batch": batch, "lr": lr}
    options |= {"settings": settings or (), "seed": seed, "init": init, "out": out}
    train_command("localize", data, resume, seeds, device, **options)


@app.command("eval", no_args_is_help=True)
def evaluate(
    model: Annotated[Path, typer.Argument(help="Run folder or model file of a localizer.")],
    data: Annotated[Path, typer.Argument(help="VOC or COCO set with objects of one class per image.")],
    classifier: Annotated[
        Path | None, typer.Option("--classifier", help="Model to predict the classes [default: the localizer].")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Split to evaluate [default: test, else val].")] = None,
    scales: Annotated[list[int] | None, typer.Option("--scale", help="Shorter side for dense evaluation, px. Repeatable.")] = None,
    out: JsonFile = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Measure localization errors.

    Errors are measured with the true class given and with predicted classes, on one crop and on whole images.

    \b
    Examples:
      reslearn localize eval runs/where cells
      reslearn localize eval runs/where cells --classifier runs/cells --scale 112 --scale 128 --out where.json
    """
    from reslearn.files import write_text
    from reslearn.localize.evaluate import evaluate as measure
    from reslearn.training.display import Display

    check_folder(out)
    with Display(stderr=True) as display:
        options = {"split": split, "scales": scales or (), "classifier": classifier, "device": device}
        result = measure(model, data, progress=display.progress, **options)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _print(result)
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")


TITLES = {"true_class": "true class given", "top1": "predicted class", "top5": "5 predicted", "classification": "class alone"}


def _print(result: dict[str, Any]) -> None:
    views = [view for view in ("1-crop", "dense", "refined") if view in result]
    heads = {"1-crop": "1 crop", "dense": "dense " + " ".join(map(str, result["scales"])), "refined": "R-CNN"}
    typer.echo(f"{result['data']}, {result['split']}: {result['n']:,} images; classes from {result['classes_from']}")
    typer.echo(f"{'error, % (95% interval)':<24}" + "".join(f"{heads[view]:>26}" for view in views))
    for key, title in TITLES.items():
        if key in result["1-crop"]:
            numbers = [result[view][key] for view in views]
            cells = [f"{n['error']:.2f} ({n['interval'][0]:.2f} to {n['interval'][1]:.2f})" for n in numbers]
            typer.echo(f"  {title:<22}" + "".join(f"{cell:>26}" for cell in cells))
    for rows in zip(*(result[view]["per_class"] for view in views), strict=True):
        if rows[0]["n"]:
            cells = "".join(f"{row['error']:>26.2f}" for row in rows)
            typer.echo(f"  {rows[0]['class'][:15]:<15} n={rows[0]['n']:<4}{cells}")
