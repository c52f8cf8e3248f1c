"""localize: where the object of an image is, by boxes for each class on a classification network."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reslearn.cli.options import Device, Json
from reslearn.errors import UserError

app = typer.Typer(help="Where an image's object is: boxes for each class on a classification network.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Localization, the paper's appendix C."""


@app.command(no_args_is_help=True)
def crops(
    data: Annotated[Path, typer.Argument(help="A VOC folder or COCO set, of many objects an image.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder.")],
    per_class: Annotated[int, typer.Option("--per-class", min=1, help="Windows of each class for training.")] = 600,
    tested: Annotated[int, typer.Option("--tested", min=1, help="At most so many of each class to test on, one an object.")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    bad_boxes: Annotated[str, typer.Option("--bad-boxes", help="fail, or drop unsound boxes.")] = "fail",
) -> None:
    """Cut images of one object each out of annotated ones: a set for localize, and for train as well (CLASS folders).

    \b
    Examples:
      reslearn localize crops bccd -o cells --bad-boxes drop
    """
    from reslearn.data.boxes import bad_boxes_left_out_by
    from reslearn.localize.crops import cut_out

    with bad_boxes_left_out_by("--bad-boxes drop"):
        counts = cut_out(data, out, per_class=per_class, tested=tested, seed=seed, bad=bad_boxes)  # type: ignore[arg-type]
    for split, of in counts.items():
        typer.echo(f"{split:<6}" + ", ".join(f"{name} {n:,}" for name, n in of.items()))
    typer.echo(f"wrote {out}")


@app.command(no_args_is_help=True)
def train(
    data: Annotated[Path | None, typer.Argument(help="VOC or COCO; objects of one class in each image.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A new network, such as resnet18.")] = None,
    init: Annotated[Path | None, typer.Option("--init", help="Fine-tune this classification model file or run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's new folder.")] = None,
    size: Annotated[int | None, typer.Option("--size", help="Side of the crops in px; 224.")] = None,
    jitter: Annotated[str | None, typer.Option("--jitter", help="Shorter sides in px that crops are taken from; 256,480.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="20.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Images a step; 256.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="The highest learning rate; 0.05.")] = None,
    anchors: Annotated[int | None, typer.Option("--anchors", help="How many at each place, fitted to the data; 9.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything that is drawn.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue this run, bit for bit; nothing else is given.")] = None,
    device: Device = "auto",
) -> None:
    """Train a network to say where the object is; or go on with an interrupted run.

    \b
    Examples:
      reslearn localize train cells --init runs/cells --out runs/where
      reslearn localize train cells --model resnet18 --size 96 --epochs 30 --batch 64 --out runs/where
      reslearn localize train --resume runs/where
    """
    given = {"net": model, "init": init and str(init), "size": size, "batch": batch, "anchors": anchors, "seed": seed}
    given |= {"jitter": _pair(jitter)} if jitter is not None else {}
    plan: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if resume is not None:
        names = {"DATA": data, "--out": out, "--epochs": epochs, "--lr": lr}
        names |= {f"--{'model' if key == 'net' else key}": value for key, value in plan.items()}
        if extra := [name for name, value in names.items() if value is not None]:
            raise UserError(f"--resume takes everything from the run: leave out {', '.join(extra)}")
    elif data is None or out is None:
        raise UserError("say what to train on and where to: reslearn localize train DATA --out RUN (or --resume RUN)")
    from reslearn.localize import train as localize_train

    if resume is not None:
        from reslearn.localize import resume as go_on

        go_on(resume, device=device, say=typer.echo)
    else:
        assert data is not None and out is not None
        if epochs is not None or lr is not None:
            plan["schedule"] = {
                "epochs": 20 if epochs is None else epochs,
                "lr": 0.05 if lr is None else lr,
                "shape": "cosine",
                "warmup": 0.05,
            }
        localize_train(data, out, device=device, say=typer.echo, **plan)
    typer.echo(f"model    {(resume or out or Path()) / 'model.safetensors'}")


def _pair(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--jitter {text}: write two sizes in px with a comma between, such as 256,480")
    return int(parts[0]), int(parts[1])


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
    from reslearn.localize import evaluate as measure
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
    typer.echo(f"{result['data']}, {result['split']}: {result['n']:,} images; classes from {result['classes_from']}")
    typer.echo(f"{'error, % (95% interval)':<24}{'1 crop':>24}{'dense ' + ' '.join(map(str, result['scales'])):>28}")
    for key, title in TITLES.items():
        if key in result["1-crop"]:
            cells = [result[view][key] for view in ("1-crop", "dense")]
            shown = [f"{c['error']:.2f} ({c['interval'][0]:.2f} to {c['interval'][1]:.2f})" for c in cells]
            typer.echo(f"  {title:<22}{shown[0]:>24}{shown[1]:>28}")
    for one, dense in zip(result["1-crop"]["per_class"], result["dense"]["per_class"], strict=True):
        if one["n"]:
            typer.echo(f"  {one['class'][:18]:<18} n={one['n']:<4}{one['error']:>19.2f}{dense['error']:>28.2f}")
