"""The analyses of `reslearn analyze`: each measures its subjects, draws the result and states it in sentences."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from reslearn.analysis import explain as heat_maps
from reslearn.analysis import features as embeddings
from reslearn.analysis import findings, plots, subject
from reslearn.analysis.landscape import landscape as measure_landscape
from reslearn.analysis.lesion import lesion as measure_lesion
from reslearn.analysis.paths import paths as measure_paths
from reslearn.analysis.responses import responses as measure_responses
from reslearn.analysis.signal import signal as measure_signal
from reslearn.analysis.subject import Subject
from reslearn.data.images.files import read
from reslearn.device import pick_device
from reslearn.errors import UserError, did_you_mean
from reslearn.progress import Progress
from reslearn.weights.store import Card, load

Subjects = Mapping[str, Subject]


@dataclass(frozen=True)
class AnalysisResult:
    """findings: sentences. numbers: ready for JSON. save: writes what the analysis makes besides, once its folder exists."""

    findings: list[str]
    numbers: Any
    figure: Figure
    save: Callable[[], None] = lambda: None


def responses(subjects: Subjects, seed: int, progress: Progress) -> AnalysisResult:
    """The standard deviation of each 3x3 layer's output, network beside network."""
    found = {}
    for i, (name, one) in enumerate(subjects.items(), start=1):
        found[name] = measure_responses(one.model, one.images)
        progress("responses", i, len(subjects))
    numbers = {name: [asdict(response) for response in layers] for name, layers in found.items()}
    return AnalysisResult(findings.of_responses(found), numbers, plots.responses(found))


def signal(subjects: Subjects, seed: int, progress: Progress, fresh: bool) -> AnalysisResult:
    """Gradients and residuals by depth. fresh: also of the same network before training."""
    [(name, one)] = subjects.items()
    if fresh and not one.trained:
        raise UserError(f"{one.path} is a network before training already: leave out --fresh")
    found = {name: measure_signal(one.model, one.images, one.labels)}
    if fresh:
        found[f"{name}, untrained"] = measure_signal(subject.fresh(one, seed), one.images, one.labels)
    said = [f"{which}: {line}" if fresh else line for which, each in found.items() for line in findings.of_signal(each)]
    return AnalysisResult(said, {which: asdict(each) for which, each in found.items()}, plots.signal(found))


def lesion(subjects: Subjects, seed: int, progress: Progress, draws: int) -> AnalysisResult:
    """The error without blocks or layers, and with blocks in other orders."""
    [(name, one)] = subjects.items()
    found = measure_lesion(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    return AnalysisResult(findings.of_lesion(found), asdict(found), plots.lesion(found, name))


def paths(subjects: Subjects, seed: int, progress: Progress, draws: int) -> AnalysisResult:
    """The lengths of paths, and the gradient that each length carries."""
    [(name, one)] = subjects.items()
    found = measure_paths(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    return AnalysisResult(findings.of_paths(found), asdict(found), plots.paths(found, name))


def landscape(subjects: Subjects, seed: int, progress: Progress, size: int, reach: float) -> AnalysisResult:
    """The loss around the weights, network beside network."""
    found = {}
    for name, one in subjects.items():

        def of_one(what: str, done: int, total: int, name: str = name) -> None:
            progress(f"{what} of {name}", done, total)

        found[name] = measure_landscape(one.model, one.images, one.labels, size=size, reach=reach, seed=seed, progress=of_one)
    return AnalysisResult(findings.of_landscape(found), {k: asdict(v) for k, v in found.items()}, plots.landscape(found))


def features(subjects: Subjects, seed: int, progress: Progress, file: Path) -> AnalysisResult:
    """The input of the last linear layer for each image, for a file; and its first two principal components."""
    [(name, one)] = subjects.items()
    rows, labels = embeddings.features(one.model, one.images), one.labels.tolist()
    points, shares = embeddings.in_two_dimensions(rows, seed)
    said = [
        f"{file.name}: {len(rows):,} images of {one.data}, {rows.shape[1]} numbers each",
        f"Two directions hold {100 * sum(shares):.0f}% of their variance.",
    ]
    figure = plots.features(points, labels, one.classes, f"{name}: {len(rows):,} images of {one.data}", shares)
    numbers = {"shape": list(rows.shape), "shares": shares, "file": file.name}
    return AnalysisResult(said, numbers, figure, lambda: embeddings.write(file, rows, one.names, labels, one.classes))


def explain(model: Path, device: str, image: Path, target: str | None) -> AnalysisResult:
    """The places of an image that support a class (Grad-CAM): the predicted one, or `target`."""
    on = pick_device(device)
    net = load(model, on)
    card = net.card
    assert isinstance(card, Card)
    if target is not None and target not in card.classes:
        raise UserError(f"the model has no class '{target}'{did_you_mean(target, card.classes)}")
    picture = read(image, card.preprocessing.channels)
    seen = card.preprocessing.fit(picture)
    view = card.preprocessing.normalizer(on)(seen[None].to(on))
    probabilities = net(view).detach().softmax(1)[0].tolist()
    predicted = max(range(len(probabilities)), key=probabilities.__getitem__)
    chosen = card.classes.index(target) if target is not None else predicted
    heat = heat_maps.grad_cam(net, view, chosen)
    said = [f"{image}: {card.classes[predicted]}, probability {probabilities[predicted]:.1%}"]
    if chosen != predicted:
        said.append(f"asked for: {card.classes[chosen]}, probability {probabilities[chosen]:.1%}")
    if not heat.any():
        said.append(f"Nothing in the image supports {card.classes[chosen]}.")
    numbers = {"image": str(image), "class": card.classes[chosen], "probability": probabilities[chosen]}
    numbers |= {"predicted": card.classes[predicted], "heat": heat.tolist()}
    titles = (image.name, "as the network sees it", f"evidence for {card.classes[chosen]}")
    figure = plots.explained(heat_maps.large_view(picture, card.preprocessing), seen, heat, titles)
    return AnalysisResult(said, numbers, figure)
