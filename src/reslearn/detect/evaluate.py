"""Detectors on a set with boxes: what they find in each image, how long it takes, and the numbers that come of it."""

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
    """How to look at images: with one detector or several as an ensemble, and with which of the improvements of `detect`."""

    models: tuple[Detector, ...]
    refinement: bool = False
    scales: tuple[int, ...] = ()

    def refuses(self, height: int, width: int) -> str | None:
        """Why an image of these pixels cannot be looked at, if it cannot."""
        return next((why for model in self.models if (why := too_thin(model.settings, height, width, self.scales))), None)

    @property
    def channels(self) -> int:
        """Of the images. Raises UserError where the detectors do not agree."""
        counts = {len(model.transform.image_mean) for model in self.models}  # type: ignore[arg-type]
        if len(counts) > 1:
            raise UserError("an ensemble's detectors all look at gray images, or all at colored ones")
        return counts.pop()


@dataclass(frozen=True, eq=False)
class Found:
    """What one way found: of each image, in order, a dict of `boxes` float64 (N, 4), `labels` int64 (N,) from 1, `scores`
    float64 (N,), best first, and, of detectors with masks, `masks`, N Runs; and the median of the `seconds` that an image
    took, from pixels in memory to boxes, without reading its file.
    """

    detections: list[dict[str, Any]]
    seconds: float


def open_detectors(paths: Sequence[str | Path], device: str = "auto") -> tuple[Detector, ...]:
    """The detectors of files or run folders, that know the same classes. Raises UserError."""
    on = pick_device(device)
    models = tuple(load_detector(path, on) for path in paths)
    for path, model in zip(paths, models, strict=True):
        if model.classes != models[0].classes:
            one, other = (", ".join(each.classes) for each in (models[0], model))
            raise UserError(f"{paths[0]} and {path} know different classes: {one}; and {other}")
    return models


def _fact(model: str | Path, *keys: str) -> Any:
    """What the recipe.json of a run, given as its folder, holds at these keys; None of a file, and where it holds nothing."""
    try:
        found = json.loads((Path(model) / "recipe.json").read_text(encoding="utf-8"))
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _of(model: str | Path, data: str | Path) -> bool:
    """Whether a run, given as its folder, is of this very set."""
    return _fact(model, "source") == str(Path(data).expanduser().absolute())


def run_policy(model: str | Path) -> Bad | None:
    """What a run, given as its folder, did with invalid boxes: "fail" or "drop"; None of a file."""
    policy = _fact(model, "recipe", "data", "bad")
    return policy if policy in ("fail", "drop") else None


def run_held_out(model: str | Path, data: str | Path) -> list[str]:
    """The names of the images that a run, given as its folder, held out of this very set; none of a file, or of another set."""
    return read_held_out(Path(model)).get("val", []) if _of(model, data) else []


def run_trained_on(model: str | Path, data: str | Path, images: Sequence[BoxImage]) -> set[int]:
    """Which of these images of a set a run, given as its folder, was trained on; none of a file, or of another set."""
    train = _fact(model, "recipe", "data", "train")
    if train is None or not _of(model, data):
        return set()
    try:
        trained = named_images(data, "all" if "all" in split_names(data) else train, [image.path for image in images])
    except UserError:  # the list it was trained on is there no more
        return set()
    held = set(run_held_out(model, data))
    files = [image.path.with_suffix("") if image.id is None else image.path for image in images]  # VOC's lists have no suffixes
    return {i for i, image in enumerate(images) if files[i] in trained and image.name not in held}


