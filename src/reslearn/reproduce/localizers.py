"""Localization (DRL Tables 13 and 14): boxes for each class and R-CNN on them, on windows of one object cut out of photos."""

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
from reslearn.reproduce.experiment import Dataset, Experiment, ExperimentOptions, Measured, Plan, Scale, scales
from reslearn.reproduce.runs import open_annotated
from reslearn.reproduce.verdicts import NOT_COMPARABLE, summarize, verdict
from reslearn.training import run
from reslearn.training.request import parse

NET = "resnet18"
RESAMPLES = 10_000  # of the bootstrap
METRIC = "localization error, %"


@dataclass(frozen=True)
class LocalizationSetup:
    """The three trainings of a seed, each of which starts from the one before, and the test.

    per_class, tested: crops, as for cut_out. classes, boxes, regions: settings of a classification network of the crops, of a box
    regressor for each class, and of R-CNN on its boxes. dense: shorter sides in px.
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
        (110,),  # that of the proposals which R-CNN is trained on
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
    """The set of crops, and the folder of each seed with its runs `classes`, `boxes` and `regions`. Trains what is missing."""
    data = open_annotated(options.source)
    facts = {"data": data.fingerprint(), "net": NET, "setup": asdict(setup)}
    root = options.out / "runs" / f"localize-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]}"
    crops, seeds = root / "windows", [root / f"seed-{seed}" for seed in range(options.seeds)]
    if not options.training:
        if not all((folder / "regions" / "result.json").exists() for folder in seeds):
            raise UserError(f"not all of its networks have been trained in {options.out} yet: leave --no-train out")
        return crops, seeds
    if not crops.exists():
        root.mkdir(parents=True, exist_ok=True)
        cut_out(data.path, crops, per_class=setup.per_class, tested=setup.tested, bad="drop")
    for seed, folder in enumerate(seeds):
        classes, boxes, regions = (folder / name for name in ("classes", "boxes", "regions"))
        ask = partial(parse, crops, seed=seed, device=options.device, quiet=True)
        for request in (
            ask(model=NET, settings=setup.classes, out=classes),
            ask("localize-default", settings=setup.boxes, init=classes, out=boxes, task="localize"),
            ask("localize-regions", settings=setup.regions, init=boxes, out=regions, task="localize"),
        ):
            out = request.out or folder
            if (out / "result.json").exists():
                continue
            options.say(f"training {out.name}, seed {seed}")
            run.resume(out, request.device, True) if (out / "recipe.json").exists() else run.train(request)
    return crops, seeds


@dataclass(frozen=True)
class SeedPredictions:
    """Of one seed, for the test images. said: class scores (N, K), summing to 1. The rest is by view, as views() gives it."""

    said: np.ndarray
    orders: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    boxes: Mapping[str, np.ndarray]


VIEWS = ("1-crop", "dense", "refined")


def _predict(options: ExperimentOptions, setup: LocalizationSetup) -> tuple[Single, list[SeedPredictions]]:
    """The truth of the test images, and the predictions of each seed, which are kept beside its runs."""
    crops, seeds = _train(options, setup)
    data = open_boxes(crops, only=["test"])["test"]
    truth, predictions = of_one_kind(data), []
    for seed, folder in enumerate(seeds):
        kept = folder / "test.npz"
        if not kept.exists():
            options.say(f"testing seed {seed}")
            on = pick_device(options.device)
            said = classify(folder / "classes", data, on)
            said = np.exp(said - said.max(1, keepdims=True))
            said /= said.sum(1, keepdims=True)
            seen = views(load_localizer(folder / "regions", on), data, truth.labels, setup.dense, said)
            parts = {f"{name} {part}": getattr(view, part) for name, view in seen.items() for part in view._fields}
            write_atomic(kept, lambda path, said=said, parts=parts: _save(path, {"said": said, **parts}))
        with np.load(kept) as arrays:
            parts = [{view: arrays[f"{view} {part}"] for view in VIEWS} for part in ("order", "scores", "boxes")]
            predictions.append(SeedPredictions(arrays["said"], *parts))
    return truth, predictions


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _row(what: str, published: float | None, values: Sequence[np.ndarray] = ()) -> dict[str, Any]:
    """values: which images are wrong, of each seed."""
    ours = summarize([100 * float(each.mean()) for each in values]) if values else None
    outcome = NOT_COMPARABLE if values and published is not None else ""
    return {"what": what, "metric": METRIC, "published": published, "ours": ours, "difference": None, "verdict": outcome}


def _claim(text: str, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """That fewer images are wrong after than before: the mean over the seeds, its interval paired over the images."""
    each = 100 * np.stack([b.astype(float) - a.astype(float) for b, a in zip(before, after, strict=True)])  # (seeds, N)
    per_image, n = each.mean(0), each.shape[1]
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    values = each.mean(1).tolist()
    effect = summarize(values) | {"interval": np.percentile(per_image[drawn].mean(1), [2.5, 97.5]).tolist()}
    disagree = [seed for seed, value in enumerate(values) if value * effect["mean"] <= 0]
    return {"text": text, "metric": METRIC, "effect": effect, "verdict": verdict(effect["interval"]), "disagree": disagree}


def measure_views(setup: LocalizationSetup, options: ExperimentOptions) -> Measured:
    """DRL Table 13."""
    truth, seeds = _predict(options, setup)
    errors = {view: [wrong(each.orders[view], each.boxes[view], truth) for each in seeds] for view in VIEWS}

    def of(view: str, key: str) -> list[np.ndarray]:
        return [each[key] for each in errors[view]]

    rows = [
        _row("VGG-16, 1 crop, true class given", 33.1),
        _row("Boxes, 1 crop, true class given", 13.3, of("1-crop", "true_class")),
        _row("Boxes, dense, true class given", 11.7, of("dense", "true_class")),
        _row("Boxes, dense, then R-CNN, true class given", None, of("refined", "true_class")),
        _row("Boxes, dense, predicted class", 14.4, of("dense", "top1")),
        _row("Boxes, dense, then R-CNN, predicted class", 10.6, of("refined", "top1")),
        _row("The predicted class alone", 4.6, of("refined", "classification")),
    ]
    given, predicted = "true class given", "predicted class"
    claims = [
        _claim(f"Dense errs less than one crop, {given}", of("1-crop", "true_class"), of("dense", "true_class")),
        _claim(f"R-CNN errs less than the boxes it begins from, {given}", of("dense", "true_class"), of("refined", "true_class")),
        _claim(f"R-CNN errs less than the boxes it begins from, {predicted}", of("dense", "top1"), of("refined", "top1")),
    ]
    return _measured(rows, claims, options, len(truth.labels))


def measure_ensemble(setup: LocalizationSetup, options: ExperimentOptions) -> Measured:
    """DRL Table 14: the mean of the members' class scores, and for each class the box that any member scores highest."""
    if options.seeds < 2:
        raise UserError("table14 is of networks together: give --seeds 2 or more")
    truth, seeds = _predict(options, setup)
    order = np.argsort(-np.mean([each.said for each in seeds], axis=0), axis=1, kind="stable")
    best = np.stack([each.scores["refined"] for each in seeds]).argmax(0)  # (N, K)
    boxes = np.take_along_axis(np.stack([each.boxes["refined"] for each in seeds]), best[None, ..., None], 0)[0]
    alone = [wrong(each.orders["refined"], each.boxes["refined"], truth)["top1"] for each in seeds]
    together = wrong(order, boxes, truth)["top1"]
    rows = [
        _row("OverFeat (ILSVRC 2013), test", 29.9),
        _row("GoogLeNet (ILSVRC 2014), test", 26.7),
        _row("VGG (ILSVRC 2014), test", 25.3),
        _row("One network, val (ours: test)", 10.6, alone),
        _row("Networks together, val", 8.9),
        _row("Networks together, test", 9.0, [together]),
    ]
    rows[-1]["what"] += f" (ours: {len(seeds)})"
    claims = [_claim("Networks together err less than one", alone, [together] * len(alone))]
    return _measured(rows, claims, options, len(truth.labels))


