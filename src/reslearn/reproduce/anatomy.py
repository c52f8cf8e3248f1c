"""Analyses of trained networks: layer responses (DRL Figure 7), lesions and paths (Veit et al.); test errors of given models."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from reslearn.analysis import plots
from reslearn.analysis.lesion import Lesion, lesion
from reslearn.analysis.parts import depth, has_shortcuts
from reslearn.analysis.paths import Paths, paths
from reslearn.analysis.responses import responses
from reslearn.analysis.subject import Subject, open_subject, trained_on
from reslearn.classify.evaluate import evaluate
from reslearn.nets import spec
from reslearn.reproduce.cifar import PUBLISHED, figure1, nets_for
from reslearn.reproduce.experiment import Comparison, Dataset, Experiment, ExperimentOptions, Measured, Models, Plan, Scale, scales
from reslearn.reproduce.verdicts import compare_to_paper, row, summarize, verdict
from reslearn.weights.store import read_card

IMAGES = 1000  # of the test set
GIVEN = "the models are given: their training was not checked"


def claim(text: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    """A claim that a value is above 0, decided by its interval over models, or by its sign for a single model."""
    effect = summarize(values)
    outcome = verdict(effect["interval"] or (values[0], values[0]))
    disagree = [i for i, value in enumerate(values) if value <= 0]
    detail = {} if len(values) > 1 else {"detail": "measured on one model"}
    return {"text": text, "metric": metric, "effect": effect, "verdict": outcome, "disagree": disagree} | detail


def _data(path: Path, options: ExperimentOptions) -> str:
    return options.data or trained_on(path, read_card(path)) or options.default_data


def _subjects(models: Models, options: ExperimentOptions) -> Iterator[tuple[str, int, Subject]]:
    """Yields each model's label, its index under that label, and the model with images."""
    for label, paths_of_seeds in models.items():
        for i, path in enumerate(paths_of_seeds):
            options.say(f"analyzing {label}: {path}")
            yield label, i, open_subject(path, _data(path, options), IMAGES, 0, options.device)


def measure_responses(models: Models, options: ExperimentOptions) -> Measured:
    """DRL Figure 7 and its two findings."""
    means: dict[str, list[float]] = {label: [] for label in models}
    first, depths, residual, data = {}, {}, [], set()
    for label, i, subject in _subjects(models, options):
        layers = responses(subject.model, subject.images)
        means[label].append(statistics.fmean(layer.std for layer in layers))
        data.add(subject.data)
        if i == 0:
            first[label], depths[label] = layers, depth(subject.model)
            residual += [label] if has_shortcuts(subject.model) else []
    residual.sort(key=depths.__getitem__)
    pairs = []  # (the network with larger responses, the one with smaller ones)
    for plain in sorted(set(models) - set(residual), key=depths.__getitem__):
        pairs += [(plain, net) for net in residual if depths[net] == depths[plain]][:1]
    claims = []
    for larger, smaller in [*pairs, *pairwise(residual)]:
        differences = [a - b for a, b in zip(means[larger], means[smaller], strict=False)]
        claims.append(claim(f"{smaller} has smaller responses than {larger}", "mean standard deviation", differences))
    rows = [row(f"{label}, mean over its 3x3 layers", "standard deviation", values) for label, values in means.items()]
    return Measured(
        rows,
        claims,
        lambda path: plots.save(plots.responses(first), path),
        caption="One model per network, one point per layer.",
        data=", ".join(sorted(data)),
    )


def measure_lesions(models: Models, options: ExperimentOptions) -> Measured:
    """Veit et al., section 4 (blocks removed and reordered) and section 5 (paths)."""
    lesions: dict[str, list[Lesion]] = {label: [] for label in models}
    traces: dict[str, list[Paths]] = {}  # of residual networks
    depths, data = {}, set()
    for label, _, subject in _subjects(models, options):
        lesions[label].append(lesion(subject.model, subject.images, subject.labels))
        if has_shortcuts(subject.model):
            traces.setdefault(label, []).append(paths(subject.model, subject.images[:128], subject.labels[:128], draws=24))
        depths[label] = depth(subject.model)
        data.add(subject.data)
    rows, claims = [], []
    for label, cuts in lesions.items():
        rows.append(row(f"{label}, intact", "test error, %", [cut.whole for cut in cuts]))
        rows.append(row(f"{label}, without one block that keeps the size", "test error, %", [_keeping(cut) for cut in cuts]))
        if label in traces:
            lengths = [_mean_length(trace) for trace in traces[label]]
            halves = [trace.blocks / 2 for trace in traces[label]]
            rows.append(row(f"{label}, without one block that halves the size", "test error, %", [_halving(cut) for cut in cuts]))
            rows.append(row(f"{label}, length of the paths that carry the gradient", "blocks, mean", lengths))
            rows.append(row(f"{label}, half of its blocks", "blocks", halves))
    for label in traces:
        claims += _residual_claims(label, lesions[label], traces[label])
    for label in lesions:
        if label not in traces and traces:
            residual = min(traces, key=lambda other: abs(depths[other] - depths[label]))
            pairs = zip(lesions[label], lesions[residual], strict=False)
            costs = [(_keeping(a) - a.whole) - (_keeping(b) - b.whole) for a, b in pairs]
            claims.append(claim(f"Removing one block costs {label} more than {residual}", "points of test error", costs))
    deepest = max(traces or lesions, key=depths.__getitem__)

    def draw(path: Path) -> None:
        plots.save(plots.lesion(lesions[deepest][0], deepest), path)
        if deepest in traces:
            plots.save(plots.paths(traces[deepest][0], deepest), path.with_name(f"{path.stem}-effects.png"))

    deviations = ("the paper analyzes a network of 110 layers",) if depths[deepest] < 110 else ()
    caption = "Left: test error with one block removed. Middle: with several removed. Right: with blocks reordered."
    second_caption = "The number of paths by length, and the gradient that they carry."
    return Measured(rows, claims, draw, deviations, caption, second_caption, ", ".join(sorted(data)))


