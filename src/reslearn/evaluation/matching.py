"""Matches detections to objects by the rules of VOC and COCO, at every IoU threshold, in one pass.

VOC (Everingham et al. 2010, section 4.2): detections are processed by descending score. Each is compared with the object of its
class that it overlaps most: it is a true positive if IoU >= threshold and the object is unmatched, a duplicate (false positive)
if it is matched already, and ignored if the object is difficult. COCO (cocoeval.py): each is matched to the unmatched object
that it overlaps most; crowds and objects outside the area range are used only if nothing else fits, and the detection is then
ignored.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from reslearn.data.boxes.box_set import Objects, box_areas
from reslearn.data.boxes.masks import draw
from reslearn.errors import UserError

IOUS = np.linspace(0.5, 0.95, 10)
"""COCO's IoU thresholds; VOC's is the first."""

ALL_IOUS = tuple(range(len(IOUS)))
"""Their indices."""

AREAS = {"all": (0, 1e5**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}
"""COCO's area ranges in pixels, inclusive."""

_LOW, _HIGH = np.array(list(AREAS.values()), np.float64).T


@dataclass(frozen=True, eq=False)
class Detections:
    """N detections in one image, in any order: boxes float64 (N, 4), labels int64 (N,) from 1, scores float64 (N,).

    masks: bool (N, H, W) at the size of the image, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], image: int = 0, classes: int | None = None) -> "Detections":
        """Converts a dict of torchvision's format with boxes, labels and scores (tensors on any device, arrays or lists).

        Masks, (N, H, W) or (N, 1, H, W), are thresholded at 0.5.
        Raises UserError with the image for non-finite values, and ValueError for inconsistent shapes or labels.
        """
        boxes, labels, scores = (_array(given[key]) for key in ("boxes", "labels", "scores"))
        boxes, labels, scores = boxes.astype(np.float64).reshape(-1, 4), labels.astype(np.int64), scores.astype(np.float64)
        if not boxes.shape[:1] == labels.shape == scores.shape:
            raise ValueError(f"image {image}: {len(boxes)} boxes, labels {labels.shape}, scores {scores.shape}")
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise UserError(f"the detector's boxes or scores are NaN or infinite for image {image}: its training diverged")
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError(f"image {image}: a detection with x2 < x1 or y2 < y1")
        if len(labels) and not (labels.min() >= 1 and labels.max() <= (classes or labels.max())):
            raise ValueError(f"image {image}: labels from {labels.min()} to {labels.max()}, but classes are 1 to {classes}")
        masks = None
        if given.get("masks") is not None:
            masks = _array(given["masks"]) > 0.5
            masks = masks[:, 0] if masks.ndim == 4 else masks
            if masks.ndim != 3 or len(masks) != len(boxes):
                raise ValueError(f"image {image}: {len(boxes)} boxes, masks {masks.shape}")
        return cls(boxes, labels, scores, masks)


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


@dataclass(frozen=True, eq=False)
class Matches:
    """Matches of D detections in I images of K classes, for A = 4 area ranges and T = 10 IoU thresholds.

    Per detection, in the order of the images:
    image, index (in its image's detections), label, rank (by score within its image and class, from 0): int64 (D,);
    score: float64 (D,); hit, ignored: COCO's, bool (D, A, T): a true positive is a hit and not ignored, a false positive
    neither; matched: int64 (D, T), the matched object in the area range "all", or -1; voc_hit, voc_ignored: bool (D, T).
    Per image: positives: int64 (I, K, A), voc_positives: (I, K), the number of objects to detect.
    """

    classes: tuple[str, ...]
    truth: tuple[Objects, ...]
    detections: tuple[Detections, ...]
    image: np.ndarray
    index: np.ndarray
    label: np.ndarray
    rank: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    matched: np.ndarray
    voc_hit: np.ndarray
    voc_ignored: np.ndarray
    positives: np.ndarray
    voc_positives: np.ndarray


COLUMNS = ("image", "index", "label", "rank", "score", "hit", "ignored", "matched", "voc_hit", "voc_ignored")
"""The fields of Matches with a row per detection."""


def match(
    truth: Sequence[Objects], detections: Iterable[Mapping[str, Any]], classes: Sequence[str], *, masks: bool = False
) -> Matches:
    """Matches the detections of each image to its objects, by boxes or by masks.

    detections: a dict per image with boxes, labels, scores (and masks), see Detections.of; the masks are not kept. Both rules
    ignore difficult objects, and VOC's also crowds. Raises ValueError and UserError like Detections.of, and UserError without
    images, or if `masks` is set and an object has no mask.
    """
    if not truth:
        raise UserError("there are no images to evaluate")
    positives = np.zeros((len(truth), len(classes), len(AREAS)), np.int64)
    voc_positives = np.zeros((len(truth), len(classes)), np.int64)
    rows: list[tuple[np.ndarray, ...]] = [_no_rows()]
    kept = []
    for i, (objects, raw) in enumerate(zip_longest(truth, detections)):
        if objects is None or raw is None:
            raise ValueError(f"{len(truth)} images, but detections for {i if raw is None else 'more'}")
        predicted = Detections.of(raw, i, len(classes))
        drawn = _drawn(objects, predicted, i) if masks else None
        kept.append(replace(predicted, masks=None))
        if len(objects) and objects.labels.max() > len(classes):
            raise ValueError(f"image {i}: an object has label {objects.labels.max()}, but there are {len(classes)} classes")
        ignored = objects.difficult | objects.crowd
        coco_ignored = ignored[:, None] | _outside(objects.areas)
        np.add.at(positives[i], objects.labels - 1, ~coco_ignored)
        np.add.at(voc_positives[i], objects.labels - 1, ~ignored)
        order = np.lexsort((-predicted.scores, predicted.labels))  # by class, then score; stable for ties
        labels, scores = predicted.labels[order], predicted.scores[order]
        if drawn is None or predicted.masks is None:
            areas = box_areas(predicted.boxes[order])
            iou, coco_iou = overlaps(predicted.boxes[order], objects.boxes, objects.crowd)
        else:
            areas = predicted.masks[order].sum(axis=(1, 2), dtype=np.float64)
            iou, coco_iou = mask_overlaps(predicted.masks[order], drawn, objects.crowd)
        same = labels[:, None] == objects.labels  # IoU with other classes counts as 0
        hit, neither, matched = _coco(coco_iou * same, coco_ignored, objects.crowd)
        neither |= ~hit & _outside(areas)[:, :, None]
        rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
        rows.append((np.full(len(labels), i), order, labels, rank, scores, hit, neither, matched, *_voc(iou * same, ignored)))
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    return Matches(
        tuple(classes), tuple(truth), tuple(kept), **dict(zip(COLUMNS, columns, strict=True)),
        positives=positives, voc_positives=voc_positives,
    )  # fmt: skip


def _no_rows() -> tuple[np.ndarray, ...]:
    """Empty columns."""
    a, t = len(AREAS), len(IOUS)
    integers, flags = np.zeros(0, np.int64), np.zeros((0, a, t), bool)
    return (*[integers] * 4, np.zeros(0), flags, flags, np.zeros((0, t), np.int64), flags[:, 0], flags[:, 0])


def overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU (D, G) of boxes (D, 4) with others (G, 4), and COCO's variant, which for crowds is intersection over the box's area."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    return _ratios(shared, box_areas(boxes), box_areas(others), crowd)


def mask_overlaps(masks: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Like overlaps, for masks, bool (D, H, W) and (G, H, W)."""
    pixels = math.prod(masks.shape[1:])
    one, other = (group.reshape(len(group), pixels).astype(np.float32) for group in (masks, others))
    shared = (one @ other.T).astype(np.float64)  # integers below 2^24, so float32 is exact
    return _ratios(shared, one.sum(axis=1, dtype=np.float64), other.sum(axis=1, dtype=np.float64), crowd)


def _ratios(shared: np.ndarray, own: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    union = own[:, None] + others[None] - shared
    denominators = (union, np.where(crowd[None], own[:, None], union))
    iou, coco_iou = (np.divide(shared, area, out=np.zeros_like(shared), where=shared > 0) for area in denominators)
    return iou, coco_iou


def _drawn(objects: Objects, detections: Detections, image: int) -> np.ndarray:
    """The objects' masks, bool (G, H, W), at the size of the detections' masks."""
    if detections.masks is None:
        raise ValueError(f"image {image}: detections without masks")
    if objects.segmentations is None and len(objects):
        raise UserError(f"image {image} has objects without a segmentation, so masks cannot be evaluated")
    drawn = np.zeros((len(objects), *detections.masks.shape[1:]), bool)
    for mask, segmentation, id in zip(drawn, objects.segmentations or (), objects.ids, strict=True):
        if segmentation is None:
            raise UserError(f"image {image}: object {id} has no segmentation, so masks cannot be evaluated")
        mask[:] = draw(segmentation, *mask.shape)
    return drawn


def _outside(areas: np.ndarray) -> np.ndarray:
    """(N,) -> bool (N, A): the area ranges that do not contain each area."""
    return (areas[:, None] < _LOW) | (areas[:, None] > _HIGH)


def _coco(iou: np.ndarray, ignore: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hit, ignored) bool (D, A, T) and the matched object (D, T), for detections by descending score. ignore: (G, A)."""
    n, a, t = len(iou), len(AREAS), len(IOUS)
    limits = np.minimum(IOUS, 1 - 1e-10)
    hit, ignored, matched = np.zeros((n, a, t), bool), np.zeros((n, a, t), bool), np.full((n, t), -1)
    taken = np.zeros((a, t, len(crowd)), bool)
    for d in np.flatnonzero((iou >= limits[0]).any(axis=1)):
        near = np.flatnonzero(iou[d] >= limits[0])[::-1]  # reversed: the last of equals is matched, as in cocoeval.py
        values, out = iou[d, near], ignore[near].T[:, None]
        free = (values >= limits[:, None]) & (~taken[:, :, near] | crowd[near])  # (A, T, near)
        counts = free & ~out
        free = np.where(counts.any(axis=2, keepdims=True), counts, free)
        area, threshold = np.nonzero(free.any(axis=2))
        best = np.where(free, values, -1).argmax(axis=2)[area, threshold]
        taken[area, threshold, near[best]] = True
        hit[d, area, threshold] = True
        ignored[d, area, threshold] = out[area, 0, best]
        matched[d, threshold[area == 0]] = near[best[area == 0]]
    return hit, ignored, matched


def _voc(iou: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hit, ignored) bool (D, T), for detections by descending score."""
    hit, neither = np.zeros((len(iou), len(IOUS)), bool), np.zeros((len(iou), len(IOUS)), bool)
    free = np.ones((len(IOUS), len(ignored)), bool)
    for d in np.flatnonzero((iou >= IOUS[0]).any(axis=1)):
        best = iou[d].argmax()
        enough = iou[d, best] >= IOUS
        if ignored[best]:
            neither[d] = enough
        else:
            hit[d] = enough & free[:, best]
            free[enough, best] = False
    return hit, neither
