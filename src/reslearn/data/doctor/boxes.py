"""Examines sets with boxes: annotations, images and anchor recall."""

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
"""COCO's object sizes: upper bounds of the area, in pixels of the original image."""


def examine_boxes(
    data: str | Path, progress: Progress = silent, workers: int | None = None, size: tuple[int, int] | None = None
) -> Diagnosis:
    """Reads every annotation and image of a set with boxes once and reports problems.

    size: shorter and longest image side, px, for anchor recall; the default is 600, 1000 for C4 and 800, 1333 for FPN.
    Raises UserError if there is no such set.
    """
    root = user_path(data)
    sets = survey(root)
    base = root if root.is_dir() else root.parent
    entries = [Entry(image.path, _name(image.path, base), split, "") for split, boxes in sets.items() for image in boxes.images]
    inspections, colors = inspect_all(entries, lambda i: inspect_file(entries[i].file), progress, workers)
    gray = all(item.facts.gray for item in inspections if item.facts)
    findings = [finding for boxes in sets.values() for finding in boxes.findings]
    # Detectors take whole images, so elongated ones are not a problem.
    findings += [finding for finding in image_findings(entries, inspections, gray) if finding.kind != "elongated"]
    for boxes in sets.values():
        for image in boxes.images:
            findings += [*_overlap_findings(image, boxes.classes), *_segmentation_findings(image)]
    first = next(iter(sets.values()))
    findings += [*_balance_findings(sets), *_unused_lists(root, sets), *_out_of_reach(first, size)]
    if unnamed := unnamed_images(root):
        findings.append(Finding("not listed", tuple(_name(path, base) for path in unnamed), f"{len(unnamed):,} images"))
    kept = set(usable(entries, inspections))
    indices = iter(range(len(entries)))
    return Diagnosis(
        name=root.resolve().name,
        classes=first.classes,
        images={split: len(boxes) for split, boxes in sets.items()},
        per_class={split: boxes.counts() for split, boxes in sets.items()},
        pixels=image_statistics(inspections, colors, gray),
        findings=in_order(findings),
        suffixes=better_suffixes(entries, inspections),
        objects=_statistics(sets, size),
        sets={
            split: replace(boxes, images=tuple(image for image in boxes.images if next(indices) in kept))
            for split, boxes in sets.items()
        },
    )


