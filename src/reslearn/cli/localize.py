"""localize: where the object of an image is, by boxes for each class on a classification network."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from reslearn.cli.detect import DROP, BadBoxes
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
    bad_boxes: Annotated[
        BadBoxes, typer.Option("--bad-boxes", help="Objects that are unsound: stop, or leave them out.")
    ] = BadBoxes.fail,
) -> None:
    """Cut images of one object each out of annotated ones: a set for localize, and for train as well (CLASS folders).

    \b
    Examples:
      reslearn localize crops bccd -o cells --bad-boxes drop
    """
    from reslearn.data.boxes.box_set import bad_boxes_left_out_by
    from reslearn.localize.crops import cut_out

    with bad_boxes_left_out_by(DROP):
        counts = cut_out(data, out, per_class=per_class, tested=tested, seed=seed, bad=bad_boxes.value)
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
    _check_resume(resume, {"DATA": data, "--out": out, "--epochs": epochs, "--lr": lr}, plan)
    if resume is None and (data is None or out is None):
        raise UserError("say what to train on and where to: reslearn localize train DATA --out RUN (or --resume RUN)")
    from reslearn.localize import train as localize_train

    if resume is not None:
        from reslearn.localize import resume as go_on

        go_on(resume, device=device, say=typer.echo)
    else:
        assert data is not None and out is not None
        localize_train(data, out, device=device, say=typer.echo, **plan, **_schedule(epochs, lr, 0.05))
    _finished(resume or out or Path())


@app.command(no_args_is_help=True)
def refine(
    model: Annotated[Path | None, typer.Argument(help="A run folder or model file of localize train.")] = None,
    data: Annotated[Path | None, typer.Argument(help="VOC or COCO; objects of one class in each image.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's new folder.")] = None,
    proposals: Annotated[int | None, typer.Option("--proposals", help="Boxes of an image that are judged; 200.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Of one region an image; 20.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Regions a step; 256.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="The highest learning rate; 0.02.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything that is drawn.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue this run, bit for bit; nothing else is given.")] = None,
    device: Device = "auto",
) -> None:
    """Give a localizer a second stage, R-CNN: its best boxes are cut out, scored again and moved. The new run has both.

    \b
    Examples:
      reslearn localize refine runs/where cells --out runs/refined
      reslearn localize eval runs/refined cells --classifier runs/cells
      reslearn localize refine --resume runs/refined
    """
    plan = {"proposals": proposals, "batch": batch, "seed": seed}
    plan = {key: value for key, value in plan.items() if value is not None}
    _check_resume(resume, {"MODEL": model, "DATA": data, "--out": out, "--epochs": epochs, "--lr": lr}, plan)
    if resume is None and (model is None or data is None or out is None):
        raise UserError("say what to refine: reslearn localize refine RUN DATA --out NEW (or --resume NEW)")
    from reslearn.localize.refine import refine as begin
    from reslearn.localize.refine import resume as go_on

    if resume is not None:
        go_on(resume, device=device, say=typer.echo)
    else:
        assert model is not None and data is not None and out is not None
        begin(model, data, out, device=device, say=typer.echo, **plan, **_schedule(epochs, lr, 0.02))
    _finished(resume or out or Path())


def _finished(run: Path) -> None:
    """Write the report of a run that has come to its end, and say where its files are."""
    from reslearn import report

    typer.echo(f"model    {run / 'model.safetensors'}")
    typer.echo(f"report   {report.write([run], run / 'report.html')}")


def _check_resume(resume: Path | None, names: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise UserError where more is given than what to go on with."""
    names = names | {f"--{'model' if key == 'net' else key}": value for key, value in plan.items()}
    if resume is not None and (extra := [name for name, value in names.items() if value is not None]):
        raise UserError(f"--resume takes everything from the run: leave out {', '.join(extra)}")


def _schedule(epochs: float | None, lr: float | None, usual: float) -> dict[str, Any]:
    """The schedule of a plan, where one of the two is given."""
    if epochs is None and lr is None:
        return {}
    given = {"epochs": 20 if epochs is None else epochs, "lr": usual if lr is None else lr}
    return {"schedule": {**given, "shape": "cosine", "warmup": 0.05}}


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
