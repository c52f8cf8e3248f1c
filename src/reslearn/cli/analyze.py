"""analyze: a trained network taken apart."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reslearn.cli.options import Device, Json
from reslearn.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reslearn.analysis.subject import Subject

app = typer.Typer(help="Take a trained network apart: what layers, blocks and paths do.", no_args_is_help=True)

Model = Annotated[Path, typer.Argument(help="A run folder, a model file, or the name of a network before training.")]
Models = Annotated[list[Path], typer.Argument(help="Run folders, model files or names of networks; drawn together.")]
Trained = Annotated[Path, typer.Argument(help="A run folder or a model file.")]
Data = Annotated[str | None, typer.Option("--data", help="Its test images; by default the data it was trained on.")]
Images = Annotated[int, typer.Option("--images", min=2, help="So many of them, drawn by the seed.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder; RUN/analysis for a run, else analysis/MODEL.")]


@app.callback()
def _group() -> None:
    """What layers, blocks and paths do. Each command writes NAME.json and NAME.png."""


@app.command()
def responses(
    models: Models,
    data: Data = None,
    images: Images = 500,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """How strongly each 3x3 layer responds (DRL Figure 7): standard deviations, in order and sorted.

    \b
    Example:
      reslearn analyze responses runs/plain56 runs/resnet56
    """
    from reslearn.analysis import findings, plots
    from reslearn.analysis.responses import responses as compute

    place = _place(out, models[0])
    subjects = _open(models, data, images, seed, device)
    with _progress("responses", as_json) as progress:
        found = {}
        for i, (name, subject) in enumerate(subjects.items(), start=1):
            found[name] = compute(subject.model, subject.images)
            progress(i, len(subjects))
    numbers = {name: [asdict(response) for response in layers] for name, layers in found.items()}
    _write("responses", place, subjects, seed, findings.of_responses(found), numbers, plots.responses(found), as_json)


@app.command()
def signal(
    model: Model,
    data: Data = None,
    images: Images = 250,
    fresh: Annotated[bool, typer.Option("--fresh", help="Also the same network before training.")] = False,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """The signal forward and backward (IM, equations 3 to 5): sums of residuals, gradients by depth, the shortcuts' share.

    \b
    Examples:
      reslearn analyze signal runs/resnet56 --fresh
      reslearn analyze signal preact-resnet56 --data cifar10
    """
    from reslearn.analysis import findings, plots, subject
    from reslearn.analysis.signal import signal as compute

    place = _place(out, model)
    subjects = _open([model], data, images, seed, device)
    name, one = next(iter(subjects.items()))
    if fresh and not one.trained:
        raise UserError(f"{model} is a network before training already: leave out --fresh")
    found = {name: compute(one.model, one.images, one.labels)}
    if fresh:
        found[f"{name}, untrained"] = compute(subject.fresh(one, seed), one.images, one.labels)
    said = [f"{which}: {line}" if fresh else line for which, each in found.items() for line in findings.of_signal(each)]
    numbers = {which: asdict(each) for which, each in found.items()}
    _write("signal", place, subjects, seed, said, numbers, plots.signal(found), as_json)


@app.command()
def lesion(
    model: Model,
    data: Data = None,
    images: Images = 1000,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random choices of each kind.")] = 3,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """The error without one block or layer, without several, with weights shuffled, in other orders (Veit et al., section 4).

    \b
    Example:
      reslearn analyze lesion runs/resnet56
    """
    from reslearn.analysis import findings, plots
    from reslearn.analysis.lesion import lesion as compute

    place = _place(out, model)
    subjects = _open([model], data, images, seed, device)
    name, one = next(iter(subjects.items()))
    with _progress("lesion", as_json) as progress:
        found = compute(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    _write("lesion", place, subjects, seed, findings.of_lesion(found), asdict(found), plots.lesion(found, name), as_json)


@app.command()
def paths(
    model: Model,
    data: Data = None,
    images: Images = 128,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random paths of each length.")] = 16,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """The network as many paths: how long they are, and which carry the gradient (Veit et al., sections 3 and 5).

    \b
    Example:
      reslearn analyze paths runs/resnet56
    """
    from reslearn.analysis import findings, plots
    from reslearn.analysis.paths import paths as compute

    place = _place(out, model)
    subjects = _open([model], data, images, seed, device)
    name, one = next(iter(subjects.items()))
    with _progress("paths", as_json) as progress:
        found = compute(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    _write("paths", place, subjects, seed, findings.of_paths(found), asdict(found), plots.paths(found, name), as_json)


@app.command()
def landscape(
    models: Models,
    data: Data = None,
    images: Images = 250,
    size: Annotated[int, typer.Option("--size", min=3, help="Points a side, an odd number.")] = 15,
    reach: Annotated[float, typer.Option("--reach", min=0.01, help="How far, in filter norms.")] = 1.0,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """The loss around the weights, along two random directions normalized by filter (Li et al., 2018).

    \b
    Example:
      reslearn analyze landscape runs/plain56 runs/resnet56
    """
    if size % 2 == 0:
        raise UserError(f"--size {size}: take an odd number, so that the middle point is the network itself")
    from reslearn.analysis import findings, plots
    from reslearn.analysis.landscape import landscape as compute

    place = _place(out, models[0])
    subjects = _open(models, data, images, seed, device)
    found = {}
    for name, one in subjects.items():
        with _progress(f"landscape of {name}", as_json) as progress:
            found[name] = compute(one.model, one.images, one.labels, size=size, reach=reach, seed=seed, progress=progress)
    numbers = {name: asdict(one) for name, one in found.items()}
    _write("landscape", place, subjects, seed, findings.of_landscape(found), numbers, plots.landscape(found), as_json)


@app.command()
def explain(
    model: Trained,
    image: Annotated[Path, typer.Argument(help="An image file.")],
    target: Annotated[str | None, typer.Option("--class", help="What speaks for this class, not for the predicted one.")] = None,
    out: Out = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Where the network looks (Grad-CAM, Selvaraju et al., 2017).

    \b
    Example:
      reslearn analyze explain runs/mine photo.jpg --class cat
    """
    from reslearn.analysis import plots
    from reslearn.analysis.explain import grad_cam, large_view
    from reslearn.data.images.files import read
    from reslearn.device import pick_device
    from reslearn.errors import did_you_mean
    from reslearn.weights import load

    place = _place(out, model)
    on = pick_device(device)
    net = load(model, on)
    card: Any = net.card
    if target is not None and target not in card.classes:
        raise UserError(f"the model has no class '{target}'{did_you_mean(target, card.classes)}")
    picture = read(image, card.preprocessing.channels)
    seen = card.preprocessing.fit(picture)
    view = card.preprocessing.normalizer(on)(seen[None].to(on))
    probabilities = net(view).detach().softmax(1)[0].tolist()
    predicted = max(range(len(probabilities)), key=probabilities.__getitem__)
    chosen = card.classes.index(target) if target is not None else predicted
    heat = grad_cam(net, view, chosen)
    said = [f"{image}: {card.classes[predicted]}, probability {probabilities[predicted]:.1%}"]
    if chosen != predicted:
        said.append(f"asked for: {card.classes[chosen]}, probability {probabilities[chosen]:.1%}")
    if not heat.any():
        said.append(f"Nothing in the image speaks for {card.classes[chosen]}.")
    numbers = {"image": str(image), "class": card.classes[chosen], "probability": probabilities[chosen]}
    numbers |= {"predicted": card.classes[predicted], "heat": heat.tolist()}
    titles = (image.name, "as the network sees it", f"what speaks for {card.classes[chosen]}")
    figure = plots.explained(large_view(picture, card.preprocessing), seen, heat, titles)
    asked = [] if target is None else [target]
    name = "-".join(re.sub(r"[^\w.]+", "_", part) for part in ("explain", image.absolute().parent.name, image.stem, *asked))
    _write(name, place, {}, None, said, numbers, figure, as_json, model)


