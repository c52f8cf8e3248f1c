"""Measures the recall of a detector's default anchors on a set, and suggests better anchors and a larger image size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reslearn.data.boxes.anchors import AnchorLevel, anchor_recall, scaled_boxes, suggest_anchors
from reslearn.data.boxes.box_set import BoxImage

C4, FPN = (600, 1000), (800, 1333)
"""Shorter and longest side, px, of scaled images: in the Faster R-CNN paper, and in torchvision's FPN."""
SIDES = (240, 320, 480, 600, 800, 1000, 1200)
"""Shorter sides, px, to try if a size is too small."""
MIN_RECALL = 50.0
"""Percent of a class's objects that anchors should match."""
MAX_BOXES = 5_000
"""The most boxes of a class to measure, evenly spaced."""
USUAL = (0.5, 1.0, 2.0)
PYRAMID = [AnchorLevel(4 * 2**i, (32.0 * 2**i,), USUAL) for i in range(5)]


class AnchorRecall(NamedTuple):
    """The percentage of boxes with an anchor of IoU >= 0.5 at an image size, overall and by class.

    anchors: sides (square roots of the area), px. ratios: height / width. Both are as in the detector's recipe.
    """

    name: str
    size: tuple[int, int]
    anchors: tuple[float, ...]
    ratios: tuple[float, ...]
    recall: float
    by_class: dict[str, float]


def usual_recalls(
    images: Sequence[BoxImage], classes: Sequence[str], size: tuple[int, int] | None = None
) -> tuple[AnchorRecall, ...]:
    """The recall of C4's default anchors, of C4 anchors fitted to the boxes, and of FPN's default anchors; () without boxes.

    size: shorter and longest side, px; by default those of C4 and FPN.
    """
    labels = _labels(images)
    if not len(labels):
        return ()

    def recall(name: str, at: tuple[int, int], levels: Sequence[AnchorLevel]) -> AnchorRecall:
        fits = anchor_recall(*scaled_boxes(images, *at), levels).best >= 0.5
        by_class = {c: round(100 * float(fits[labels == k].mean()), 2) for k, c in enumerate(classes, 1) if (labels == k).any()}
        sides = tuple(side for level in levels for side in level.sizes)
        return AnchorRecall(name, at, sides, tuple(levels[0].ratios), round(100 * float(fits.mean()), 2), by_class)

    at = size or C4
    sides, fitted = _fit_anchors(scaled_boxes(images, *at)[0])
    suggested = [recall("C4, suggested", at, [AnchorLevel(16, sides, ratios)]) for ratios in (USUAL, fitted)]
    return (
        recall("C4", at, [AnchorLevel(16, (128, 256, 512), USUAL)]),
        max(suggested, key=lambda row: row.recall),
        recall("pyramid", size or FPN, PYRAMID),
    )


def best_recall(images: Sequence[BoxImage], labels: Sequence[int], size: tuple[int, int] | None = None) -> dict[int, float]:
    """The best anchor recall of each label in percent: with C4 anchors fitted to this class, or with FPN's default anchors.

    Labels without boxes are left out. size: see usual_recalls.
    """
    c4, fpn = scaled_boxes(images, *(size or C4)), scaled_boxes(images, *(size or FPN))
    all_labels, best = _labels(images), {}
    for label in labels:
        rows = np.flatnonzero(all_labels == label)
        if len(rows):
            rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_BOXES)).astype(int)]
            boxes, sizes = (values[rows] for values in c4)
            sides, fitted = _fit_anchors(boxes)
            recalls = [anchor_recall(boxes, sizes, [AnchorLevel(16, sides, ratios)]).recall for ratios in (USUAL, fitted)]
            recalls.append(anchor_recall(fpn[0][rows], fpn[1][rows], PYRAMID).recall)
            best[label] = 100 * max(recalls)
    return best


def sufficient_side(images: Sequence[BoxImage], labels: Sequence[int], size: tuple[int, int]) -> int | None:
    """The smallest of SIDES above size[0] at which every label has at least MIN_RECALL, or None."""
    for side in SIDES:
        longest = round(side * size[1] / size[0])
        if side > size[0] and min(best_recall(images, labels, (side, longest)).values()) >= MIN_RECALL:
            return side
    return None


def _labels(images: Sequence[BoxImage]) -> np.ndarray:
    """The labels of the boxes that scaled_boxes returns, int64 (N,)."""
    return np.concatenate([np.zeros(0, np.int64), *(image.objects.labels[~image.objects.crowd] for image in images)])


def _fit_anchors(boxes: np.ndarray, count: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sides in whole px and ratios (height / width) for boxes (N, 4), each fitted by k-means (see suggest_anchors)."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    side, ratio = np.sqrt(width * height), height / width
    zero = np.zeros_like(side)
    squares = suggest_anchors(np.stack([zero, zero, side, side], axis=1), count)
    shapes = suggest_anchors(np.stack([zero, zero, 1 / np.sqrt(ratio), np.sqrt(ratio)], axis=1), count)
    ratios = sorted(round(float(h / w), 2) for w, h in shapes)
    return tuple(dict.fromkeys(float(max(1, round(s))) for s in squares[:, 0])), tuple(dict.fromkeys(ratios))
