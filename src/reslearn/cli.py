"""The command line: one short function a command. What is heavy is imported inside it, so that --help answers at once."""

import csv
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from reslearn import __version__
from reslearn.errors import Interrupted, UserError

app = typer.Typer(
    name="reslearn",
    help="Residual networks: train on your own images, see what they learned, use them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]


@app.command(no_args_is_help=True)
def train(
    data: Annotated[
        str | None, typer.Argument(help="fashion-sample, fashion-mnist, cifar10, cifar100, a folder or a list.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="A network, such as resnet20, plain34 or resnet50.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="cifar10-paper, default, fashion, or a .toml/.json file.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value, for any key of the recipe.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything that is drawn.")] = None,
    init: Annotated[Path | None, typer.Option("--init", help="Fine-tune this model file or run.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The run's new folder; runs/DATA-MODEL by default.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Continue this run, bit for bit; nothing else is given.")] = None,
    device: Device = "auto",
) -> None:
    """Train a network on images; or go on with an interrupted run.

    \b
    Examples:
      reslearn train fashion-sample
      reslearn train path/to/folder --out runs/mine
      reslearn train cifar10 --model resnet56 --recipe cifar10-paper --seed 1
      reslearn train photos.csv --set schedule.epochs=20 --set data.size=96
      reslearn train photos --init runs/mine --set net.frozen=2 --set optimizer.trunk_lr=0.1
      reslearn train --resume runs/mine
    """
    if resume is not None:
        given = {"DATA": data, "--model": model, "--recipe": recipe, "--set": settings, "--init": init, "--out": out}
        extra = [name for name, value in given.items() if value]
        if extra or seed is not None:
            raise UserError(f"--resume takes its recipe from the run: leave out {', '.join(extra) or '--seed'}")
    elif data is None:
        raise UserError("say what to train on: reslearn train DATA (or --resume RUN)")
    from reslearn import api

    if resume is not None:
        run = api.resume(resume, device=device)
    else:
        assert data is not None
        run = api.train(data, model, recipe=recipe, settings=settings or (), seed=seed, out=out, device=device, init=init)
    _print_result(run.result)
    typer.echo(f"model    {run.folder / 'model.safetensors'}")
    typer.echo(f"report   {run.folder / 'report.html'}")


def _print_result(result: dict[str, Any]) -> None:
    """A line for each split of the last and, where they are others, the best weights."""
    same = result.get("best", {}).get("step") == result["last"]["step"]
    for name in ["last"] if same else [name for name in ("last", "best") if name in result]:
        step, title = result[name]["step"], "last, best" if same else name
        for split, what in (("val", "held-out"), ("test", "test"), ("train", "training (nothing was held out)")):
            if split in result[name]:
                numbers = result[name][split]
                low, high = numbers["top1_interval"]
                interval = f"95% interval {low:.2f} to {high:.2f}, n={numbers['n']:,}"
                typer.echo(f"result   {what} error {numbers['top1_error']:.2f}%  ({interval}; {title}: step {step:,})")


class Split(StrEnum):
    train, val, test, all = "train", "val", "test", "all"


class OnBad(StrEnum):
    error, skip = "error", "skip"


@app.command("eval", no_args_is_help=True)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder or a model file.")],
    data: Annotated[str, typer.Argument(help="A data set, folder or list, as for train.")],
    split: Annotated[Split | None, typer.Option("--split", help="By default test, else val, else all images.")] = None,
    on_bad: Annotated[OnBad, typer.Option("--on-bad", help="What to do with files that cannot be read.")] = OnBad.error,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Top-1 and top-5 error with a bootstrap interval, calibration, accuracy by class, confusion matrix.

    \b
    Examples:
      reslearn eval runs/mine path/to/folder
      reslearn eval model.safetensors cifar10 --json
    """
    from reslearn.evaluation.evaluate import evaluate as run
    from reslearn.training.display import Display

    display = Display(stderr=True)
    try:
        result = run(model, data, split, on_bad, device=device, progress=display.progress)
    finally:
        display.stop()
    if as_json:
        typer.echo(json.dumps(result))
        return
    from reslearn.evaluation.show import show

    show(result)


@app.command(no_args_is_help=True)
def predict(
    model: Annotated[Path, typer.Argument(help="A run folder or a model file.")],
    files: Annotated[list[str], typer.Argument(help="Image files and folders; - reads one image from standard input.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes.")] = 3,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device: Device = "auto",
) -> None:
    """The most probable classes of image files. A file that cannot be read is named, and the others go on (exit code 2).

    \b
    Examples:
      reslearn predict runs/mine shirt.jpg boots.png
      reslearn predict model.safetensors path/to/folder --json
      curl -s URL | reslearn predict runs/mine -
    """
    if as_json and as_csv:
        raise UserError("choose --json or --csv")
    from reslearn.deploy.predict import Image, find_images, stream
    from reslearn.device import pick_device
    from reslearn.weights import load

    network = load(model, pick_device(device))
    images: list[Image] = []
    for file in files:
        images += [sys.stdin.buffer] if file == "-" else find_images([file])
    rows = csv.writer(sys.stdout)
    if as_csv:
        rows.writerow(["file", "rank", "class", "probability", "error"])
    failed, width = 0, min(max((len(str(image)) for image in images if image is not sys.stdin.buffer), default=1), 60)
    for prediction in stream(network, images, top):
        failed += prediction.error is not None
        if as_json:
            best = [{"class": name, "probability": round(p, 6)} for name, p in prediction.classes]
            found = {"predictions": best} if prediction.error is None else {"error": prediction.error}
            typer.echo(json.dumps({"file": prediction.file, **found}))
        elif as_csv:
            rows.writerows([prediction.file, i, name, f"{p:.6f}", ""] for i, (name, p) in enumerate(prediction.classes, 1))
            if prediction.error is not None:
                rows.writerow([prediction.file, "", "", "", prediction.error])
        elif prediction.error is None:
            shown = "".join(f"  {name} {100 * p:5.1f}%" for name, p in prediction.classes)
            typer.echo(f"{prediction.file:<{width}}{shown}")
        else:
            typer.echo(f"{prediction.file:<{width}}  {prediction.error}")
    if failed:
        raise UserError(f"{failed} of {len(images)} files could not be read")


@app.command(no_args_is_help=True)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are laid over each other.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; RUN/report.html for one run.")] = None,
) -> None:
    """One self-contained HTML page: curves, confusion, the hardest images, the recipe, the cost.

    \b
    Examples:
      reslearn report runs/mine
      reslearn report runs/resnet20 runs/plain20 -o compare.html
    """
    if out is None and len(runs) > 1:
        raise UserError("several runs make one page: say where with -o PAGE.html")
    from reslearn import report

    typer.echo(report.write(runs, out or runs[0] / "report.html"))


@app.command("import", no_args_is_help=True)
def import_(
    file: Annotated[Path, typer.Argument(help="A .pth, .pt, .th, .safetensors or .caffemodel.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model file, .safetensors.")],
    net: Annotated[str | None, typer.Option("--net", help="The network, where the file cannot tell.")] = None,
    classes: Annotated[Path | None, typer.Option("--classes", help="Their names, one a line, or a JSON list.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", help="Of each channel on 0..1, such as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option("--std", help="Likewise.")] = None,
    prototxt: Annotated[Path | None, typer.Option("--prototxt", help="Of a .caffemodel: compared with our layers.")] = None,
    mean_file: Annotated[Path | None, typer.Option("--mean-file", help="Of a .caffemodel: its mean image, .binaryproto.")] = None,
) -> None:
    """Weights of torchvision, timm, Caffe's original release and others, as a model file. No code of the file is run.

    \b
    Examples:
      reslearn import resnet50-11ad3fa6.pth -o resnet50.safetensors
      reslearn import resnet20-12fca82f.th -o resnet20.safetensors
      reslearn import ResNet-50-model.caffemodel --mean-file ResNet_mean.binaryproto -o resnet50.safetensors
    """
    from reslearn.weights.imports import import_weights

    numbers = (_numbers("--mean", mean), _numbers("--std", std))
    path, said = import_weights(file, net, classes, *numbers, out=out, prototxt=prototxt, mean_file=mean_file)
    for line in (*said, f"model    {path}"):
        typer.echo(line)


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text}: write numbers with commas between, such as 0.485,0.456,0.406") from error


class Format(StrEnum):
    torchvision, timm = "torchvision", "timm"


@app.command(no_args_is_help=True)
def export(
    model: Annotated[Path, typer.Argument(help="A run folder or a model file.")],
    format: Annotated[Format, typer.Option("--format", help="A torchvision state dict, or a timm folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file (.pth, .safetensors) or folder.")],
) -> None:
    """A model for torchvision (a state dict) or timm (a folder with config.json, weights and a model card).

    \b
    Examples:
      reslearn export runs/mine --format torchvision -o mine.pth
      reslearn export runs/mine --format timm -o mine-timm
    """
    from reslearn.weights.exports import export as write

    typer.echo(write(model, format.value, out))


class Place(StrEnum):
    spread, append = "spread", "append"


@app.command(no_args_is_help=True)
def deepen(
    model: Annotated[Path, typer.Argument(help="A run folder or a model file.")],
    net: Annotated[str, typer.Argument(help="A deeper network of its family, such as resnet56 for resnet20.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The new model file.")],
    where: Annotated[Place, typer.Option("--where", help="Where each stage's new blocks go.")] = Place.spread,
    data: Annotated[str | None, typer.Option("--data", help="Images for the proof; plain networks need them.")] = None,
) -> None:
    """A deeper network with the same function, from a trained one: the paper's constructed solution. It trains on from there.

    \b
    Examples:
      reslearn deepen runs/resnet20 resnet56 -o resnet56.safetensors
      reslearn deepen runs/plain20 plain56 -o plain56.safetensors --data cifar10 --where append
    """
    from reslearn.weights.deepened import deepen_model

    made = deepen_model(model, net, out, where.value, data)
    on = f"{made.images} images of {data}" if data else f"{made.images} images of noise"
    typer.echo(
        f"{made.path}: on {on} the largest difference of a logit is {made.difference:.3g}; {made.changed} predictions differ"
    )


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Names, with * for anything.")] = "*",
    as_json: Json = False,
) -> None:
    """The networks: parameters, multiply-adds, activation memory, and the errors that their papers print.

    \b
    Examples:
      reslearn models
      reslearn models 'preact-*' --json
    """
    from reslearn.nets import show

    if as_json:
        typer.echo(json.dumps(list(show.listing(pattern)), indent=1))
    else:
        show.print_models(pattern)


@app.command(no_args_is_help=True)
def summary(
    model: Annotated[str, typer.Argument(help="A network's name, a run folder or a model file.")],
    input: Annotated[str | None, typer.Option("--input", help="CHANNELSxHEIGHTxWIDTH; its own unless given.")] = None,
    every_row: Annotated[bool, typer.Option("--all", help="Every layer, however many.")] = False,
    as_json: Json = False,
) -> None:
    """The layer table of a network: output, parameters, multiply-adds, activation memory, receptive field.

    \b
    Examples:
      reslearn summary vgg16 --input 3x224x224
      reslearn summary resnet50 --all
      reslearn summary runs/mine --json
    """
    from reslearn.nets import show
    from reslearn.weights.store import network

    net, size = network(model)
    counted = show.summarise(net, _shape(input) if input is not None else size)
    if as_json:
        typer.echo(json.dumps(show.as_json(net, counted), indent=1))
    else:
        show.print_summary(net, counted, every_row)


def _shape(text: str) -> tuple[int, ...]:
    sides = text.lower().split("x")
    if len(sides) != 3 or not all(side.isdecimal() and 0 < int(side) <= 10_000 for side in sides):
        raise UserError(f"--input {text}: write it as CHANNELSxHEIGHTxWIDTH, such as 3x224x224")
    return tuple(map(int, sides))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"reslearn {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit code 2 and one line on standard error for a user's mistake; 130 and 143 after a signal."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        code = _complain(str(error))
    except TyperException as error:  # an unknown command, option or value; or nothing at all, answered by the help
        message = getattr(error, "format_message", error.__str__)()
        code = _complain(message.rstrip(".")) if "\n" not in message else (typer.echo(message, err=True) or 2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except Interrupted as error:
        typer.echo(f"reslearn: stopped by {error}; the run is saved, and reslearn train --resume RUN goes on with it", err=True)
        code = 128 + error.number
    sys.exit(code)


def _complain(message: str) -> int:
    typer.echo(f"reslearn: {message}", err=True)
    return 2
