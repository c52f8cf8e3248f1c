"""The analyses of `reslearn analyze`: each returns its numbers, a figure and findings in sentences."""

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
    """findings: sentences. numbers: ready for JSON. save: writes further files; called once the output folder exists."""

    findings: list[str]
    numbers: Any
    figure: Figure
    save: Callable[[], None] = lambda: None


def responses(subjects: Subjects, seed: int, progress: Progress) -> AnalysisResult:
    """The standard deviation of each 3x3 layer's output, for one or several networks."""
    measured = {}
    for i, (name, one) in enumerate(subjects.items(), start=1):
        measured[name] = measure_responses(one.model, one.images)
        progress("responses", i, len(subjects))
    numbers = {name: [asdict(response) for response in layers] for name, layers in measured.items()}
    return AnalysisResult(findings.of_responses(measured), numbers, plots.responses(measured))


def signal(subjects: Subjects, seed: int, progress: Progress, fresh: bool) -> AnalysisResult:
    """Gradients and residuals by depth. fresh: analyze the untrained network as well."""
    [(name, one)] = subjects.items()
    if fresh and not one.trained:
        raise UserError(f"{one.path} is already untrained: leave out --fresh")
    measured = {name: measure_signal(one.model, one.images, one.labels)}
    if fresh:
        measured[f"{name}, untrained"] = measure_signal(subject.fresh(one, seed), one.images, one.labels)
    lines = [f"{key}: {line}" if fresh else line for key, result in measured.items() for line in findings.of_signal(result)]
    return AnalysisResult(lines, {key: asdict(result) for key, result in measured.items()}, plots.signal(measured))


def lesion(subjects: Subjects, seed: int, progress: Progress, draws: int) -> AnalysisResult:
    """The error without some blocks or layers, and with reordered blocks."""
    [(name, one)] = subjects.items()
    result = measure_lesion(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    return AnalysisResult(findings.of_lesion(result), asdict(result), plots.lesion(result, name))


def paths(subjects: Subjects, seed: int, progress: Progress, draws: int) -> AnalysisResult:
    """Path lengths, and the gradient carried by the paths of each length."""
    [(name, one)] = subjects.items()
    result = measure_paths(one.model, one.images, one.labels, draws=draws, seed=seed, progress=progress)
    return AnalysisResult(findings.of_paths(result), asdict(result), plots.paths(result, name))


def landscape(subjects: Subjects, seed: int, progress: Progress, size: int, reach: float) -> AnalysisResult:
    """The loss around the weights, for one or several networks."""
    measured = {}
    for name, one in subjects.items():

        def named(what: str, done: int, total: int, name: str = name) -> None:
            progress(f"{what} of {name}", done, total)

        measured[name] = measure_landscape(one.model, one.images, one.labels, size=size, reach=reach, seed=seed, progress=named)
    return AnalysisResult(findings.of_landscape(measured), {k: asdict(v) for k, v in measured.items()}, plots.landscape(measured))


def features(subjects: Subjects, seed: int, progress: Progress, file: Path) -> AnalysisResult:
    """Feature embeddings (the input of the last linear layer), saved to `file`, and their first two principal components."""
    [(name, one)] = subjects.items()
    rows, labels = embeddings.features(one.model, one.images), one.labels.tolist()
    points, shares = embeddings.in_two_dimensions(rows, seed)
    lines = [
        f"{file.name}: {len(rows):,} images of {one.data}, {rows.shape[1]} features each",
        f"The first two principal components explain {100 * sum(shares):.0f}% of the variance.",
    ]
    figure = plots.features(points, labels, one.classes, f"{name}: {len(rows):,} images of {one.data}", shares)
    numbers = {"shape": list(rows.shape), "shares": shares, "file": file.name}
    return AnalysisResult(lines, numbers, figure, lambda: embeddings.write(file, rows, one.names, labels, one.classes))


def explain(model: Path, device: str, image: Path, target: str | None) -> AnalysisResult:
    """The regions of an image that support a class (Grad-CAM): `target`, by default the predicted class."""
    on = pick_device(device)
    net = load(model, on)
    card = net.card
    assert isinstance(card, Card)
    if target is not None and target not in card.classes:
        raise UserError(f"the model has no class '{target}'{did_you_mean(target, card.classes)}")
    pixels = read(image, card.preprocessing.channels)
    view = card.preprocessing.fit(pixels)
    x = card.preprocessing.normalizer(on)(view[None].to(on))
    probabilities = net(x).detach().softmax(1)[0].tolist()
    predicted = max(range(len(probabilities)), key=probabilities.__getitem__)
    chosen = card.classes.index(target) if target is not None else predicted
    heat = heat_maps.grad_cam(net, x, chosen)
    lines = [f"{image}: {card.classes[predicted]}, probability {probabilities[predicted]:.1%}"]
    if chosen != predicted:
        lines.append(f"explained class: {card.classes[chosen]}, probability {probabilities[chosen]:.1%}")
    if not heat.any():
        lines.append(f"No region of the image supports {card.classes[chosen]}.")
    numbers = {"image": str(image), "class": card.classes[chosen], "probability": probabilities[chosen]}
    numbers |= {"predicted": card.classes[predicted], "heat": heat.tolist()}
    titles = (image.name, "network input", f"evidence for {card.classes[chosen]}")
    figure = plots.explained(heat_maps.large_view(pixels, card.preprocessing), view, heat, titles)
    return AnalysisResult(lines, numbers, figure)