def _measured(rows: list[dict[str, Any]], claims: list[dict[str, Any]], options: ExperimentOptions, images: int) -> Measured:
    data = open_annotated(options.source).name
    caption = f"Differences in images that are wrong, mean over the seeds; intervals are paired over the {images} test images."
    return Measured(rows, claims, lambda path: plots.effects(claims, path), caption=caption, data=data)


def _plan(measure: Callable[[LocalizationSetup, ExperimentOptions], Measured], data: Dataset, scale: Scale) -> Plan:
    setup = SETUPS[scale]
    size, proposals = setup.boxes["data"]["size"], setup.regions["localizer"]["proposals"]
    small = f"windows of one object, of {setup.per_class} a class for training, at {size} px, not photos at 224 px"
    return Plan(
        seeds=2,
        run=partial(measure, setup),
        deviations=(
            f"the data set is small: {small}; a few classes of blood cells (BCCD), not 1000 of ImageNet; ResNet-18, not ResNet-101",
            "one class is guessed where the paper guesses five: there are no more than five",
            f"dense: shorter side {', '.join(map(str, setup.dense))} px, not several",
            f"R-CNN judges the best {proposals} boxes of an image, not 200; it begins as the convolutions of the boxes' network",
            *(() if scale == "small" else ("two steps of each training",)),
        ),
        minutes=15.0,
    )


SEE = (
    "A classification network says for each class where it is (boxes at every place of its last map), first on one crop, then on "
    "the whole image; R-CNN cuts out the best boxes, scores them again and moves them. An image is wrong "
    "where no guess has its class and overlaps a true box by half. The published numbers are of ImageNet, "
)
EXPERIMENTS = (
    Experiment(
        "table13",
        "Localization: one crop, dense, and R-CNN on the boxes",
        "DRL, Table 13",
        SEE + "with five guesses where classes are predicted.",
        scales(partial(_plan, measure_views), "smoke", "small"),
        data="bccd",
        small_data=None,
        task="detect",
    ),
    Experiment(
        "table14",
        "Localization: networks together",
        "DRL, Table 14",
        SEE + "with five guesses, of the challenges' winners. Together: the mean of the class scores, and the best-scored box.",
        scales(partial(_plan, measure_ensemble), "smoke", "small"),
        data="bccd",
        small_data=None,
        task="detect",
    ),
)
