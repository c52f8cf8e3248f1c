"""Detections to objects: one run that keeps what VOC's and what COCO's rules say of each detection at every threshold.

VOC (Everingham et al. 2010, section 4.2): by falling score, a detection takes the object of its class that it overlaps
most; it is right where IoU >= the threshold and the object is not taken yet, wrong where it is (a duplicate); on a
difficult object it counts neither way. COCO (cocoeval.py): it takes the object of those still free that it overlaps most;
crowds and objects outside the area range are taken only where nothing else fits, and then it counts neither way.
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
"""COCO's thresholds of IoU; VOC's is the first."""

AREAS = {"all": (0, 1e5**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}
"""COCO's ranges of area in pixels, both ends inside."""

_LOW, _HIGH = np.array(list(AREAS.values()), np.float64).T


@dataclass(frozen=True, eq=False)
class Detections:
    """N detections in one image: `boxes` float64 (N, 4), `labels` int64 (N,) from 1, `scores` float64 (N,), any order.

    `masks` bool (N, H, W), where there are any: of the image's height and width.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], image: int = 0, classes: int | None = None) -> "Detections":
        """From torchvision's dict of boxes, labels and scores (tensors on any device, arrays or lists).

        Its masks, (N, H, W) or (N, 1, H, W), are taken where they are above 0.5.
        Raises UserError, naming the image, for numbers that are not finite, and ValueError for what does not fit together.
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
    """What became of D detections in I images of K classes, at A = 4 ranges of area and T = 10 thresholds.

    By detection, images in order: `image`, `index` (in its image's detections), `label`, `rank` (by score in its image and
    class, from 0) int64 (D,); `score` float64 (D,); `hit` and `ignored` bool (D, A, T), COCO's: right where hit and not
    ignored, wrong where neither; `taken` int64 (D, T), the object that it took in the range "all", or -1; `voc_hit` and
    `voc_ignored` bool (D, T). By image: `positives` int64 (I, K, A) and `voc_positives` (I, K), the objects to be found.
    """

    classes: tuple[str, ...]
    truth: tuple[Objects, ...]
    found: tuple[Detections, ...]
    image: np.ndarray
    index: np.ndarray
    label: np.ndarray
    rank: np.ndarray
    score: np.ndarray
    hit: np.ndarray
    ignored: np.ndarray
    taken: np.ndarray
    voc_hit: np.ndarray
    voc_ignored: np.ndarray
    positives: np.ndarray
    voc_positives: np.ndarray


def match(truth: Sequence[Objects], found: Iterable[Mapping[str, Any]], classes: Sequence[str], *, masks: bool = False) -> Matches:
    """Match the detections of each image with its objects, by their boxes or their masks.

    `found` gives a dict of boxes, labels, scores (and masks) for each image in turn (see Detections.of); masks are let go
    with their image. Difficult objects count neither way under both rules, and crowds under VOC's, too. Raises ValueError
    and UserError as Detections.of does, and UserError where there are no images, or with `masks` an object without one.
    """
    if not truth:
        raise UserError("there are no images to evaluate")
    positives = np.zeros((len(truth), len(classes), len(AREAS)), np.int64)
    voc_positives = np.zeros((len(truth), len(classes)), np.int64)
    parts: list[tuple[np.ndarray, ...]] = [_nothing()]
    kept = []
    for i, (objects, raw) in enumerate(zip_longest(truth, found)):
        if objects is None or raw is None:
            raise ValueError(f"{len(truth)} images, but detections of {i if raw is None else 'more'}")
        given = Detections.of(raw, i, len(classes))
        drawn = _drawn(objects, given, i) if masks else None
        kept.append(replace(given, masks=None))
        if len(objects) and objects.labels.max() > len(classes):
            raise ValueError(f"image {i}: an object of label {objects.labels.max()}, but there are {len(classes)} classes")
        ignored = objects.difficult | objects.crowd
        left_out = ignored[:, None] | _outside(objects.areas)
        np.add.at(positives[i], objects.labels - 1, ~left_out)
        np.add.at(voc_positives[i], objects.labels - 1, ~ignored)
        order = np.lexsort((-given.scores, given.labels))  # class by class; stable, so that ties stay in their order
        labels, scores = given.labels[order], given.scores[order]
        if drawn is None or given.masks is None:
            areas = box_areas(given.boxes[order])
            plain, lenient = overlaps(given.boxes[order], objects.boxes, objects.crowd)
        else:
            areas = given.masks[order].sum(axis=(1, 2), dtype=np.float64)
            plain, lenient = mask_overlaps(given.masks[order], drawn, objects.crowd)
        same = labels[:, None] == objects.labels  # those of other classes are as good as elsewhere
        hit, neither, taken = _coco(lenient * same, left_out, objects.crowd)
        neither |= ~hit & _outside(areas)[:, :, None]
        rank = np.arange(len(labels)) - np.searchsorted(labels, labels)
        parts.append((np.full(len(labels), i), order, labels, rank, scores, hit, neither, taken, *_voc(plain * same, ignored)))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Matches(
        tuple(classes), tuple(truth), tuple(kept), **dict(zip(_COLUMNS, columns, strict=True)),
        positives=positives, voc_positives=voc_positives,
    )  # fmt: skip


