"""Localization (DRL Tables 13 and 14): per-class boxes refined by R-CNN, on windows with one object cut out of photos."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.boxes.read import open_boxes
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.files import write_atomic
from reslearn.localize.evaluate import classify, views, wrong
from reslearn.localize.net import load_localizer
from reslearn.localize.views import Single, of_one_kind
from reslearn.localize.windows import cut_out
from reslearn.reproduce import plots
from reslearn.reproduce.experiment import Dataset, ExperimentOptions, Measured, Plan, Scale, on_boxes
from reslearn.reproduce.runs import open_annotated
from reslearn.reproduce.verdicts import NOT_COMPARABLE, row, summarize, verdict
from reslearn.training import run
from reslearn.training.request import parse

NET = "resnet18"
RESAMPLES = 10_000  # of the bootstrap
METRIC = "localization error, %"


@dataclass(frozen=True)
class LocalizationSetup:
    """The three trainings of a seed, each initialized from the one before, and the test.

    per_class, tested: numbers of windows, see cut_out. classes, boxes, regions: settings of the classifier, of the per-class box
    regressor, and of R-CNN on its boxes. dense: shorter sides in px.
    """

    per_class: int
    tested: int
    classes: dict[str, Any]
    boxes: dict[str, Any]
    regions: dict[str, Any]
    dense: tuple[int, ...]


def _schedule(lr: float, **length: float) -> dict[str, Any]:
    return {"schedule": {"lr": lr, "shape": "cosine", "warmup": 0.05, **length}}


SETUPS: dict[Scale, LocalizationSetup] = {
    "small": LocalizationSetup(
        600,
        100,
        {"data": {"size": 96, "crop_ratio": 0.875}, "batch": {"size": 32}, "schedule": {"epochs": 4}},
        {"data": {"size": 96}, "batch": {"size": 32}, **_schedule(0.03, epochs=4)},
        {"localizer": {"proposals": 32}, "batch": {"size": 32}, **_schedule(0.01, epochs=3)},
        (110,),  # the scale of the proposals that R-CNN is trained on
    ),
    "smoke": LocalizationSetup(
        6,
        2,
        {"data": {"size": 64}, "batch": {"size": 6}, "schedule": {"steps": 2}, "log": {"every": 1}},
        {"data": {"size": 64}, "batch": {"size": 6}, **_schedule(0.01, steps=2)},
        {"localizer": {"proposals": 4}, "batch": {"size": 6}, **_schedule(0.01, steps=2)},
        (64, 72),
    ),
}


def _train(options: ExperimentOptions, setup: LocalizationSetup) -> tuple[Path, list[Path]]:
    """Trains what is missing. Returns the data set of windows, and each seed's folder of the runs `classes`, `boxes`, `regions`."""
    data = open_annotated(options.source)
    facts = {"data": data.fingerprint(), "net": NET, "setup": asdict(setup)}
    root = options.out / "runs" / f"localize-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]}"
    crops, seeds = root / "windows", [root / f"seed-{seed}" for seed in range(options.seeds)]
    if not options.training:
        if not all((folder / "regions" / "result.json").exists() for folder in seeds):
            raise UserError(f"not all networks of this experiment are trained in {options.out}: run without --no-train")
        return crops, seeds
    if not crops.exists():
        root.mkdir(parents=True, exist_ok=True)
        cut_out(data.path, crops, per_class=setup.per_class, tested=setup.tested, bad="drop")
    for seed, folder in enumerate(seeds):
        classes, boxes, regions = (folder / name for name in ("classes", "boxes", "regions"))
        request_of = partial(parse, crops, seed=seed, device=options.device, quiet=True)
        for request in (
            request_of(model=NET, settings=setup.classes, out=classes),
            request_of("localize-default", settings=setup.boxes, init=classes, out=boxes, task="localize"),
            request_of("localize-regions", settings=setup.regions, init=boxes, out=regions, task="localize"),
        ):
            out = request.out or folder
            if (out / "result.json").exists():
                continue
            options.say(f"training {out.name}, seed {seed}")
            run.resume(out, request.device, True) if (out / "recipe.json").exists() else run.train(request)
    return crops, seeds


