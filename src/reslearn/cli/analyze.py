"""analyze: one command per row of ANALYSES."""

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
    help="Analyze the layers, blocks and paths of a network. Each command writes NAME.json and NAME.png.", no_args_is_help=True
)


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise UserError(f"--size {size}: must be odd, so that the center of the grid is the network itself")
    return size


Model = Annotated[Path, typer.Argument(help="Run folder, model file, or network name (untrained).")]
Models = Annotated[list[Path], typer.Argument(help="Run folders, model files or network names, shown in one plot.")]
Trained = Annotated[Path, typer.Argument(help="Run folder or model file.")]
Photo = Annotated[Path, typer.Argument(help="Image file.")]
Set = Annotated[str, typer.Argument(help="Data set name, folder (with or without class folders) or list.")]
Data = Annotated[str | None, typer.Option("--data", help="Data set to take test images from [default: the training data].")]
Images = Annotated[int, typer.Option("--images", min=2, help="Number of randomly chosen images.")]
Seed = Annotated[int, typer.Option("--seed", help="Random seed.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder [default: RUN/analysis, or analysis/MODEL].")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Output folder, or .npz or .parquet file for the features.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Also analyze the network before training.")]
Trials = Annotated[int, typer.Option("--draws", min=1, help="Random trials per experiment.")]
PathTrials = Annotated[int, typer.Option("--draws", min=1, help="Random paths per length.")]
Size = Annotated[int, typer.Option("--size", min=3, callback=_odd, help="Grid points per side (odd).")]
Reach = Annotated[float, typer.Option("--reach", min=0.01, help="Largest distance from the weights, in filter norms.")]
Target = Annotated[str | None, typer.Option("--class", help="Class to explain [default: the predicted class].")]


class Analysis(NamedTuple):
    """A command.

    images: default of --images; None for commands without a data set. options: additional ones, as (type, default).
    file: default name of a third output file, besides NAME.json and NAME.png.
    """

    summary: str
    examples: tuple[str, ...]
    arguments: dict[str, Any]
    images: int | None
    options: dict[str, tuple[Any, Any]] = {}  # noqa: RUF012  never changed
    file: str = ""


# Each name is that of a function in reslearn.analysis.catalog. The first sentence of a summary is shown in the command list.
ANALYSES = {
    "responses": Analysis(
        "Plot layer responses (DRL Figure 7). Shows the standard deviation of each 3x3 layer, in layer order and sorted.",
        ("responses runs/plain56 runs/resnet56",),
        {"models": Models},
        500,
    ),
    "signal": Analysis(
        "Trace signals forward and gradients backward. "
        "Shows sums of residuals, gradients by depth and the contribution of the shortcuts alone (IM, equations 3 to 5).",
        ("signal runs/resnet56 --fresh", "signal preact-resnet56 --data cifar10"),
        {"model": Model},
        250,
        {"fresh": (Fresh, False)},
    ),
    "lesion": Analysis(
        "Remove, shuffle and reorder blocks, and measure the error. See Veit et al., section 4.",
        ("lesion runs/resnet56",),
        {"model": Model},
        1000,
        {"draws": (Trials, 3)},
    ),
    "paths": Analysis(
        "Measure path lengths, and which paths carry the gradient. See Veit et al., sections 3 and 5.",
        ("paths runs/resnet56",),
        {"model": Model},
        128,
        {"draws": (PathTrials, 16)},
    ),
    "landscape": Analysis(
        "Plot the loss around the weights. Uses two random directions, normalized by filter (Li et al., 2018).",
        ("landscape runs/plain56 runs/resnet56",),
        {"models": Models},
        250,
        {"size": (Size, 15), "reach": (Reach, 1.0)},
    ),
    "explain": Analysis(
        "Show the image regions behind a prediction (Grad-CAM). See Selvaraju et al., 2017.",
        ("explain runs/mine photo.jpg --class cat",),
        {"model": Trained, "image": Photo},
        None,
        {"target": (Target, None)},
    ),
    "features": Analysis(
        "Write feature embeddings and a 2-D plot of them. The images may belong to any classes, or to none.",
        ("features runs/mine cifar10 --images 5000", "features runs/mine photos --out photos.parquet"),
        {"model": Trained, "data": Set},
        2000,
        file="features.npz",
    ),
}


def _parameters(analysis: Analysis) -> list[inspect.Parameter]:
    """The parameters of a command: its arguments, its own options and the common ones."""
    sampling = {} if analysis.images is None else {"images": (Images, analysis.images), "seed": (Seed, 0)}
    options: dict[str, tuple[Any, Any]] = {"data": (Data, None)} if sampling and "data" not in analysis.arguments else {}
    options |= analysis.options | sampling
    options |= {"out": (OutFile if analysis.file else Out, None), "as_json": (Json, False), "device": (Device, "auto")}
    parameters = {name: (kind, inspect.Parameter.empty) for name, kind in analysis.arguments.items()} | options
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in parameters.items()
    ]


def _add(name: str, analysis: Analysis) -> None:
    def command(**values: Any) -> None:
        _run(name, analysis, values.pop("models", None) or [values.pop("model")], **values)

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
    **options: Any,
) -> None:
    """Run an analysis, write its files and print its findings. options: the analysis's own."""
    from reslearn.analysis import catalog, features
    from reslearn.analysis.subject import open_subjects
    from reslearn.training.display import Display

    out_file = out if analysis.file and out is not None and out.suffix and not out.is_dir() else None
    folder, title = _folder(out_file.parent if out_file else out, models[0]), name
    if analysis.file:
        options["file"] = file = folder / (out_file.name if out_file else analysis.file)
        features.check_format(file)
        title = file.stem
    if images is None or seed is None:
        subjects, result = {}, catalog.explain(models[0], device, **options)
        image: Path = options["image"]
        words = (name, image.absolute().parent.name, image.stem, options["target"])
        title = "-".join(re.sub(r"[^\w.]+", "_", word) for word in words if word is not None)
    else:
        subjects = open_subjects(models, data, images, seed, device, any_classes=bool(analysis.file))
        with Display(stderr=as_json) as display:
            result = getattr(catalog, name)(subjects, seed, display.progress, **options)
    _write(title, folder, result, subjects or {str(models[0]): None}, seed, as_json)


def _folder(out: Path | None, model: Path) -> Path:
    """The output folder, which may not exist yet. Raises UserError, before any work, if it cannot be written."""
    folder = out or (model / "analysis" if model.is_dir() else Path("analysis") / model.stem)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"cannot write to {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission, or the disk is read-only")
    return folder


def _write(
    name: str, folder: Path, result: "AnalysisResult", models: "Mapping[str, Subject | None]", seed: int | None, as_json: bool
) -> None:
    """Write NAME.json and NAME.png, and print the findings."""
    from reslearn.analysis import plots
    from reslearn.files import write_text, writing
    from reslearn.training import runtime

    findings = result.findings + [f"{model}: {subject.note}" for model, subject in models.items() if subject and subject.note]
    record = {
        "analysis": name,
        "command": shlex.join(["reslearn", *sys.argv[1:]]),
        "models": {model: subject.facts() if subject else {} for model, subject in models.items()},
        "seed": seed,
        "versions": runtime.versions(),
        "findings": findings,
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
    for finding in findings:
        typer.echo(finding)
    typer.echo(f"written: {folder / f'{name}.json'}, {folder / f'{name}.png'}")
