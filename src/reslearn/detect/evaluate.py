"""Evaluates detectors on a set with boxes: detections, times and metrics."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reslearn.data.boxes.box_set import Bad, BadBoxes, BoxImage, BoxSet
from reslearn.data.boxes.masks import draw, runs_of
from reslearn.data.boxes.read import named_images, open_boxes, split_names
from reslearn.data.boxes.source import to_tensor as tensor
from reslearn.data.images.files import read
from reslearn.detect.detector import Detector
from reslearn.detect.improvements import detect
from reslearn.detect.settings import too_thin
from reslearn.detect.store import load_detector
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.evaluation.average_precision import detection_metrics
from reslearn.evaluation.detection_errors import count_mistakes, mistakes
from reslearn.evaluation.matching import Matches, match
from reslearn.progress import Progress, silent
from reslearn.training.folder import read_held_out


@dataclass(frozen=True, eq=False)
class TestOptions:
    """How to run inference: one detector or an ensemble, and the test-time improvements of `detect`."""

    models: tuple[Detector, ...]
    refinement: bool = False
    scales: tuple[int, ...] = ()

    def problem(self, height: int, width: int) -> str | None:
        """Why an image of this size, in pixels, is not supported; None if it is."""
        return next((error for model in self.models if (error := too_thin(model.settings, height, width, self.scales))), None)

    @property
    def channels(self) -> int:
        """Channels of the images. Raises UserError if the detectors differ."""
        counts = {len(model.transform.image_mean) for model in self.models}  # type: ignore[arg-type]
        if len(counts) > 1:
            raise UserError("the detectors of an ensemble must all take gray images or all take color images")
        return counts.pop()


@dataclass(frozen=True, eq=False)
class Predictions:
    """The detections of one TestOptions on a set.

    detections: for each image, in order, a dict of `boxes` float64 (N, 4), `labels` int64 (N,) from 1, `scores` float64 (N,),
    best first, and, from Mask R-CNN, `masks`, N Runs. seconds: median time per image, from pixels in memory to boxes.
    """

    detections: list[dict[str, Any]]
    seconds: float


def open_detectors(paths: Sequence[str | Path], device: str = "auto") -> tuple[Detector, ...]:
    """Loads detectors from model files or run folders. Raises UserError if their classes differ."""
    on = pick_device(device)
    models = tuple(load_detector(path, on) for path in paths)
    for path, model in zip(paths, models, strict=True):
        if model.classes != models[0].classes:
            one, other = (", ".join(detector.classes) for detector in (models[0], model))
            raise UserError(f"{paths[0]} and {path} have different classes: {one}; and {other}")
    return models


def _fact(model: str | Path, *keys: str) -> Any:
    """The value of a run folder's recipe.json at these nested keys; None for a model file or a missing key."""
    try:
        value = json.loads((Path(model) / "recipe.json").read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value


def _trained_on(model: str | Path, data: str | Path) -> bool:
    """Whether a run folder's data set is this one."""
    return _fact(model, "source") == str(Path(data).expanduser().absolute())


def run_policy(model: str | Path) -> Bad | None:
    """A run folder's policy for invalid boxes, "fail" or "drop"; None for a model file."""
    policy = _fact(model, "recipe", "data", "bad")
    return policy if policy in ("fail", "drop") else None


def run_held_out(model: str | Path, data: str | Path) -> list[str]:
    """Names of the images that a run held out of this data set; empty for a model file or another data set."""
    return read_held_out(Path(model)).get("val", []) if _trained_on(model, data) else []


def run_trained_on(model: str | Path, data: str | Path, images: Sequence[BoxImage]) -> set[int]:
    """Indices of those images of a data set that a run was trained on; empty for a model file or another data set."""
    train = _fact(model, "recipe", "data", "train")
    if train is None or not _trained_on(model, data):
        return set()
    try:
        trained = named_images(data, "all" if "all" in split_names(data) else train, [image.path for image in images])
    except UserError:  # the split's list no longer exists
        return set()
    held_out = set(run_held_out(model, data))
    files = [image.path.with_suffix("") if image.id is None else image.path for image in images]  # VOC's lists have no suffixes
    return {i for i, image in enumerate(images) if files[i] in trained and image.name not in held_out}


def open_split(
    data: str | Path, classes: Sequence[str], split: str | None = None, bad: Bad = "fail", held_out: Sequence[str] = ()
) -> BoxSet:
    """Opens one split, labeled with a detector's `classes`: by default test, otherwise val, all or train.

    held_out: names of the images that serve as val if the set has no val split (see run_held_out).
    Raises UserError for a missing split or an unknown class, BadBoxes for other faults.
    """
    names = split_names(data)
    whole = next((name for name in ("all", "train") if name in names), None) if held_out and "val" not in names else None
    if split is None:
        split = next(name for name in ("test", "val", "all", "train") if name in names or (name == "val" and whole))
    try:
        if split != "val" or whole is None:
            return open_boxes(data, bad=bad, classes=classes, only=[split])[split]
        images = open_boxes(data, bad=bad, classes=classes, only=[whole])[whole]
        chosen = tuple(image for image in images.images if image.name in set(held_out))
        return replace(images, name=f"{images.name}, held out", images=chosen)
    except BadBoxes as error:
        if unknown := [finding for finding in error.findings if finding.kind == "unknown class"]:
            count = f"{len(unknown)} objects of unknown classes" if len(unknown) > 1 else "unknown class"
            raise UserError(f"{data}: {count}: {unknown[0]}; the detector's classes are {', '.join(classes)}") from error
        raise


def predict(options: TestOptions, image: torch.Tensor) -> dict[str, Any]:
    """The detections in one image, float (C, H, W) on [0, 1], as in Predictions."""
    device = next(options.models[0].parameters()).device
    return as_arrays(detect(options.models, [image.to(device)], refinement=options.refinement, scales=options.scales)[0])


def as_arrays(detections: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A detector's output for one image as arrays on the CPU; masks run-length encoded, since 100 masks of a photo take 30 MB."""
    arrays: dict[str, Any] = {
        "boxes": detections["boxes"].double().cpu().numpy(),
        "labels": detections["labels"].cpu().numpy(),
        "scores": detections["scores"].double().cpu().numpy(),
    }
    if "masks" in detections:
        arrays["masks"] = tuple(runs_of(mask) for mask in (detections["masks"][:, 0] > 0.5).cpu().numpy())
    return arrays


def find(images: Sequence[BoxImage], tests: Sequence[TestOptions], progress: Progress = silent) -> list[Predictions]:
    """Runs every test on the images. All process one image before the next, so that their times are comparable.

    Raises UserError for an unreadable or unsupported image, and as `detect` does.
    """
    detections: list[list[dict[str, Any]]] = [[] for _ in tests]
    seconds: list[list[float]] = [[] for _ in tests]
    for done, image in enumerate(images, 1):
        if error := next((error for test in tests if (error := test.problem(image.height, image.width))), None):
            raise UserError(f"{image.path}: {error}")
        views = {count: tensor(read(image.path, count)) for count in {test.channels for test in tests}}
        for i, test in enumerate(tests):
            start = time.perf_counter()
            detections[i].append(predict(test, views[test.channels]))
            seconds[i].append(time.perf_counter() - start)
        progress("images", done, len(images))
    return [Predictions(by_image, float(np.median(times))) for by_image, times in zip(detections, seconds, strict=True)]


def matches(detections: Sequence[dict[str, Any]], data: BoxSet, *, masks: bool = False) -> Matches:
    """Matches detections (see Predictions) with the objects of the set, by boxes or by masks."""
    return match([image.objects for image in data.images], _decoded(detections, data, masks), data.classes, masks=masks)


def _decoded(detections: Sequence[dict[str, Any]], data: BoxSet, masks: bool) -> Iterator[dict[str, Any]]:
    for by_image, image in zip(detections, data.images, strict=True):
        arrays = {key: by_image[key] for key in ("boxes", "labels", "scores")}
        if masks:
            decoded = [draw(mask, image.height, image.width) for mask in by_image["masks"]]
            arrays["masks"] = np.stack(decoded) if decoded else np.zeros((0, image.height, image.width), bool)
        yield arrays


def numbers(predictions: Predictions, data: BoxSet) -> dict[str, Any]:
    """All results, ready for JSON: detection_metrics and `mistakes` by kind, for boxes; `masks`, the metrics of masks, if all
    detections and objects have masks; `left_out`, the set's faults by kind; and `seconds_per_image`.
    """
    boxes = matches(predictions.detections, data)
    result = {"data": data.name, **detection_metrics(boxes), "mistakes": count_mistakes(mistakes(boxes))}
    objects = [image.objects for image in data.images if len(image.objects)]
    outlined = all(one.segmentations is not None and None not in one.segmentations for one in objects)
    if outlined and all("masks" in by_image for by_image in predictions.detections):
        result["masks"] = detection_metrics(matches(predictions.detections, data, masks=True))
    return result | {"left_out": data.faults(), "seconds_per_image": predictions.seconds}