@dataclass(frozen=True)
class SeedPredictions:
    """Predictions of one seed on the test images. probabilities: (N, K). The rest is by view, as returned by views()."""

    probabilities: np.ndarray
    orders: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    boxes: Mapping[str, np.ndarray]


VIEWS = ("1-crop", "dense", "refined")


def _predict(options: ExperimentOptions, setup: LocalizationSetup) -> tuple[Single, list[SeedPredictions]]:
    """Returns the ground truth of the test images and the predictions of each seed, which are cached in its folder."""
    crops, seeds = _train(options, setup)
    data = open_boxes(crops, only=["test"])["test"]
    truth, predictions = of_one_kind(data), []
    for seed, folder in enumerate(seeds):
        cache = folder / "test.npz"
        if not cache.exists():
            options.say(f"testing seed {seed}")
            device = pick_device(options.device)
            logits = classify(folder / "classes", data, device)
            probabilities = np.exp(logits - logits.max(1, keepdims=True))
            probabilities /= probabilities.sum(1, keepdims=True)
            by_view = views(load_localizer(folder / "regions", device), data, truth.labels, setup.dense, probabilities)
            arrays = {f"{name} {field}": getattr(view, field) for name, view in by_view.items() for field in view._fields}
            arrays["said"] = probabilities
            write_atomic(cache, lambda path, arrays=arrays: _save(path, arrays))
        with np.load(cache) as saved:
            fields = [{view: saved[f"{view} {field}"] for view in VIEWS} for field in ("order", "scores", "boxes")]
            predictions.append(SeedPredictions(saved["said"], *fields))
    return truth, predictions


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _row(what: str, published: float | None, values: Sequence[np.ndarray] = ()) -> dict[str, Any]:
    """A row of the result. values: which images are wrong, bool (N,) per seed."""
    errors = [100 * float(seed.mean()) for seed in values]
    return row(what, METRIC, errors, published, verdict=NOT_COMPARABLE if values and published is not None else "")