@app.command()
def features(
    model: Trained,
    data: Annotated[str, typer.Argument(help="A data set's name, a folder with or without class folders, or a list.")],
    images: Images = 2000,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder, as for the others, or a .npz or .parquet file.")
    ] = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """What the network knows of images before it names them: features.npz, and a picture in two dimensions.

    The images need not be of the model's classes.

    \b
    Examples:
      reslearn analyze features runs/mine cifar10 --images 5000
      reslearn analyze features runs/mine photos --out photos.parquet
    """
    from reslearn.analysis import plots
    from reslearn.analysis.features import check_format, in_two_dimensions, write
    from reslearn.analysis.features import features as compute

    is_file = out is not None and bool(out.suffix) and not out.is_dir()
    place = _place(out.parent if is_file and out else out, model)
    file = place / (out.name if is_file and out else "features.npz")
    check_format(file)
    subjects = _open([model], data, images, seed, device, any_classes=True)
    name, one = next(iter(subjects.items()))
    rows = compute(one.model, one.images)
    labels = one.labels.tolist()
    points, shares = in_two_dimensions(rows, seed)
    figure = plots.features(points, labels, one.classes, f"{name}: {len(rows):,} images of {one.data}", shares)
    said = [
        f"{file.name}: {len(rows):,} images of {one.data}, {rows.shape[1]} numbers each",
        f"Two directions hold {100 * sum(shares):.0f}% of their variance.",
    ]
    numbers = {"shape": list(rows.shape), "shares": shares, "file": file.name}
    _make(place)
    write(file, rows, one.names, labels, one.classes)
    _write(file.stem, place, subjects, seed, said, numbers, figure, as_json)


