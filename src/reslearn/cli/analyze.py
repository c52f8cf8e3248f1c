"""analyze: what the layers, blocks and paths of a network do; a row of a table for each analysis."""

import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from reslearn.cli.options import Device, Json
from reslearn.errors import UserError

if TYPE_CHECKING:
    from reslearn.analysis.catalog import AnalysisResult
    from reslearn.analysis.subject import Subject

app = typer.Typer(
    help="Analyze a network: what its layers, blocks and paths do. Each command writes NAME.json and NAME.png.",
    no_args_is_help=True,
)


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise UserError(f"--size {size}: take an odd number, so that the middle point is the network itself")
    return size


Model = Annotated[Path, typer.Argument(help="A run folder, a model file, or the name of a network before training.")]
Models = Annotated[list[Path], typer.Argument(help="Run folders, model files or names of networks, for one plot.")]
Trained = Annotated[Path, typer.Argument(help="A run folder or a model file.")]
Photo = Annotated[Path, typer.Argument(help="An image file.")]
Set = Annotated[str, typer.Argument(help="A data set's name, a folder with or without class folders, or a list.")]
Data = Annotated[str | None, typer.Option("--data", help="Data set to take test images of [default: the training data].")]
Images = Annotated[int, typer.Option("--images", min=2, help="Number of randomly chosen images.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder [default: RUN/analysis of a run, else analysis/MODEL].")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Folder, or a .npz or .parquet file for the features.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Also analyze the same network before training.")]
Trials = Annotated[int, typer.Option("--draws", min=1, help="Random choices of each kind.")]
PathTrials = Annotated[int, typer.Option("--draws", min=1, help="Random paths of each length.")]
Size = Annotated[int, typer.Option("--size", min=3, callback=_odd, help="Grid points per side, an odd number.")]
Reach = Annotated[float, typer.Option("--reach", min=0.01, help="Largest distance from the weights, in filter norms.")]
Target = Annotated[str | None, typer.Option("--class", help="Class to explain [default: the predicted one].")]


class Analysis(NamedTuple):
    """A command. images: the default of --images, or None where it takes no data set. options: of its own, with defaults.

    file: the default name of a file that it writes besides NAME.json and NAME.png.
    """

    summary: str
    examples: tuple[str, ...]
    arguments: dict[str, Any]
    images: int | None
    options: dict[str, tuple[Any, Any]] = {}  # noqa: RUF012  never changed
    file: str = ""


# name -> what `reslearn.analysis.catalog` has a function of that name for
ANALYSES = {
    "responses": Analysis(
        "How strongly each 3x3 layer responds (DRL Figure 7): standard deviations, in order and sorted.",
        ("responses runs/plain56 runs/resnet56",),
        {"models": Models},
        500,
    ),
    "signal": Analysis(
        "The signal forward and backward (IM, equations 3 to 5): sums of residuals, gradients by depth, the shortcuts' share.",
        ("signal runs/resnet56 --fresh", "signal preact-resnet56 --data cifar10"),
        {"model": Model},
        250,
        {"fresh": (Fresh, False)},
    ),
    "lesion": Analysis(
        "The error without one or several blocks or layers, with shuffled weights, in other orders (Veit et al., section 4).",
        ("lesion runs/resnet56",),
        {"model": Model},
        1000,
        {"draws": (Trials, 3)},
    ),
    "paths": Analysis(
        "The network as many paths: how long they are, and which carry the gradient (Veit et al., sections 3 and 5).",
        ("paths runs/resnet56",),
        {"model": Model},
        128,
        {"draws": (PathTrials, 16)},
    ),
    "landscape": Analysis(
        "The loss around the weights, along two random directions normalized by filter (Li et al., 2018).",
        ("landscape runs/plain56 runs/resnet56",),
        {"models": Models},
        250,
        {"size": (Size, 15), "reach": (Reach, 1.0)},
    ),
    "explain": Analysis(
        "Where the network looks (Grad-CAM, Selvaraju et al., 2017).",
        ("explain runs/mine photo.jpg --class cat",),
        {"model": Trained, "image": Photo},
        None,
        {"target": (Target, None)},
    ),
    "features": Analysis(
        "Feature embeddings of images, and a plot in two dimensions. The images may be of any classes.",
        ("features runs/mine cifar10 --images 5000", "features runs/mine photos --out photos.parquet"),
        {"model": Trained, "data": Set},
        2000,
        file="features.npz",
    ),
}


def _parameters(analysis: Analysis) -> list[inspect.Parameter]:
    """Of a command: its arguments, then the common options with its own among them."""
    of_data = {} if analysis.images is None else {"images": (Images, analysis.images), "seed": (Seed, 0)}
    options: dict[str, tuple[Any, Any]] = {"data": (Data, None)} if of_data and "data" not in analysis.arguments else {}
    options |= analysis.options | of_data
    options |= {"out": (OutFile if analysis.file else Out, None), "as_json": (Json, False), "device": (Device, "auto")}
    given = {name: (kind, inspect.Parameter.empty) for name, kind in analysis.arguments.items()} | options
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in given.items()
    ]