def _claim(text: str, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """A claim that fewer images are wrong after than before: mean over seeds, with a paired bootstrap interval over images."""
    gains = 100 * np.stack([b.astype(float) - a.astype(float) for b, a in zip(before, after, strict=True)])  # (seeds, N)
    per_image, n = gains.mean(0), gains.shape[1]
    samples = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    values = gains.mean(1).tolist()
    effect = summarize(values) | {"interval": np.percentile(per_image[samples].mean(1), [2.5, 97.5]).tolist()}
    disagree = [seed for seed, value in enumerate(values) if value * effect["mean"] <= 0]
    return {"text": text, "metric": METRIC, "effect": effect, "verdict": verdict(effect["interval"]), "disagree": disagree}


def measure_views(setup: LocalizationSetup, options: ExperimentOptions) -> Measured:
    """DRL Table 13."""
    truth, seeds = _predict(options, setup)
    mistakes = {view: [wrong(seed.orders[view], seed.boxes[view], truth) for seed in seeds] for view in VIEWS}

    def errors(view: str, key: str) -> list[np.ndarray]:
        return [seed[key] for seed in mistakes[view]]

    rows = [
        _row("VGG-16, 1 crop, true class given", 33.1),
        _row("Boxes, 1 crop, true class given", 13.3, errors("1-crop", "true_class")),
        _row("Boxes, dense, true class given", 11.7, errors("dense", "true_class")),
        _row("Boxes, dense, then R-CNN, true class given", None, errors("refined", "true_class")),
        _row("Boxes, dense, predicted class", 14.4, errors("dense", "top1")),
        _row("Boxes, dense, then R-CNN, predicted class", 10.6, errors("refined", "top1")),
        _row("Class only", 4.6, errors("refined", "classification")),
    ]
    dense, refined = errors("dense", "true_class"), errors("refined", "true_class")
    better = "R-CNN has a lower error than the boxes it refines"
    claims = [
        _claim("Dense testing has a lower error than one crop, true class given", errors("1-crop", "true_class"), dense),
        _claim(f"{better}, true class given", dense, refined),
        _claim(f"{better}, predicted class", errors("dense", "top1"), errors("refined", "top1")),
    ]
    return _measured(rows, claims, options, len(truth.labels))


def measure_ensemble(setup: LocalizationSetup, options: ExperimentOptions) -> Measured:
    """DRL Table 14: the mean of the models' class probabilities, and for each class the box with the highest score of any model."""
    if options.seeds < 2:
        raise UserError("table14 measures an ensemble: use --seeds 2 or more")
    truth, seeds = _predict(options, setup)
    order = np.argsort(-np.mean([seed.probabilities for seed in seeds], axis=0), axis=1, kind="stable")
    best = np.stack([seed.scores["refined"] for seed in seeds]).argmax(0)  # (N, K)
    boxes = np.take_along_axis(np.stack([seed.boxes["refined"] for seed in seeds]), best[None, ..., None], 0)[0]
    single = [wrong(seed.orders["refined"], seed.boxes["refined"], truth)["top1"] for seed in seeds]
    ensemble = wrong(order, boxes, truth)["top1"]
    rows = [
        _row("OverFeat (ILSVRC 2013), test", 29.9),
        _row("GoogLeNet (ILSVRC 2014), test", 26.7),
        _row("VGG (ILSVRC 2014), test", 25.3),
        _row("One network, val (ours: test)", 10.6, single),
        _row("Ensemble, val", 8.9),
        _row(f"Ensemble, test (ours: {len(seeds)} networks)", 9.0, [ensemble]),
    ]
    claims = [_claim("The ensemble has a lower error than one network", single, [ensemble] * len(single))]
    return _measured(rows, claims, options, len(truth.labels))


def _measured(rows: list[dict[str, Any]], claims: list[dict[str, Any]], options: ExperimentOptions, images: int) -> Measured:
    data = open_annotated(options.source).name
    caption = f"Differences in localization error, mean over seeds; intervals are paired over the {images} test images."
    return Measured(rows, claims, lambda path: plots.effects(claims, path), caption=caption, data=data)


def _plan(measure: Callable[[LocalizationSetup, ExperimentOptions], Measured], data: Dataset, scale: Scale) -> Plan:
    setup = SETUPS[scale]
    size, proposals = setup.boxes["data"]["size"], setup.regions["localizer"]["proposals"]
    windows = f"windows with one object ({setup.per_class} per class for training) at {size} px instead of photos at 224 px"
    return Plan(
        seeds=2,
        run=partial(measure, setup),
        deviations=(
            f"a small data set: {windows}; a few classes of blood cells (BCCD) instead of ImageNet's 1000",
            "ResNet-18 instead of ResNet-101",
            "top-1 instead of top-5 class predictions, because the data set has at most five classes",
            f"dense testing at a shorter side of {', '.join(map(str, setup.dense))} px instead of several scales",
            f"R-CNN on the best {proposals} boxes of an image instead of 200, initialized with the box network's convolutions",
            *(() if scale == "small" else ("two steps per training",)),
        ),
        minutes=15.0,
    )


SEE = (
    "A network predicts boxes for each class at every position of its last feature map, first on one crop, then densely on the "
    "whole image. R-CNN crops the best boxes, rescores them and refines them. An image counts as wrong unless a prediction has its "
    "class and an IoU of at least 0.5 with an object. The published numbers are for ImageNet with "
)
EXPERIMENTS = (
    on_boxes(
        "table13",
        "Localization: one crop, dense testing, and R-CNN on the boxes",
        "DRL, Table 13",
        SEE + "top-5 class predictions.",
        partial(_plan, measure_views),
    ),
    on_boxes(
        "table14",
        "Localization: ensembles",
        "DRL, Table 14",
        SEE + "top-5 class predictions, by the challenge winners. An ensemble averages the class scores and takes the best boxes.",
        partial(_plan, measure_ensemble),
    ),
)
