"""Examines sets with boxes: every annotation and image is read once, and anchors are fitted to the boxes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from reslearn.data.boxes.anchor_recall import C4, FPN, MIN_RECALL, SIDES, best_recall, sufficient_side, usual_recalls
from reslearn.data.boxes.box_set import BoxImage, BoxSet, box_areas
from reslearn.data.boxes.masks import extent
from reslearn.data.boxes.read import survey, unnamed_images
from reslearn.data.boxes.voc import list_file, lists, splits, unannotated, years
from reslearn.data.doctor.diagnosis import Diagnosis, ObjectStatistics
from reslearn.data.doctor.images import better_suffixes, image_findings, image_statistics, inspect_all, span, usable
from reslearn.data.doctor.inspection import inspect_file
from reslearn.data.findings import FEW, IMBALANCE, OUTLINE_IOU, SAME_IOU, Finding, in_order
from reslearn.data.images.folder import Entry
from reslearn.data.images.stream import Progress, silent
from reslearn.errors import UserError
from reslearn.files import user_path

AREAS = {"small": 32.0**2, "medium": 96.0**2, "large": np.inf}
"""COCO's sizes of objects: up to this area, in pixels of the original image."""


def examine_boxes(
    data: str | Path, progress: Progress = silent, workers: int | None = None, size: tuple[int, int] | None = None
) -> Diagnosis:
    """Reads every annotation and every image of a set with boxes once and says what is wrong.

    size: shorter and longest side, px, at which anchors are tried; by default C4's 600 and 1000, and a pyramid's 800 and 1333.
    Raises UserError where there is no set.
    """
    root = user_path(data)
    sets = survey(root)
    base = root if root.is_dir() else root.parent
    entries = [Entry(image.path, _name(image.path, base), split, "") for split, one in sets.items() for image in one.images]
    inspections, colors = inspect_all(
        entries, lambda i: inspect_file(entries[i].file), progress, workers or max(os.cpu_count() or 1, 2)
    )
    gray = all(item.facts.gray for item in inspections if item.facts)
    findings = [finding for one in sets.values() for finding in one.findings]
    # Detectors see whole images, so elongated ones are as good as others.
    findings += [finding for finding in image_findings(entries, inspections, gray) if finding.kind != "elongated"]
    for one in sets.values():
        for image in one.images:
            findings += [*_overlapping(image, one.classes), *_outlines(image)]
    first = next(iter(sets.values()))
    findings += [*_balance(sets), *_unused_lists(root, sets), *_out_of_reach(first, size)]
    if unnamed := unnamed_images(root):
        findings.append(Finding("not listed", tuple(_name(path, base) for path in unnamed), f"{len(unnamed):,} images"))
    kept = set(usable(entries, inspections))
    numbers = iter(range(len(entries)))
    return Diagnosis(
        name=root.resolve().name,
        classes=first.classes,
        images={split: len(one) for split, one in sets.items()},
        per_class={split: one.counts() for split, one in sets.items()},
        pixels=image_statistics(inspections, colors, gray),
        findings=in_order(findings),
        suffixes=better_suffixes(entries, inspections),
        objects=_statistics(sets, size),
        sets={
            split: replace(one, images=tuple(image for image in one.images if next(numbers) in kept)) for split, one in sets.items()
        },
    )


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _statistics(sets: Mapping[str, BoxSet], size: tuple[int, int] | None) -> ObjectStatistics:
    """size: see examine_boxes."""
    first = next(iter(sets.values()))
    objects = [image.objects for one in sets.values() for image in one.images]
    boxes = np.concatenate([np.zeros((0, 4)), *(some.boxes for some in objects)])
    labels = np.concatenate([np.zeros(0, np.int64), *(some.labels for some in objects)])
    areas = np.concatenate([np.zeros(0), *(some.areas for some in objects)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    rows = {name: labels == k for k, name in enumerate(first.classes, 1)}
    return ObjectStatistics(
        without_objects={split: sum(not len(image.objects) for image in one.images) for split, one in sets.items()},
        difficult=sum(int(some.difficult.sum()) for some in objects),
        crowds=sum(int(some.crowd.sum()) for some in objects),
        segmented=sum(s is not None for some in objects for s in some.segmentations or ()),
        by_size={name: _by_size(areas[own]) for name, own in rows.items()},
        side={name: span(np.sqrt(box_areas(boxes[own]))) for name, own in rows.items()},
        aspect={name: span((width / height)[own]) for name, own in rows.items()},
        per_image=span(np.array([len(some) for some in objects], float)),
        anchors=usual_recalls(first.images, first.classes, size),
    )


def _by_size(areas: np.ndarray) -> dict[str, int]:
    places = np.searchsorted(list(AREAS.values()), areas, side="right").clip(max=2)
    return dict(zip(AREAS, np.bincount(places, minlength=3).tolist(), strict=True))


def _overlapping(image: BoxImage, classes: Sequence[str]) -> Iterator[Finding]:
    """Pairs of boxes that can hardly be two objects."""
    objects = image.objects
    iou = _iou(objects.boxes[:, None], objects.boxes[None])
    for i, j in np.argwhere(np.triu(iou >= SAME_IOU, 1)).tolist():
        if objects.crowd[i] or objects.crowd[j]:
            continue
        kind = "nearly twice" if objects.labels[i] == objects.labels[j] else "two classes"
        names = " and ".join(classes[int(objects.labels[k]) - 1] for k in (i, j))
        yield Finding(kind, (image.name,), f"objects {objects.ids[i]} and {objects.ids[j]}, {names}, IoU {iou[i, j]:.2f}")


def _outlines(image: BoxImage) -> Iterator[Finding]:
    """Outlines that have little to do with their boxes."""
    objects = image.objects
    for i, outline in enumerate(objects.segmentations or ()):
        if outline is None:
            continue
        around = np.clip(extent(outline), 0, [image.width, image.height] * 2)
        if (iou := float(_iou(objects.boxes[i], around))) < OUTLINE_IOU:
            boxes = [", ".join(f"{side:g}" for side in box) for box in (around, objects.boxes[i])]
            detail = f"object {objects.ids[i]}, whose outline is within {boxes[0]}, its box {boxes[1]}, IoU {iou:.2f}"
            yield Finding("outline elsewhere", (image.name,), detail)


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of boxes (..., 4), broadcast against each other."""
    shared = np.clip(np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]), 0, None).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    return shared / (areas[0] + areas[1] - shared)


def _balance(sets: Mapping[str, BoxSet]) -> Iterator[Finding]:
    """What is wrong with the numbers of objects."""
    counts = {split: one.counts() for split, one in sets.items()}
    first, learned = next(iter(counts.items()))
    for split, numbers in counts.items():
        if not any(numbers.values()):
            yield Finding("no objects", (split,), f"{len(sets[split]):,} images")
        elif split != first and (missing := tuple(name for name, n in numbers.items() if not n)):
            yield Finding("class missing", missing, f"{split} has no object of {len(missing):,} of {len(numbers):,} classes")
    trained = {name: n for name, n in learned.items() if n}
    if missing := tuple(name for name in learned if name not in trained and any(numbers[name] for numbers in counts.values())):
        yield Finding("class without training objects", missing, f"{len(missing):,} of {len(learned):,} classes")
    if few := tuple(name for name, n in trained.items() if n < FEW):
        yield Finding("few objects", few, f"{len(few):,} of {len(learned):,} classes")
    if trained:
        most, least = max(trained, key=trained.__getitem__), min(trained, key=trained.__getitem__)
        if trained[most] >= IMBALANCE * trained[least]:
            detail = f"{first} has {trained[most]:,} of {most}, {trained[least]:,} of {least}"
            yield Finding("object imbalance", (most, least), detail)


def _unused_lists(root: Path, sets: Mapping[str, BoxSet]) -> Iterator[Finding]:
    """VOC lists with images that no split has."""
    left_out = unannotated(root)
    for year in years(root):
        images = {name: {image for image, _ in lines} for name, lines in lists(root / year).items()}
        used = {image for split in sets for image in images.get(split, ())}
        for name in splits(root / year):
            if (file := list_file(year, name)) not in left_out and (more := images[name] - used):
                yield Finding("list of others", (file,), f"{len(more):,} of {len(images[name]):,} images")


def _out_of_reach(train: BoxSet, size: tuple[int, int] | None) -> Iterator[Finding]:
    """The classes that no anchors fit at this size, and the size at which some do."""
    best = best_recall(train.images, range(1, len(train.classes) + 1), size)
    low = sorted((label for label, recall in best.items() if recall < MIN_RECALL), key=best.__getitem__)
    if low:
        names = tuple(train.classes[label - 1] for label in low)
        at = f"{size[0]} px" if size else f"{C4[0]} or {FPN[0]} px"
        side = sufficient_side(train.images, low, size or C4)
        if side is not None:
            advice = f"{side} px are enough (--size {side}; in training --set detector.min_size={side})"
        else:
            advice = f"they are too small or too thin up to {SIDES[-1]:,} px: cut the images into parts, or leave the class out"
        worst = f"{best[low[0]]:.1f}%" + (f" of {names[0]}" if len(low) > 1 else "")
        yield Finding("out of reach", names, f"{worst} at best, at {at} of the shorter side; {advice}")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`"600"` or `"600,1000"`: shorter and longest side; the longest is 5/3 of the shorter by default. Raises UserError."""
    if text is None:
        return None
    try:
        shorter, *rest = (int(word) for word in text.split(","))
        longest = rest[0] if rest else round(shorter * 5 / 3)
        if len(rest) > 1 or not 16 <= shorter <= longest <= 4096:
            raise ValueError
    except ValueError:
        raise UserError(f"--size {text}: write the shorter side in px, such as 600, or with the longest, 600,1000") from None
    return shorter, longest
