"""Given models under the paper's tests: ten crops and several scales (DRL Tables 3 and 4), and ensembles (Table 5)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reslearn.analysis.subject import trained_on
from reslearn.classify.evaluate import evaluate
from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.nets.zoo import TEN_CROP, TEN_CROP_5
from reslearn.reproduce.anatomy import claim
from reslearn.reproduce.experiment import Comparison, ExperimentOptions, Measured, Models
from reslearn.reproduce.verdicts import compare_to_paper
from reslearn.weights.store import Card, read_card

Errors = tuple[float | None, float | None]  # top-1 and top-5, percent

# DRL Table 3, where it is of other shortcuts than the zoo's rows; top-1, top-5, 10-crop
TEN_CROPS: dict[tuple[str, str], Errors] = {
    ("resnet18", "A"): (27.88, None),  # Table 2
    ("resnet34", "A"): (25.03, 7.76),
    ("resnet34", "C"): (24.19, 7.40),
}
# DRL Table 4; top-1, top-5, several scales
MANY_SCALES: dict[tuple[str, str], Errors] = {
    ("resnet34", "B"): (21.84, 5.71),
    ("resnet34", "C"): (21.53, 5.60),
    ("resnet50", "B"): (20.74, 5.25),
    ("resnet101", "B"): (19.87, 4.60),
    ("resnet152", "B"): (19.38, 4.49),
}
ENSEMBLE_TOP5 = 3.57  # DRL Table 5: six models, on the test set
GIVEN = "the models are given: how they were trained is their authors' word"


def published(card: Card) -> tuple[Errors, Errors]:
    """What the paper prints of a network: 10-crop and several scales; None where it prints nothing of this one."""
    row = spec(card.net)
    options = dict(card.options)
    shortcut = str(options.pop("shortcut", row.shortcut))[0]  # A-centered is an A
    for harmless in ("pool", "zero_init_last_gamma"):  # Caffe's rounding, and how it began
        options.pop(harmless, None)
    if options:
        return (None, None), (None, None)
    own = (row.published.get(TEN_CROP), row.published.get(TEN_CROP_5)) if shortcut == row.shortcut[0] else (None, None)
    key = (card.net, shortcut)
    return TEN_CROPS.get(key, own), MANY_SCALES.get(key, (None, None))


def is_imagenet_validation(result: Mapping[str, Any]) -> bool:
    """Whether numbers are of all of ImageNet's validation images: 1000 classes of 50."""
    return len(result["per_class"]) == 1000 and all(one["n"] == 50 for one in result["per_class"])


def _tested(models: Models, options: ExperimentOptions, protocol: str) -> Iterator[tuple[str, Card, list[dict[str, Any]]]]:
    for label, files in models.items():
        options.say(f"testing {label}: {protocol}")
        yield label, read_card(files[0]), [evaluate(f, _data(f, options), device=options.device, protocol=protocol) for f in files]


def _data(model: Path, options: ExperimentOptions) -> str:
    """What is asked for, else what the model was trained on."""
    given = options.data or trained_on(model, read_card(model))
    if given is None:
        raise UserError(f"{model} does not say which images it was trained on: give ImageNet's validation images with --data")
    return given


def measure_single(models: Models, options: ExperimentOptions) -> Measured:
    """DRL Table 4, and the 10-crop numbers of the same networks (Table 3)."""
    rows, data = [], set()
    for protocol, place, says in (("10crop", 0, "10-crop"), ("multiscale", 1, "several scales")):
        for label, card, results in _tested(models, options, protocol):
            comparable = all(map(is_imagenet_validation, results))
            for key, what, number in zip(("top1_error", "top5_error"), ("top-1", "top-5"), published(card)[place], strict=True):
                if key in results[0]:
                    row = Comparison(f"{label}, {what}, {says}", label, number)
                    rows.append(compare_to_paper(row, [result[key] for result in results], comparable))
            data |= {result["data"] for result in results}
    return Measured(rows, deviations=(GIVEN,), data=", ".join(sorted(data)))


def measure_ensemble(models: Models, options: ExperimentOptions) -> Measured:
    """DRL Table 5: the mean of the scores of all models, at several scales each."""
    files = [file for each in models.values() for file in each]
    if len(files) < 2:
        raise UserError("table5 is of ensembles: give several models, each with --model")
    options.say(f"testing {len(files)} models together: multiscale")
    result = evaluate(files, _data(files[0], options), device=options.device, protocol="multiscale")
    names = [f"{label} ({file})" if len(each) > 1 else label for label, each in models.items() for file in each]
    rows, claims = [], []
    for key, what, number in (("top1_error", "top-1", None), ("top5_error", "top-5", ENSEMBLE_TOP5)):
        if key not in result:
            continue
        alone = [member[key] for member in result["members"]]
        for name, error in zip(names, alone, strict=True):
            rows.append(compare_to_paper(Comparison(f"{name} alone, {what}", name), [error], False))
        rows.append(compare_to_paper(Comparison(f"{len(files)} models together, {what}", "ensemble", number), [result[key]], False))
        better = claim(f"Together they err less than the best of them, {what}", "points", [min(alone) - result[key]])
        claims.append(better | {"detail": "measured once"})
    other = "the paper's number is of six models on ImageNet's test set, whose labels are not public"
    return Measured(rows, claims, deviations=(GIVEN, other), data=result["data"])