def open_split(
    data: str | Path, classes: Sequence[str], split: str | None = None, bad: Bad = "fail", held_out: Sequence[str] = ()
) -> BoxSet:
    """The images to look at, labeled as `classes` are, a detector's: of the split asked for, else test, else val, else all.

    held_out: names of images that are val where the set has no such split (see run_held_out): all others have been trained on.
    Raises UserError where there is no such split, or an object of a class that is none of these; BadBoxes for other faults.
    """
    there = split_names(data)
    whole = next((name for name in ("all", "train") if name in there), None) if held_out and "val" not in there else None
    if split is None:
        split = next(name for name in ("test", "val", "all", "train") if name in there or (name == "val" and whole))
    try:
        if split != "val" or whole is None:
            return open_boxes(data, bad=bad, classes=classes, only=[split])[split]
        every, those = open_boxes(data, bad=bad, classes=classes, only=[whole])[whole], set(held_out)
        return replace(every, name=f"{every.name}, held out", images=tuple(each for each in every.images if each.name in those))
    except BadBoxes as error:
        if unknown := [finding for finding in error.findings if finding.kind == "unknown class"]:
            known = ", ".join(classes)
            count = f"{len(unknown)} times a class" if len(unknown) > 1 else "a class"
            raise UserError(f"{data}: {count} that the detector does not know: {unknown[0]}; it knows {known}") from error
        raise


def tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, C) as detectors take it: float32 (C, H, W) on [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def look(way: TestOptions, image: torch.Tensor) -> dict[str, Any]:
    """What is found in one image, float (C, H, W) on [0, 1], as in Found."""
    device = next(way.models[0].parameters()).device
    return as_arrays(detect(way.models, [image.to(device)], refinement=way.refinement, scales=way.scales)[0])


def as_arrays(detections: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A detector's output for an image as Found keeps it: arrays on the CPU; masks as runs, as 100 masks of a photo are 30 MB."""
    arrays: dict[str, Any] = {
        "boxes": detections["boxes"].double().cpu().numpy(),
        "labels": detections["labels"].cpu().numpy(),
        "scores": detections["scores"].double().cpu().numpy(),
    }
    if "masks" in detections:
        arrays["masks"] = tuple(runs_of(mask) for mask in (detections["masks"][:, 0] > 0.5).cpu().numpy())
    return arrays


def find(images: Sequence[BoxImage], ways: Sequence[TestOptions], progress: Progress = silent) -> list[Found]:
    """What each way finds in the images. All look at one image before the next, so that their times can be compared.

    Raises UserError as `read` and `detect` do.
    """
    found: list[list[dict[str, Any]]] = [[] for _ in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for done, image in enumerate(images, 1):
        if why := next((why for way in ways if (why := way.refuses(image.height, image.width))), None):
            raise UserError(f"{image.path}: {why}")
        views = {count: tensor(read(image.path, count)) for count in {way.channels for way in ways}}
        for i, way in enumerate(ways):
            began = time.perf_counter()
            found[i].append(look(way, views[way.channels]))
            seconds[i].append(time.perf_counter() - began)
        progress("images", done, len(images))
    return [Found(own, float(np.median(times))) for own, times in zip(found, seconds, strict=True)]


def matches(detections: Sequence[dict[str, Any]], data: BoxSet, *, masks: bool = False) -> Matches:
    """Detections, as in Found, against the objects of the set, by boxes or by masks."""
    return match([image.objects for image in data.images], _drawn(detections, data, masks), data.classes, masks=masks)


def _drawn(detections: Sequence[dict[str, Any]], data: BoxSet, masks: bool) -> Iterator[dict[str, Any]]:
    for own, image in zip(detections, data.images, strict=True):
        plain = {key: own[key] for key in ("boxes", "labels", "scores")}
        if masks:
            drawn = [draw(mask, image.height, image.width) for mask in own["masks"]]
            plain["masks"] = np.stack(drawn) if drawn else np.zeros((0, image.height, image.width), bool)
        yield plain


def numbers(found: Found, data: BoxSet) -> dict[str, Any]:
    """Everything, ready for JSON: the numbers of detection_metrics and `mistakes` by kind, of boxes; with `masks`, those of masks,
    where detections and objects have them; `left_out`, the set's faults by kind; and `seconds_per_image`.
    """
    boxes = matches(found.detections, data)
    result = {"data": data.name, **detection_metrics(boxes), "mistakes": count_mistakes(mistakes(boxes))}
    outlined = all(
        image.objects.segmentations is not None and None not in image.objects.segmentations
        for image in data.images
        if len(image.objects)
    )
    if outlined and all("masks" in own for own in found.detections):
        result["masks"] = detection_metrics(matches(found.detections, data, masks=True))
    return result | {"left_out": data.faults(), "seconds_per_image": found.seconds}