def _open(
    models: list[Path], data: str | None, images: int, seed: int, device: str, any_classes: bool = False
) -> "dict[str, Subject]":
    """The subjects by a name that tells them apart."""
    from reslearn.analysis.subject import open_subject

    subjects = [open_subject(model, data, images, seed, device, any_classes=any_classes) for model in models]
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        names = [f"{name} ({model})" for name, model in zip(names, models, strict=True)]
    if len(set(names)) < len(names):
        raise UserError("a model is given twice")
    return dict(zip(names, subjects, strict=True))


class _progress:
    """Progress of one piece of work, on standard error where JSON is printed."""

    def __init__(self, what: str, as_json: bool) -> None:
        from reslearn.training.display import Display

        self.what, self.display = what, Display(stderr=as_json)

    def __enter__(self) -> Callable[[int, int], None]:
        return lambda done, total: self.display.progress(self.what, done, total)

    def __exit__(self, *error: object) -> None:
        self.display.stop()


def _place(out: Path | None, model: Path) -> Path:
    """The folder to write to, not made yet. Raises UserError, before any work is done, where nothing could be written there."""
    folder = out or (model / "analysis" if model.is_dir() else Path("analysis") / model.stem)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write to {folder}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"cannot write to {folder}: no permission, or the disk is read-only")
    return folder


def _make(folder: Path) -> None:
    from reslearn.files import writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(
    name: str,
    folder: Path,
    subjects: "dict[str, Subject]",
    seed: int | None,
    said: list[str],
    numbers: Any,
    figure: "Figure",
    as_json: bool,
    model: Path | None = None,
) -> None:
    """NAME.json and NAME.png, and what was found in lines. model: where there is no subject."""
    from reslearn.analysis import plots
    from reslearn.files import write_text
    from reslearn.training import runtime

    said = said + [f"{which}: {subject.note}" for which, subject in subjects.items() if subject.note]
    result = {
        "analysis": name,
        "command": shlex.join(["reslearn", *sys.argv[1:]]),
        "models": {which: subject.facts() for which, subject in subjects.items()} or {str(model): {}},
        "seed": seed,
        "versions": runtime.versions(),
        "findings": said,
        "numbers": numbers,
        "picture": f"{name}.png",
    }
    _make(folder)
    plots.save(figure, folder / f"{name}.png")
    write_text(folder / f"{name}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for line in said:
        typer.echo(line)
    typer.echo(f"written: {folder / f'{name}.json'}, {folder / f'{name}.png'}")
