"""Localization (DRL Tables 13 and 14): boxes for each class and R-CNN on them, on windows of one object cut out of photos."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.boxes.read import open_boxes
from reslearn.device import pick_device
from reslearn.errors import Interrupted, UserError
from reslearn.files import write_atomic
from reslearn.localize import load_localizer
from reslearn.localize import refine as refining
from reslearn.localize.crops import cut_out
from reslearn.localize.evaluate import classify, views, wrong
from reslearn.localize.refine import resume as resume_refining
from reslearn.localize.train import resume as resume_boxes
from reslearn.localize.train import train as train_boxes
from reslearn.localize.views import Single, of_one_kind
from reslearn.reproduce import plots
from reslearn.reproduce.experiment import Dataset, Experiment, Measured, Plan, Scale, Work, scales
from reslearn.reproduce.judge import DIFFERS, HOLDS, NOT_COMPARABLE, UNDECIDED, spread
from reslearn.reproduce.runs import open_data
from reslearn.training import resume as resume_classes
from reslearn.training import train as train_classes

NET = "resnet18"
RESAMPLES = 10_000  # of the bootstrap
METRIC = "localization error, %"


@dataclass(frozen=True)
class How:
    """The trainings of a seed, one on the other: the classes of windows, boxes for each, R-CNN on these; and how they are tested.

    per_class, tested: windows, as cut_out's. dense: shorter sides in px.
    """

    per_class: int
    tested: int
    classes: tuple[str, ...]
    boxes: Mapping[str, Any] = field(hash=False)
    regions: Mapping[str, Any] = field(hash=False)
    dense: tuple[int, ...]


def _schedule(lr: float, **length: float) -> dict[str, Any]:
    return {"lr": lr, "shape": "cosine", "warmup": 0.05, **length}


HOW: dict[Scale, How] = {
    "small": How(
        600,
        100,
        ("data.size=96", "data.crop_ratio=0.875", "batch.size=32", "schedule.epochs=4"),
        {"size": 96, "batch": 32, "schedule": _schedule(0.03, epochs=4)},
        {"proposals": 32, "batch": 32, "schedule": _schedule(0.01, epochs=3)},
        (110,),  # that of the proposals which R-CNN learns from
    ),
    "smoke": How(
        6,
        2,
        ("data.size=64", "batch.size=6", "schedule.steps=2", "log.every=1"),
        {"size": 64, "batch": 6, "schedule": _schedule(0.01, steps=2)},
        {"proposals": 4, "batch": 6, "schedule": _schedule(0.01, steps=2)},
        (64, 72),
    ),
}


def _trained(work: Work, how: How) -> tuple[Path, list[Path]]:
    """The windows and the folder of each seed, with runs `classes`, `boxes` and `regions`; what has begun goes on."""
    data = open_data(work.source, "detect")
    facts = {"data": data.fingerprint(), "net": NET, "how": asdict(how)}
    root = work.out / "runs" / f"localize-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]}"
    windows, seeds = root / "windows", [root / f"seed-{seed}" for seed in range(work.seeds)]
    if not work.training:
        if not all((folder / "regions" / "result.json").exists() for folder in seeds):
            raise UserError(f"not all of its networks have been trained in {work.out} yet: leave --no-train out")
        return windows, seeds
    if not windows.exists():
        root.mkdir(parents=True, exist_ok=True)
        cut_out(data.path, windows, per_class=how.per_class, tested=how.tested, bad="drop")  # type: ignore[union-attr]
    quiet = {"device": work.device, "say": lambda line: None}
    for seed, folder in enumerate(seeds):
        classes, boxes, regions = (folder / name for name in ("classes", "boxes", "regions"))
        begin: dict[Path, tuple[Callable[[], Any], Callable[[], Any], str]] = {
            classes: (
                partial(train_classes, str(windows), NET, None, how.classes, seed, classes, work.device, True),
                partial(resume_classes, classes, work.device, True),
                "recipe.json",
            ),
            boxes: (
                partial(train_boxes, windows, boxes, init=str(classes), seed=seed, **quiet, **how.boxes),
                partial(resume_boxes, boxes, **quiet),
                "localize.json",
            ),
            regions: (
                partial(refining, boxes, windows, regions, seed=seed, **quiet, **how.regions),
                partial(resume_refining, regions, **quiet),
                "localize.json",
            ),
        }
        for run, (start, go_on, begun) in begin.items():
            if (run / "result.json").exists():
                continue
            work.say(f"training {run.name}, seed {seed}")
            try:
                go_on() if (run / begun).exists() else start()
            except Interrupted as signal:
                raise Interrupted(signal.number) from None
    return windows, seeds


@dataclass(frozen=True)
class Answers:
    """One seed on the test windows. said: scores of the classes (N, K), summing to 1. The rest is by view, as views() gives it."""

    said: np.ndarray
    orders: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    boxes: Mapping[str, np.ndarray]


VIEWS = ("1-crop", "dense", "refined")


def _tested(work: Work, how: How) -> tuple[Single, list[Answers]]:
    """The truth of the test windows, and each seed on them; what has been looked at once is kept."""
    windows, seeds = _trained(work, how)
    data = open_boxes(windows, only=["test"])["test"]
    truth, found = of_one_kind(data), []
    for seed, folder in enumerate(seeds):
        kept = folder / "test.npz"
        if not kept.exists():
            work.say(f"testing seed {seed}")
            on = pick_device(work.device)
            said = classify(folder / "classes", data, on)
            said = np.exp(said - said.max(1, keepdims=True))
            said /= said.sum(1, keepdims=True)
            seen = views(load_localizer(folder / "regions", on), data, truth.labels, how.dense, said)
            parts = {f"{name} {part}": getattr(view, part) for name, view in seen.items() for part in view._fields}
            write_atomic(kept, lambda path, said=said, parts=parts: _save(path, {"said": said, **parts}))
        with np.load(kept) as arrays:
            parts = [{view: arrays[f"{view} {part}"] for view in VIEWS} for part in ("order", "scores", "boxes")]
            found.append(Answers(arrays["said"], *parts))
    return truth, found


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _row(what: str, published: float | None, values: Sequence[np.ndarray] = ()) -> dict[str, Any]:
    """values: which images are wrong, of each seed."""
    ours = spread([100 * float(each.mean()) for each in values]) if values else None
    verdict = NOT_COMPARABLE if values and published is not None else ""
    return {"what": what, "metric": METRIC, "published": published, "ours": ours, "difference": None, "verdict": verdict}


def _claim(text: str, before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> dict[str, Any]:
    """That fewer images are wrong after than before: the mean over the seeds, its interval paired over the images."""
    each = 100 * np.stack([b.astype(float) - a.astype(float) for b, a in zip(before, after, strict=True)])  # (seeds, N)
    per_image, n = each.mean(0), each.shape[1]
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    low, high = np.percentile(per_image[drawn].mean(1), [2.5, 97.5]).tolist()
    values = each.mean(1).tolist()
    effect = spread(values) | {"interval": [low, high]}
    verdict = HOLDS if low > 0 else DIFFERS if high < 0 else UNDECIDED
    disagree = [seed for seed, value in enumerate(values) if value * effect["mean"] <= 0]
    return {"text": text, "metric": METRIC, "effect": effect, "verdict": verdict, "disagree": disagree}


def measure_views(how: How, work: Work) -> Measured:
    """DRL Table 13."""
    truth, seeds = _tested(work, how)
    judged = {view: [wrong(each.orders[view], each.boxes[view], truth) for each in seeds] for view in VIEWS}

    def of(view: str, key: str) -> list[np.ndarray]:
        return [each[key] for each in judged[view]]

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
    return _measured(rows, claims, work, len(truth.labels))


def measure_ensemble(how: How, work: Work) -> Measured:
    """DRL Table 14: the mean of the members' class scores, and for each class the box that any member scores highest."""
    if work.seeds < 2:
        raise UserError("table14 is of networks together: give --seeds 2 or more")
    truth, seeds = _tested(work, how)
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
    return _measured(rows, claims, work, len(truth.labels))


def _measured(rows: list[dict[str, Any]], claims: list[dict[str, Any]], work: Work, images: int) -> Measured:
    data = open_data(work.source, "detect")
    caption = f"Differences in images that are wrong, mean over the seeds; intervals are paired over the {images} test images."
    return Measured(rows, claims, lambda path: plots.effects(claims, path), caption=caption, data=data.name)


def _plan(measure: Callable[[How, Work], Measured], data: Dataset, scale: Scale) -> Plan:
    how = HOW[scale]
    small = f"windows of one object, of {how.per_class} a class for training, at {how.boxes['size']} px, not photos at 224 px"
    return Plan(
        seeds=2,
        work=partial(measure, how),
        deviations=(
            f"the data set is small: {small}; a few classes of blood cells (BCCD), not 1000 of ImageNet; ResNet-18, not ResNet-101",
            "one class is guessed where the paper guesses five: there are no more than five",
            f"dense: shorter side {', '.join(map(str, how.dense))} px, not several",
            f"R-CNN judges the best {how.regions['proposals']} boxes of an image, not 200; it begins as the convolutions of the "
            "boxes' network",
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
