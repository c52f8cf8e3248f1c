"""analyze: a trained network taken apart."""

import json
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

Model = Annotated[Path, typer.Argument(help="A run folder or a model file.")]
Models = Annotated[list[Path], typer.Argument(help="Run folders or model files; drawn together.")]
Data = Annotated[str | None, typer.Option("--data", help="Its test images; by default the data it was trained on.")]
Images = Annotated[int, typer.Option("--images", min=2, help="So many of them, drawn by the seed.")]
Seed = Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder; RUN/analysis for a run, else ./analysis.")]


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

    subjects = _open(models, data, images, seed, device)
    found = {name: compute(subject.model, subject.images) for name, subject in subjects.items()}
    numbers = {name: [asdict(response) for response in layers] for name, layers in found.items()}
    _write("responses", subjects, seed, out, models[0], findings.of_responses(found), numbers, plots.responses(found), as_json)


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
    Example:
      reslearn analyze signal runs/resnet56 --fresh
    """
    from reslearn.analysis import findings, plots, subject
    from reslearn.analysis.signal import signal as compute

    subjects = _open([model], data, images, seed, device)
    name, one = next(iter(subjects.items()))
    found = {name: compute(one.model, one.images, one.labels)}
    if fresh:
        found[f"{name}, untrained"] = compute(subject.fresh(one, seed), one.images, one.labels)
    said = [f"{which}: {line}" if fresh else line for which, each in found.items() for line in findings.of_signal(each)]
    numbers = {which: asdict(each) for which, each in found.items()}
    _write("signal", subjects, seed, out, model, said, numbers, plots.signal(found), as_json)


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
    """The error without one block, without several, and with blocks in other orders (Veit et al., section 4).

    \b
    Example:
      reslearn analyze lesion runs/resnet56
    """
    from reslearn.analysis import findings, plots
    from reslearn.analysis.lesion import lesion as compute

    subjects = _open([model], data, images, seed, device)
    name, one = next(iter(subjects.items()))
    with _progress("lesion", as_json) as progress:
        found = compute(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    _write("lesion", subjects, seed, out, model, findings.of_lesion(found), asdict(found), plots.lesion(found, name), as_json)


@app.command()
def paths(
    model: Model,
    data: Data = None,
    images: Images = 128,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Random paths of each length.")] = 8,
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

    subjects = _open([model], data, images, seed, device)
    name, one = next(iter(subjects.items()))
    with _progress("paths", as_json) as progress:
        found = compute(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    _write("paths", subjects, seed, out, model, findings.of_paths(found), asdict(found), plots.paths(found, name), as_json)


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
    """The loss around the weights, along two random directions normalised by filter (Li et al., 2018).

    \b
    Example:
      reslearn analyze landscape runs/plain56 runs/resnet56
    """
    if size % 2 == 0:
        raise UserError(f"--size {size}: take an odd number, so that the middle point is the network itself")
    from reslearn.analysis import plots
    from reslearn.analysis.landscape import landscape as compute

    subjects = _open(models, data, images, seed, device)
    found = {}
    for name, one in subjects.items():
        with _progress(f"landscape of {name}", as_json) as progress:
            found[name] = compute(one.model, one.images, one.labels, size=size, reach=reach, seed=seed, progress=progress)
    middle = size // 2
    said = [
        f"{name}: loss {one.loss[middle][middle]:.3f} in the middle, "
        f"{sum(map(sum, one.loss)) / size**2:.3g} on the average, {max(map(max, one.loss)):.3g} at most."
        for name, one in found.items()
    ]
    numbers = {name: asdict(one) for name, one in found.items()}
    _write("landscape", subjects, seed, out, models[0], said, numbers, plots.landscape(found), as_json)


@app.command()
def explain(
    model: Model,
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
    from reslearn.analysis.explain import grad_cam
    from reslearn.data.images import read
    from reslearn.device import pick_device
    from reslearn.errors import did_you_mean
    from reslearn.weights import load

    on = pick_device(device)
    net = load(model, on)
    card: Any = net.card
    if target is not None and target not in card.classes:
        raise UserError(f"the model has no class '{target}'{did_you_mean(target, card.classes)}")
    pixels = card.preprocessing.fit(read(image, card.preprocessing.channels))
    view = card.preprocessing.normaliser(on)(pixels[None].to(on))
    probabilities = net(view).detach().softmax(1)[0]
    place = card.classes.index(target) if target is not None else int(probabilities.argmax())
    heat = grad_cam(net, view, place)
    said = [f"{image}: {card.classes[place]}, probability {probabilities[place]:.1%}"]
    numbers = {"image": str(image), "class": card.classes[place], "probability": float(probabilities[place])}
    figure = plots.explained(pixels, heat, f"what speaks for {card.classes[place]}")
    _write(f"explain-{image.stem}", {}, None, out, model, said, numbers | {"heat": heat.tolist()}, figure, as_json)


@app.command()
def features(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set's name, or a folder of class folders, or a list.")],
    images: Images = 2000,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """What the network knows of images before it names them: features.npz, and a picture in two dimensions.

    \b
    Example:
      reslearn analyze features runs/mine cifar10 --images 5000
    """
    import numpy as np

    from reslearn.analysis import plots
    from reslearn.analysis.features import features as compute
    from reslearn.analysis.features import in_two_dimensions
    from reslearn.files import write_atomic

    subjects = _open([model], data, images, seed, device)
    name, one = next(iter(subjects.items()))
    rows = compute(one.model, one.images)
    folder = _folder(out, model)
    labels = one.labels.tolist()

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(
                file, features=rows.numpy(), labels=np.array(labels), names=np.array(one.names), classes=np.array(one.card.classes)
            )

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "features.npz", save)
    figure = plots.features(in_two_dimensions(rows, seed), labels, one.card.classes, f"{name}: {len(rows):,} images of {one.data}")
    said = [f"features.npz: {len(rows):,} images of {one.data}, {rows.shape[1]} numbers each"]
    _write("features", subjects, seed, out, model, said, {"shape": list(rows.shape)}, figure, as_json)


def _open(models: list[Path], data: str | None, images: int, seed: int, device: str) -> "dict[str, Subject]":
    """The subjects by a name that tells them apart."""
    from reslearn.analysis.subject import open_subject

    subjects = [open_subject(model, data, images, seed, device) for model in models]
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


def _folder(out: Path | None, model: Path) -> Path:
    return out or (model / "analysis" if model.is_dir() else Path("analysis"))


def _write(
    name: str,
    subjects: "dict[str, Subject]",
    seed: int | None,
    out: Path | None,
    model: Path,
    said: list[str],
    numbers: Any,
    figure: "Figure",
    as_json: bool,
) -> None:
    """NAME.json and NAME.png, and what was found in lines."""
    from reslearn.analysis import plots
    from reslearn.files import write_text
    from reslearn.training import runtime

    folder = _folder(out, model)
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "analysis": name,
        "command": shlex.join(["reslearn", *sys.argv[1:]]),
        "data": {which: f"{len(s.labels):,} {s.split} images of {s.data}" for which, s in subjects.items()},
        "seed": seed,
        "versions": runtime.versions(),
        "findings": said,
        "numbers": numbers,
        "picture": f"{name}.png",
    }
    plots.save(figure, folder / f"{name}.png")
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for line in said:
        typer.echo(line)
    typer.echo(f"written: {folder / f'{name}.json'}, {folder / f'{name}.png'}")
