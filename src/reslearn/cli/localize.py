"""localize: where the object of an image is, by boxes for each class on a classification network."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reslearn.cli.detect import DROP, BadBoxPolicy
from reslearn.cli.options import Device, Json, Out, Recipe, Resume, Seed, Seeds, Set, one_process, several_ranks
from reslearn.cli.training import train_command
from reslearn.errors import UserError

app = typer.Typer(help="Where an image's object is: boxes for each class on a classification network.", no_args_is_help=True)


@app.callback()
def _group(context: typer.Context) -> None:
    """Localization, the paper's appendix C."""
    if several_ranks() and context.invoked_subcommand != "train":
        raise one_process(f"localize {context.invoked_subcommand}")


@app.command(no_args_is_help=True)
def crops(
    data: Annotated[Path, typer.Argument(help="A VOC folder or COCO set, of many objects an image.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    per_class: Annotated[int, typer.Option("--per-class", min=1, help="Windows of each class for training.")] = 600,
    tested: Annotated[int, typer.Option("--tested", min=1, help="At most so many of each class to test on, one an object.")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    bad_boxes: Annotated[
        BadBoxPolicy, typer.Option("--bad-boxes", help="Invalid boxes: stop, or leave them out.")
    ] = BadBoxPolicy.fail,
) -> None:
    """Cut images of one object each out of annotated ones: a set for localize, and for train as well (CLASS folders).

    \b
    Examples:
      reslearn localize crops bccd -o cells --bad-boxes drop
    """
    from reslearn.data.boxes.box_set import bad_boxes_left_out_by
    from reslearn.localize.windows import cut_out

    with bad_boxes_left_out_by(DROP):
        counts = cut_out(data, out, per_class=per_class, tested=tested, seed=seed, bad=bad_boxes.value)
    for split, of in counts.items():
        typer.echo(f"{split:<6}" + ", ".join(f"{name} {n:,}" for name, n in of.items()))
    typer.echo(f"wrote {out}")


@app.command(no_args_is_help=True)
def train(
    data: Annotated[Path | None, typer.Argument(help="VOC or COCO; objects of one class in each image.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A network, such as resnet18.")] = None,
    recipe: Recipe = None,
    settings: Set = None,
    seed: Seed = None,
    seeds: Seeds = None,
    init: Annotated[
        Path | None, typer.Option("--init", help="Classification model or run to start from; for localize-regions, a localizer.")
    ] = None,
    out: Out = None,
    resume: Resume = None,
    device: Device = "auto",
) -> None:
    """Train a network to find the object of an image, or its second stage; or resume an interrupted run.

    \b
    Examples:
      reslearn localize train cells --init runs/cells --out runs/where
      reslearn localize train cells --model resnet18 --set data.size=96 --set schedule.epochs=30 --set batch.size=64
      reslearn localize train cells --recipe localize-regions --init runs/where --out runs/refined
      reslearn localize train --resume runs/where
    """
    options = {"model": model, "recipe": recipe, "settings": settings or (), "seed": seed, "init": init, "out": out}
    train_command("localize", data, resume, seeds, device, **options)


@app.command("eval", no_args_is_help=True)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder or model file of localize train.")],
    data: Annotated[Path, typer.Argument(help="VOC or COCO; objects of one class in each image.")],
    classifier: Annotated[Path | None, typer.Option("--classifier", help="The model whose classes are guessed.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="test unless given, else val.")] = None,
    scales: Annotated[list[int] | None, typer.Option("--scale", help="Of dense: a shorter side in px; several are joined.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON here.")] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """The localization error: with the true class given, and of predicted classes; on one crop and on whole images.

    \b
    Examples:
      reslearn localize eval runs/where cells
      reslearn localize eval runs/where cells --classifier runs/cells --scale 112 --scale 128 --out where.json
    """
    from reslearn.files import write_text
    from reslearn.localize.evaluate import evaluate as measure
    from reslearn.training.display import Display

    if out is not None and not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
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
            cells = [result[view][key] for view in views]
            shown = [f"{c['error']:.2f} ({c['interval'][0]:.2f} to {c['interval'][1]:.2f})" for c in cells]
            typer.echo(f"  {title:<22}" + "".join(f"{each:>26}" for each in shown))
    for those in zip(*(result[view]["per_class"] for view in views), strict=True):
        if those[0]["n"]:
            numbers = "".join(f"{each['error']:>26.2f}" for each in those)
            typer.echo(f"  {those[0]['class'][:15]:<15} n={those[0]['n']:<4}{numbers}")
