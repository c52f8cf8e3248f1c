"""Tests of given models with the paper's protocols: 10-crop, multi-scale (DRL Tables 3 and 4) and ensembles (Table 5)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reslearn.analysis.subject import trained_on
from reslearn.classify.evaluate import evaluate
from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.nets.zoo import TEN_CROP, TEN_CROP_5
from reslearn.reproduce.anatomy import GIVEN, claim
from reslearn.reproduce.experiment import Comparison, ExperimentOptions, Measured, Models
from reslearn.reproduce.verdicts import compare_to_paper
from reslearn.weights.store import Card, read_card

Errors = tuple[float | None, float | None]  # top-1 and top-5, percent

# DRL Table 3 for shortcuts that the zoo's rows do not have; top-1, top-5, 10-crop
TEN_CROPS: dict[tuple[str, str], Errors] = {
    ("resnet18", "A"): (27.88, None),  # Table 2
    ("resnet34", "A"): (25.03, 7.76),
    ("resnet34", "C"): (24.19, 7.40),
}
# DRL Table 4; top-1, top-5, multi-scale
MULTI_SCALE: dict[tuple[str, str], Errors] = {
    ("resnet34", "B"): (21.84, 5.71),
    ("resnet34", "C"): (21.53, 5.60),
    ("resnet50", "B"): (20.74, 5.25),
    ("resnet101", "B"): (19.87, 4.60),
    ("resnet152", "B"): (19.38, 4.49),
}
ENSEMBLE_TOP5 = 3.57  # DRL Table 5: six models, on the test set


def published(card: Card) -> tuple[Errors, Errors]:
    """The paper's 10-crop and multi-scale errors of a network; None where it prints none."""
    row = spec(card.net)
    options = dict(card.options)
    shortcut = str(options.pop("shortcut", row.shortcut))[0]  # A-centered counts as A
    for harmless in ("pool", "zero_init_last_gamma"):  # Caffe's rounding and the initialization
        options.pop(harmless, None)
    if options:
        return (None, None), (None, None)
    own = (row.published.get(TEN_CROP), row.published.get(TEN_CROP_5)) if shortcut == row.shortcut[0] else (None, None)
    key = (card.net, shortcut)
    return TEN_CROPS.get(key, own), MULTI_SCALE.get(key, (None, None))


def is_imagenet_validation(result: Mapping[str, Any]) -> bool:
    """Whether the numbers are from all of ImageNet's validation images: 1000 classes with 50 images each."""
    return len(result["per_class"]) == 1000 and all(row["n"] == 50 for row in result["per_class"])


def _data(model: Path, options: ExperimentOptions) -> str:
    """The given data set, else the one that the model was trained on."""
    data = options.data or trained_on(model, read_card(model))
    if data is None:
        raise UserError(f"{model} does not record its training data: pass ImageNet's validation images with --data")
    return data


def measure_single(models: Models, options: ExperimentOptions) -> Measured:
    """DRL Table 4, and the 10-crop errors of the same networks (Table 3)."""
    rows, data = [], set()
    for column, (protocol, name) in enumerate((("10crop", "10-crop"), ("multiscale", "multi-scale"))):
        for label, files in models.items():
            options.say(f"testing {label}: {name}")
            results = [evaluate(f, _data(f, options), device=options.device, protocol=protocol) for f in files]
            comparable = all(map(is_imagenet_validation, results))
            errors = published(read_card(files[0]))[column]
            for key, top, error in zip(("top1_error", "top5_error"), ("top-1", "top-5"), errors, strict=True):
                if key in results[0]:
                    row = Comparison(f"{label}, {top}, {name}", label, error)
                    rows.append(compare_to_paper(row, [result[key] for result in results], comparable))
            data |= {result["data"] for result in results}
    return Measured(rows, deviations=(GIVEN,), data=", ".join(sorted(data)))


def measure_ensemble(models: Models, options: ExperimentOptions) -> Measured:
    """DRL Table 5: the mean of the multi-scale scores of all models."""
    named = [(f"{label} ({f})" if len(files) > 1 else label, f) for label, files in models.items() for f in files]
    files = [file for _, file in named]
    if len(files) < 2:
        raise UserError("table5 measures an ensemble: pass several models, each with --model")
    options.say(f"testing an ensemble of {len(files)} models: multi-scale")
    result = evaluate(files, _data(files[0], options), device=options.device, protocol="multiscale")
    rows, claims = [], []
    for key, top, number in (("top1_error", "top-1", None), ("top5_error", "top-5", ENSEMBLE_TOP5)):
        if key not in result:
            continue
        single = [member[key] for member in result["members"]]
        for (name, _), error in zip(named, single, strict=True):
            rows.append(compare_to_paper(Comparison(f"{name}, {top}", name), [error], False))
        row = Comparison(f"ensemble of {len(files)} models, {top}", "ensemble", number)
        rows.append(compare_to_paper(row, [result[key]], False))
        better = claim(f"The ensemble has a lower {top} error than its best model", "points", [min(single) - result[key]])
        claims.append(better | {"detail": "measured once"})
    other = "the paper's number is for six models on ImageNet's test set, whose labels are not public"
    return Measured(rows, claims, deviations=(GIVEN, other), data=result["data"])