def _name(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _statistics(sets: Mapping[str, BoxSet], size: tuple[int, int] | None) -> ObjectStatistics:
    """size: see examine_boxes."""
    first = next(iter(sets.values()))
    objects = [image.objects for split in sets.values() for image in split.images]
    boxes = np.concatenate([np.zeros((0, 4)), *(o.boxes for o in objects)])
    labels = np.concatenate([np.zeros(0, np.int64), *(o.labels for o in objects)])
    areas = np.concatenate([np.zeros(0), *(o.areas for o in objects)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    rows = {name: labels == k for k, name in enumerate(first.classes, 1)}
    return ObjectStatistics(
        without_objects={name: sum(not len(image.objects) for image in split.images) for name, split in sets.items()},
        difficult=sum(int(o.difficult.sum()) for o in objects),
        crowds=sum(int(o.crowd.sum()) for o in objects),
        segmented=sum(s is not None for o in objects for s in o.segmentations or ()),
        by_size={name: _count_by_size(areas[mask]) for name, mask in rows.items()},
        side={name: span(np.sqrt(box_areas(boxes[mask]))) for name, mask in rows.items()},
        aspect={name: span((width / height)[mask]) for name, mask in rows.items()},
        per_image=span(np.array([len(o) for o in objects], float)),
        anchors=usual_recalls(first.images, first.classes, size),
    )


def _count_by_size(areas: np.ndarray) -> dict[str, int]:
    bins = np.searchsorted(list(AREAS.values()), areas, side="right").clip(max=2)
    return dict(zip(AREAS, np.bincount(bins, minlength=3).tolist(), strict=True))


def _overlap_findings(image: BoxImage, classes: Sequence[str]) -> Iterator[Finding]:
    """Yields pairs of boxes that overlap so much that they probably mark one object."""
    objects = image.objects
    iou = _iou(objects.boxes[:, None], objects.boxes[None])
    for i, j in np.argwhere(np.triu(iou >= SAME_IOU, 1)).tolist():
        if objects.crowd[i] or objects.crowd[j]:
            continue
        kind = "nearly twice" if objects.labels[i] == objects.labels[j] else "two classes"
        names = " and ".join(classes[int(objects.labels[k]) - 1] for k in (i, j))
        yield Finding(kind, (image.name,), f"objects {objects.ids[i]} and {objects.ids[j]}, {names}, IoU {iou[i, j]:.2f}")


def _segmentation_findings(image: BoxImage) -> Iterator[Finding]:
    """Yields segmentations that do not match their boxes."""
    objects = image.objects
    for i, segmentation in enumerate(objects.segmentations or ()):
        if segmentation is None:
            continue
        bounds = np.clip(extent(segmentation), 0, [image.width, image.height] * 2)
        if (iou := float(_iou(objects.boxes[i], bounds))) < OUTLINE_IOU:
            texts = [", ".join(f"{side:g}" for side in box) for box in (bounds, objects.boxes[i])]
            detail = f"object {objects.ids[i]}: segmentation bounds {texts[0]}; box {texts[1]}; IoU {iou:.2f}"
            yield Finding("outline elsewhere", (image.name,), detail)


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of boxes (..., 4), with broadcasting."""
    shared = np.clip(np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]), 0, None).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    return shared / (areas[0] + areas[1] - shared)


def _balance_findings(sets: Mapping[str, BoxSet]) -> Iterator[Finding]:
    """Yields findings about the numbers of objects per class."""
    counts = {split: boxes.counts() for split, boxes in sets.items()}
    first, train = next(iter(counts.items()))
    for split, numbers in counts.items():
        if not any(numbers.values()):
            yield Finding("no objects", (split,), f"{len(sets[split]):,} images")
        elif split != first and (missing := tuple(name for name, n in numbers.items() if not n)):
            yield Finding("class missing", missing, f"{split} has no objects of {len(missing):,} of {len(numbers):,} classes")
    present = {name: n for name, n in train.items() if n}
    if missing := tuple(name for name in train if name not in present and any(numbers[name] for numbers in counts.values())):
        yield Finding("class without training objects", missing, f"{len(missing):,} of {len(train):,} classes")
    if few := tuple(name for name, n in present.items() if n < FEW):
        yield Finding("few objects", few, f"{len(few):,} of {len(train):,} classes")
    if present:
        largest, rarest = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
        if present[largest] >= IMBALANCE * present[rarest]:
            detail = f"{first} has {present[largest]:,} of {largest}, {present[rarest]:,} of {rarest}"
            yield Finding("object imbalance", (largest, rarest), detail)


def _unused_lists(root: Path, sets: Mapping[str, BoxSet]) -> Iterator[Finding]:
    """Yields VOC lists that contain images of no split."""
    left_out = unannotated(root)
    for year in years(root):
        images = {name: {image for image, _ in lines} for name, lines in lists(root / year).items()}
        used = {image for split in sets for image in images.get(split, ())}
        for name in splits(root / year):
            if (file := list_file(year, name)) not in left_out and (unused := images[name] - used):
                yield Finding("list of others", (file,), f"{len(unused):,} of {len(images[name]):,} images")


def _out_of_reach(train: BoxSet, size: tuple[int, int] | None) -> Iterator[Finding]:
    """Yields the classes with too low an anchor recall at this size, with a sufficient size if there is one."""
    best = best_recall(train.images, range(1, len(train.classes) + 1), size)
    low = sorted((label for label, recall in best.items() if recall < MIN_RECALL), key=best.__getitem__)
    if low:
        names = tuple(train.classes[label - 1] for label in low)
        tried = f"{size[0]} px" if size else f"{C4[0]} or {FPN[0]} px"
        side = sufficient_side(train.images, low, size or C4)
        if side is not None:
            advice = f"use {side} px (--size {side}; in training --set detector.min_size={side})"
        else:
            advice = f"objects are too small or thin even at {SIDES[-1]:,} px: tile the images, or drop the class"
        worst = f"{best[low[0]]:.1f}%" + (f" ({names[0]})" if len(low) > 1 else "")
        yield Finding("out of reach", names, f"best anchor recall {worst} at a shorter side of {tried}; {advice}")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parses `"600"` or `"600,1000"`: the shorter and the longest side, by default 5/3 of the shorter. Raises UserError."""
    if text is None:
        return None
    try:
        shorter, *rest = (int(word) for word in text.split(","))
        longest = rest[0] if rest else round(shorter * 5 / 3)
        if len(rest) > 1 or not 16 <= shorter <= longest <= 4096:
            raise ValueError
    except ValueError:
        raise UserError(f"--size {text}: must be SHORTER or SHORTER,LONGEST in px (16 to 4096), such as 600,1000") from None
    return shorter, longest
