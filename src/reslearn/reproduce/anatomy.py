"""What trained networks look like inside: responses (DRL Figure 7), lesions and paths (Veit et al.), gradients (IM)."""

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
from reslearn.reproduce.verdicts import compare_to_paper, summarize, verdict
from reslearn.weights.store import read_card

IMAGES = 1000  # of the test set


def claim(text: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    """That a number is above 0: over models by its interval, in one model as it is measured."""
    effect = summarize(values)
    outcome = verdict(effect["interval"] or (values[0], values[0]))
    wrong = [i for i, value in enumerate(values) if value <= 0]
    one = {} if len(values) > 1 else {"detail": "measured in one model"}
    return {"text": text, "metric": metric, "effect": effect, "verdict": outcome, "disagree": wrong} | one


def _line(what: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    return {"what": what, "metric": metric, "published": None, "ours": summarize(values), "verdict": ""}


def _data(path: Path, options: ExperimentOptions) -> str:
    return options.data or trained_on(path, read_card(path)) or options.default_data


def _subjects(models: Models, options: ExperimentOptions) -> Iterator[tuple[str, int, Subject]]:
    """Label, place among its models, and the model with images to look at."""
    for label, seeds in models.items():
        for i, path in enumerate(seeds):
            options.say(f"analyzing {label}: {path}")
            yield label, i, open_subject(path, _data(path, options), IMAGES, 0, options.device)


def measure_responses(models: Models, options: ExperimentOptions) -> Measured:
    """DRL Figure 7, and its two findings."""
    means: dict[str, list[float]] = {label: [] for label in models}
    first, depths, residual, data = {}, {}, [], set()
    for label, i, subject in _subjects(models, options):
        found = responses(subject.model, subject.images)
        means[label].append(statistics.fmean(response.std for response in found))
        data.add(subject.data)
        if i == 0:
            first[label], depths[label] = found, depth(subject.model)
            residual += [label] if has_shortcuts(subject.model) else []
    residual.sort(key=depths.__getitem__)
    claims = []
    for label in sorted(set(models) - set(residual), key=depths.__getitem__):
        if twin := next((r for r in residual if depths[r] == depths[label]), None):
            values = [a - b for a, b in zip(means[label], means[twin], strict=False)]
            claims.append(claim(f"{twin} responds less than {label}", "mean standard deviation", values))
    for shallow, deep in pairwise(residual):
        values = [a - b for a, b in zip(means[shallow], means[deep], strict=False)]
        claims.append(claim(f"{deep} responds less than {shallow}", "mean standard deviation", values))
    rows = [_line(f"{label}, mean over its 3x3 layers", "standard deviation", values) for label, values in means.items()]
    return Measured(
        rows,
        claims,
        lambda path: plots.save(plots.responses(first), path),
        caption="One model of each net; every layer has a point.",
        data=", ".join(sorted(data)),
    )


def measure_lesions(models: Models, options: ExperimentOptions) -> Measured:
    """Veit et al., section 4: blocks left out and exchanged; and section 5: paths."""
    found: dict[str, list[tuple[Lesion, Paths | None]]] = {label: [] for label in models}
    depths, data = {}, set()
    for label, _, subject in _subjects(models, options):
        cut = lesion(subject.model, subject.images, subject.labels)
        few = subject.images[:128], subject.labels[:128]
        found[label].append((cut, paths(subject.model, *few, draws=24) if has_shortcuts(subject.model) else None))
        depths[label] = depth(subject.model)
        data.add(subject.data)
    rows, claims = [], []
    residual = {label: each for label, each in found.items() if each[0][1] is not None}
    for label, each in found.items():
        rows.append(_line(f"{label}, whole", "test error, %", [cut.whole for cut, _ in each]))
        rows.append(_line(f"{label}, without one block of one shape", "test error, %", [_one(cut) for cut, _ in each]))
        if label in residual:
            rows.append(_line(f"{label}, without one that halves the size", "test error, %", [_halving(cut) for cut, _ in each]))
            mean = [sum(k * share for k, share in enumerate(p.carried)) for _, p in each if p]
            rows.append(_line(f"{label}, length of the paths that carry the gradient", "blocks, mean", mean))
            rows.append(_line(f"{label}, half of its blocks", "blocks", [p.blocks / 2 for _, p in each if p]))
    for label, each in residual.items():
        claims += _of_one(label, each)
    for label, each in found.items():
        if label not in residual and residual:
            twin = min(residual, key=lambda other: abs(depths[other] - depths[label]))
            pairs = zip(each, residual[twin], strict=False)
            costs = [(_one(a) - a.whole) - (_one(b) - b.whole) for (a, _), (b, _) in pairs]
            claims.append(claim(f"Leaving out one block costs {label} more than {twin}", "points of test error", costs))
    deepest = max(residual or found, key=depths.__getitem__)
    cut, ways = found[deepest][0]

    def draw(path: Path) -> None:
        plots.save(plots.lesion(cut, deepest), path)
        if ways is not None:
            plots.save(plots.paths(ways, deepest), path.with_name(f"{path.stem}-effects.png"))

    captions = "Left: each bar is the net without one block. Middle: without several. Right: blocks exchanged."
    smaller = ("the paper takes 110 layers apart",) if depths[deepest] < 110 else ()
    second = "How many paths there are, and what they carry."
    return Measured(rows, claims, draw, smaller, captions, second, ", ".join(sorted(data)))


def _of_one(label: str, each: Sequence[tuple[Lesion, Paths | None]]) -> list[dict[str, Any]]:
    """Veit's findings of one network."""
    cuts, ways = [cut for cut, _ in each], [p for _, p in each if p is not None]
    return [
        claim(
            f"{label}: a block that halves the size is missed more than one that does not",
            "points of test error",
            [_halving(cut) - _one(cut) for cut in cuts],
        ),
        claim(
            f"{label}: the error grows with the number of blocks left out",
            "rank correlation",
            [_ranked([(k, statistics.fmean(errors)) for k, errors in cut.several.items()]) for cut in cuts],
        ),
        claim(
            f"{label}: the error grows as blocks are exchanged",
            "rank correlation with 1 - Kendall's tau",
            [_ranked([(1 - tau, error) for tau, error in cut.orders]) for cut in cuts],
        ),
        claim(
            f"{label}: a path's gradient falls with its length",
            "minus the rank correlation of length and norm",
            [-_ranked(list(enumerate(p.norm))) for p in ways],
        ),
        claim(
            f"{label}: the gradient comes by short paths, below half of the blocks",
            "blocks below half",
            [p.blocks / 2 - sum(k * share for k, share in enumerate(p.carried)) for p in ways],
        ),
    ]


def _one(cut: Lesion) -> float:
    """The median error without one block that keeps its shape."""
    return statistics.median(e for name, e in cut.single.items() if e is not None and name not in cut.resizing)


def _halving(cut: Lesion) -> float:
    errors = [e for name, e in cut.single.items() if e is not None and name in cut.resizing]
    return statistics.median(errors) if errors else cut.whole


def _ranked(points: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau of pairs, ties left out; 0 where there is nothing to compare."""
    signs = [
        1 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else -1
        for i, a in enumerate(points)
        for b in points[:i]
        if a[0] != b[0] and a[1] != b[1]
    ]
    return statistics.fmean(signs) if signs else 0.0


def measure_errors(models: Models, options: ExperimentOptions) -> Measured:
    """Test errors of models that are there, beside DRL Table 6."""
    rows, data = [], set()
    for label, seeds in models.items():
        card = read_card(seeds[0])
        published = PUBLISHED.get(card.net, spec(card.net).published.get("CIFAR-10")) if label.split(" (")[0] == card.net else None
        options.say(f"testing {label}")
        results = [evaluate(path, _data(path, options), device=options.device) for path in seeds]
        data |= {each["data"] for each in results}
        on_cifar = all(each["data"] == "cifar10" for each in results)
        row = Comparison(f"{label}, test error", label, published)
        rows.append(compare_to_paper(row, [each["top1_error"] for each in results], on_cifar))
    given = ("the models are given: how they were trained is their authors' word",)
    return Measured(rows, deviations=given, data=", ".join(sorted(data)))


def _responses(data: Dataset, scale: Scale) -> Plan:
    names = ("plain20", "plain56", "resnet20", "resnet56", *(("resnet110",) if scale == "paper" else ()))
    plan = figure1(data, scale)
    return Plan(nets_for(data, scale, *names), seeds=plan.seeds, deviations=plan.deviations, analyze=measure_responses)


def _lesions(data: Dataset, scale: Scale) -> Plan:
    names = ("resnet110",) if scale == "paper" else ("plain56", "resnet56")
    plan = figure1(data, scale)
    return Plan(nets_for(data, scale, *names), seeds=plan.seeds, deviations=plan.deviations, analyze=measure_lesions)


def _errors(data: Dataset, scale: Scale) -> Plan:
    return Plan(analyze=measure_errors)


EXPERIMENTS = (
    Experiment(
        "figure7",
        "Layers of residual nets respond less",
        "DRL, Figure 7",
        "The standard deviation of each 3x3 layer's output. If shortcuts carry the signal, a block only has to add a little: "
        "residual nets should respond less than plain ones, and the deeper ones less than the shallower ones.",
        scales(_responses),
    ),
    Experiment(
        "veit",
        "A residual net is many paths, and few of them matter",
        "Veit et al., Figures 3 to 6",
        "A residual net is cut open: one block is left out, then several, then blocks change places. A plain net falls to chance "
        "when one layer goes; a residual net of many blocks hardly notices, because half of its paths do not pass there.",
        scales(_lesions),
    ),
    Experiment(
        "models",
        "Models that are there, tested",
        "DRL, Table 6",
        "The test errors of given model files beside those of the paper's nets of the same depth.",
        scales(_errors, "paper"),
    ),
)