def _residual_claims(label: str, cuts: Sequence[Lesion], traces: Sequence[Paths]) -> list[dict[str, Any]]:
    """Veit's findings about one residual network."""
    return [
        claim(
            f"{label}: removing a block that halves the size costs more than removing one that keeps it",
            "points of test error",
            [_halving(cut) - _keeping(cut) for cut in cuts],
        ),
        claim(
            f"{label}: the error grows with the number of blocks removed",
            "rank correlation",
            [_kendall_tau([(k, statistics.fmean(errors)) for k, errors in cut.several.items()]) for cut in cuts],
        ),
        claim(
            f"{label}: the error grows as blocks are reordered",
            "rank correlation with 1 - Kendall's tau",
            [_kendall_tau([(1 - tau, error) for tau, error in cut.orders]) for cut in cuts],
        ),
        claim(
            f"{label}: a path's gradient shrinks with its length",
            "minus the rank correlation of length and norm",
            [-_kendall_tau(list(enumerate(trace.norm))) for trace in traces],
        ),
        claim(
            f"{label}: the gradient comes through short paths, shorter than half of the blocks",
            "blocks below half",
            [trace.blocks / 2 - _mean_length(trace) for trace in traces],
        ),
    ]


def _mean_length(trace: Paths) -> float:
    """The mean length of the paths, weighted by the gradient that they carry."""
    return sum(k * share for k, share in enumerate(trace.carried))


def _keeping(cut: Lesion) -> float:
    """The median error without one block that keeps the size."""
    return statistics.median(e for name, e in cut.single.items() if e is not None and name not in cut.resizing)


def _halving(cut: Lesion) -> float:
    """The median error without one block that halves the size; of the intact network if it has none."""
    errors = [e for name, e in cut.single.items() if e is not None and name in cut.resizing]
    return statistics.median(errors) if errors else cut.whole


def _kendall_tau(points: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau without ties; 0 if there are no pairs to compare."""
    signs = [
        1 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else -1
        for i, a in enumerate(points)
        for b in points[:i]
        if a[0] != b[0] and a[1] != b[1]
    ]
    return statistics.fmean(signs) if signs else 0.0


def measure_errors(models: Models, options: ExperimentOptions) -> Measured:
    """Test errors of given models next to those of DRL Table 6."""
    rows, data = [], set()
    for label, files in models.items():
        card = read_card(files[0])
        published = PUBLISHED.get(card.net, spec(card.net).published.get("CIFAR-10")) if label.split(" (")[0] == card.net else None
        options.say(f"testing {label}")
        results = [evaluate(path, _data(path, options), device=options.device) for path in files]
        data |= {result["data"] for result in results}
        on_cifar = all(result["data"] == "cifar10" for result in results)
        comparison = Comparison(f"{label}, test error", label, published)
        rows.append(compare_to_paper(comparison, [result["top1_error"] for result in results], on_cifar))
    return Measured(rows, deviations=(GIVEN,), data=", ".join(sorted(data)))


def _responses(data: Dataset, scale: Scale) -> Plan:
    names = ("plain20", "plain56", "resnet20", "resnet56", *(("resnet110",) if scale == "paper" else ()))
    plan = figure1(data, scale)
    return Plan(nets_for(data, scale, *names), seeds=plan.seeds, deviations=plan.deviations, analyze=measure_responses)


def _lesions(data: Dataset, scale: Scale) -> Plan:
    names = ("resnet110",) if scale == "paper" else ("plain56", "resnet56")
    plan = figure1(data, scale)
    return Plan(nets_for(data, scale, *names), seeds=plan.seeds, deviations=plan.deviations, analyze=measure_lesions)


EXPERIMENTS = (
    Experiment(
        "figure7",
        "Residual networks have smaller layer responses",
        "DRL, Figure 7",
        "The standard deviation of each 3x3 layer's output. If shortcuts carry the signal, a block only has to add a little: "
        "residual networks should have smaller responses than plain ones, and deep residual networks smaller than shallow ones.",
        scales(_responses),
    ),
    Experiment(
        "veit",
        "A residual network consists of many paths, few of which matter",
        "Veit et al., Figures 3 to 6",
        "One block is removed from a trained network, then several, then blocks are reordered. A plain network drops to chance "
        "when it loses a layer; a residual network of many blocks hardly changes, because half of its paths bypass any one block.",
        scales(_lesions),
    ),
    Experiment(
        "models",
        "Test errors of given models",
        "DRL, Table 6",
        "The test errors of given model files next to those of the paper's networks of the same depth.",
        scales(lambda data, scale: Plan(analyze=measure_errors), "paper"),
    ),
)
