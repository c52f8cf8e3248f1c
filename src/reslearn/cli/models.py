"""models, summary, deepen, import and export."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reslearn.cli.options import Json
from reslearn.errors import UserError


def models(pattern: Annotated[str, typer.Argument(help="Names to list; * is a wildcard.")] = "*", as_json: Json = False) -> None:
    """List networks with their cost and published errors.

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


def summary(
    model: Annotated[str, typer.Argument(help="Network name, run folder or model file.")],
    input: Annotated[
        str | None, typer.Option("--input", help="CHANNELSxHEIGHTxWIDTH of the input [default: the network's own].")
    ] = None,
    every_row: Annotated[bool, typer.Option("--all", help="List every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Print the layer table of a network.

    Shows output size, parameters, multiply-adds, activation memory and receptive field.

    \b
    Examples:
      reslearn summary vgg16 --input 3x224x224
      reslearn summary resnet50 --all
      reslearn summary runs/mine --json
    """
    from reslearn.nets import show
    from reslearn.weights.store import network

    net, size = network(model)
    counted = show.summarize(net, _shape(input) if input is not None else size)
    if as_json:
        typer.echo(json.dumps(show.as_json(net, counted), indent=1))
    else:
        show.print_summary(net, counted, every_row)


def _shape(text: str) -> tuple[int, ...]:
    sides = text.lower().split("x")
    if len(sides) != 3 or not all(side.isdecimal() and 0 < int(side) <= 10_000 for side in sides):
        raise UserError(f"--input {text}: must have the form CHANNELSxHEIGHTxWIDTH, such as 3x224x224")
    return tuple(map(int, sides))


def import_(
    file: Annotated[Path, typer.Argument(help=".pth, .pt, .th, .safetensors or .caffemodel file, or timm folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model file to write (.safetensors).")],
    net: Annotated[str | None, typer.Option("--net", help="Network name, if the file does not determine it.")] = None,
    options: Annotated[list[str] | None, typer.Option("--option", help="Network option, such as shortcut=A. Repeatable.")] = None,
    classes: Annotated[Path | None, typer.Option("--classes", help="File of class names: one per line, or a JSON list.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", help="Per-channel mean on [0, 1], such as 0.485,0.456,0.406.")] = None,
    std: Annotated[str | None, typer.Option("--std", help="Per-channel standard deviation on [0, 1].")] = None,
    prototxt: Annotated[Path | None, typer.Option("--prototxt", help="Prototxt to check the layers against.")] = None,
    mean_file: Annotated[Path | None, typer.Option("--mean-file", help="Mean image of a .caffemodel (.binaryproto).")] = None,
) -> None:
    """Import weights from torchvision, timm or Caffe.

    Any file whose weights fit a network of reslearn models can be imported. Code in the file is never run.

    \b
    Examples:
      reslearn import resnet50-11ad3fa6.pth -o resnet50.safetensors
      reslearn import resnet20-12fca82f.th -o resnet20.safetensors
      reslearn import ResNet-50-model.caffemodel --mean-file ResNet_mean.binaryproto -o resnet50.safetensors
    """
    from reslearn.weights.read import import_weights

    numbers = (_numbers("--mean", mean), _numbers("--std", std))
    path, notes = import_weights(
        file, net, classes, *numbers, out=out, prototxt=prototxt, mean_file=mean_file, options=_options(options)
    )
    for line in (*notes, f"model    {path}"):
        typer.echo(line)


def _options(settings: list[str] | None) -> dict[str, Any]:
    pairs = [setting.partition("=") for setting in settings or ()]
    if bad := next((key for key, equals, _ in pairs if not equals), None):
        raise UserError(f"--option {bad}: must have the form key=value, such as shortcut=A-average")
    return {key: _value(text) for key, _, text in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text}: write numbers separated by commas, such as 0.485,0.456,0.406") from error


def export(
    model: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    format: Annotated[str, typer.Option("--format", help="torchvision (a state dict) or timm (a folder).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File (.pth, .safetensors) or folder to write.")],
) -> None:
    """Export a model for torchvision or timm.

    For torchvision it writes a state dict; for timm, a folder with config.json, weights and a model card.

    \b
    Examples:
      reslearn export runs/mine --format torchvision -o mine.pth
      reslearn export runs/mine --format timm -o mine-timm
    """
    from reslearn.weights.write import export as write

    typer.echo(write(model, format, out))


def deepen(
    model: Annotated[Path, typer.Argument(help="Run folder or model file.")],
    net: Annotated[str, typer.Argument(help="Deeper network of the same family, such as resnet56 for resnet20.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Model file to write.")],
    where: Annotated[
        Literal["spread", "append"], typer.Option("--where", help="Spread new blocks over each stage, or append them to its end.")
    ] = "spread",
    data: Annotated[str | None, typer.Option("--data", help="Data set to verify with; required for plain networks.")] = None,
) -> None:
    """Make a trained network deeper, preserving its outputs.

    This is the paper's constructed solution: the new layers are identities. The model can then be fine-tuned with train --init.

    \b
    Examples:
      reslearn deepen runs/resnet20 resnet56 -o resnet56.safetensors
      reslearn deepen runs/plain20 plain56 -o plain56.safetensors --data cifar10 --where append
    """
    from reslearn.weights.deepened import deepen_model

    deepened = deepen_model(model, net, out, where, data)
    images = f"{deepened.images} images of {data or 'noise'}"
    typer.echo(
        f"{deepened.path}: largest difference of a logit on {images}: {deepened.difference:.3g}; "
        f"{deepened.changed} predictions differ"
    )