def _add(name: str, analysis: Analysis) -> None:
    def command(**given: Any) -> None:
        _run(name, analysis, given.pop("models", None) or [given.pop("model")], **given)

    command.__signature__ = inspect.Signature(_parameters(analysis))  # type: ignore[attr-defined]
    title = "Example" if len(analysis.examples) == 1 else "Examples"
    examples = "".join(f"\n  reslearn analyze {example}" for example in analysis.examples)
    app.command(name, help=f"{analysis.summary}\n\n\b\n{title}:{examples}")(command)


for _name, _analysis in ANALYSES.items():
    _add(_name, _analysis)


def _run(
    name: str,
    analysis: Analysis,
    models: list[Path],
    *,
    out: Path | None,
    as_json: bool,
    device: str,
    images: int | None = None,
    data: str | None = None,
    seed: int | None = None,
    **own: Any,
) -> None:
    """Run an analysis, write its files and print its findings."""
    from reslearn.analysis import catalog, features
    from reslearn.analysis.subject import open_subjects
    from reslearn.training.display import Display

    named = out if analysis.file and out is not None and out.suffix and not out.is_dir() else None  # a file
    folder, title = _folder(named.parent if named else out, models[0]), name
    if analysis.file:
        own["file"] = file = folder / (named.name if named else analysis.file)
        features.check_format(file)
        title = file.stem
    if images is None or seed is None:
        subjects, result = {}, catalog.explain(models[0], device, **own)
        words = (name, own["image"].absolute().parent.name, own["image"].stem, own["target"])
        title = "-".join(re.sub(r"[^\w.]+", "_", word) for word in words if word is not None)
    else:
        subjects = open_subjects(models, data, images, seed, device, any_classes=bool(analysis.file))
        with Display(stderr=as_json) as display:
            result = getattr(catalog, name)(subjects, seed, display.progress, **own)
    _write(title, folder, result, subjects or {str(models[0]): None}, seed, as_json)


def _folder(out: Path | None, model: Path) -> Path:
    """The folder to write to, not made yet. Raises UserError, before any work is done, where nothing could be written there."""
    folder = out or (model / "analysis" if model.is_dir() else Path("analysis") / model.stem)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write to {folder}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission, or the disk is read-only")
    return folder


def _write(
    name: str, folder: Path, result: "AnalysisResult", models: "Mapping[str, Subject | None]", seed: int | None, as_json: bool
) -> None:
    """NAME.json and NAME.png, and the findings on standard output."""
    from reslearn.analysis import plots
    from reslearn.files import write_text, writing
    from reslearn.training import runtime

    said = result.findings + [f"{which}: {one.note}" for which, one in models.items() if one and one.note]
    record = {
        "analysis": name,
        "command": shlex.join(["reslearn", *sys.argv[1:]]),
        "models": {which: one.facts() if one else {} for which, one in models.items()},
        "seed": seed,
        "versions": runtime.versions(),
        "findings": said,
        "numbers": result.numbers,
        "picture": f"{name}.png",
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    result.save()
    plots.save(result.figure, folder / f"{name}.png")
    write_text(folder / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    for line in said:
        typer.echo(line)
    typer.echo(f"written: {folder / f'{name}.json'}, {folder / f'{name}.png'}")