_COLUMNS = ("image", "index", "label", "rank", "score", "hit", "ignored", "taken", "voc_hit", "voc_ignored")


def _nothing() -> tuple[np.ndarray, ...]:
    """The columns of no detections."""
    a, t = len(AREAS), len(IOUS)
    integers, flags = np.zeros(0, np.int64), np.zeros((0, a, t), bool)
    return (*[integers] * 4, np.zeros(0), flags, flags, np.zeros((0, t), np.int64), flags[:, 0], flags[:, 0])


def overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU (D, G) of boxes (D, 4) with others (G, 4), and the same with COCO's rule for crowds: the part of the box inside."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    return _ratios(shared, box_areas(boxes), box_areas(others), crowd)


def mask_overlaps(masks: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of masks, bool (D, H, W) and (G, H, W)."""
    pixels = math.prod(masks.shape[1:])
    one, other = (some.reshape(len(some), pixels).astype(np.float32) for some in (masks, others))
    shared = (one @ other.T).astype(np.float64)  # whole numbers below 2^24, exact in any order
    return _ratios(shared, one.sum(axis=1, dtype=np.float64), other.sum(axis=1, dtype=np.float64), crowd)


def _ratios(shared: np.ndarray, own: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    union = own[:, None] + others[None] - shared
    parts = (union, np.where(crowd[None], own[:, None], union))
    plain, lenient = (np.divide(shared, part, out=np.zeros_like(shared), where=shared > 0) for part in parts)
    return plain, lenient


def _drawn(objects: Objects, given: Detections, image: int) -> np.ndarray:
    """bool (G, H, W), the objects' masks, in the size of the detections'."""
    if given.masks is None:
        raise ValueError(f"image {image}: detections without masks")
    if objects.segmentations is None and len(objects):
        raise UserError(f"image {image} has objects without a segmentation, so masks cannot be evaluated")
    drawn = np.zeros((len(objects), *given.masks.shape[1:]), bool)
    for mask, segmentation, id in zip(drawn, objects.segmentations or (), objects.ids, strict=True):
        if segmentation is None:
            raise UserError(f"image {image}: object {id} has no segmentation, so masks cannot be evaluated")
        mask[:] = draw(segmentation, *mask.shape)
    return drawn


def _outside(areas: np.ndarray) -> np.ndarray:
    """(N,) -> bool (N, A): which ranges an area is not in."""
    return (areas[:, None] < _LOW) | (areas[:, None] > _HIGH)


def _coco(iou: np.ndarray, left_out: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hit, ignored) bool (D, A, T) and the object taken (D, T), of detections in the order of score; `left_out` is (G, A)."""
    n, a, t = len(iou), len(AREAS), len(IOUS)
    limits = np.minimum(IOUS, 1 - 1e-10)
    hit, ignored, whom = np.zeros((n, a, t), bool), np.zeros((n, a, t), bool), np.full((n, t), -1)
    taken = np.zeros((a, t, len(crowd)), bool)
    for d in np.flatnonzero((iou >= limits[0]).any(axis=1)):
        near = np.flatnonzero(iou[d] >= limits[0])[::-1]  # backwards: of equals, the last is taken
        values, out = iou[d, near], left_out[near].T[:, None]
        free = (values >= limits[:, None]) & (~taken[:, :, near] | crowd[near])  # (A, T, near)
        counts = free & ~out
        free = np.where(counts.any(axis=2, keepdims=True), counts, free)
        area, threshold = np.nonzero(free.any(axis=2))
        best = np.where(free, values, -1).argmax(axis=2)[area, threshold]
        taken[area, threshold, near[best]] = True
        hit[d, area, threshold] = True
        ignored[d, area, threshold] = out[area, 0, best]
        whom[d, threshold[area == 0]] = near[best[area == 0]]
    return hit, ignored, whom


def _voc(iou: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hit, ignored) bool (D, T), of detections in the order of score."""
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
