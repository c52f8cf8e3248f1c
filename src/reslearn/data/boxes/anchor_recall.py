"""Which boxes of a set the usual anchors of detectors fit at a size, which anchors would fit better, and what size is enough."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from reslearn.data.boxes.anchors import AnchorLevel, anchor_recall, scaled_boxes, suggest_anchors
from reslearn.data.boxes.box_set import BoxImage

C4, FPN = (600, 1000), (800, 1333)
"""Shorter and longest side that images are scaled to, in px: of Faster R-CNN's paper, and of torchvision's pyramid."""
SIDES = (240, 320, 480, 600, 800, 1000, 1200)
"""Shorter sides in px that are tried where a size is too small."""
HALF = 50.0
"""Percent of a class's objects that some anchors should fit."""
MOST = 5_000
USUAL = (0.5, 1.0, 2.0)
PYRAMID = [AnchorLevel(4 * 2**i, (32.0 * 2**i,), USUAL) for i in range(5)]


class AnchorRecall(NamedTuple):
    """How many boxes of the training images have an anchor of IoU >= 0.5, percent, in all and by class, at a size.

    `anchors` are sides (square roots of the area) and `ratios` heights to widths, as a detector's settings take them.
    """

    name: str
    size: tuple[int, int]
    anchors: tuple[float, ...]
    ratios: tuple[float, ...]
    recall: float
    by_class: dict[str, float]


def try_anchors(
    images: Sequence[BoxImage], classes: Sequence[str], size: tuple[int, int] | None = None
) -> tuple[AnchorRecall, ...]:
    """The usual anchors of both kinds of detectors, and C4's with sides and ratios that suit these boxes; none without boxes.

    size: shorter and longest side, px; without it C4's and a pyramid's own.
    """
    labels = _labels(images)
    if not len(labels):
        return ()

    def tried(name: str, at: tuple[int, int], levels: Sequence[AnchorLevel]) -> AnchorRecall:
        found = anchor_recall(*scaled_boxes(images, *at), levels).best >= 0.5
        by_class = {c: round(100 * float(found[labels == k].mean()), 2) for k, c in enumerate(classes, 1) if (labels == k).any()}
        sides = tuple(side for level in levels for side in level.sizes)
        return AnchorRecall(name, at, sides, tuple(levels[0].ratios), round(100 * float(found.mean()), 2), by_class)

    at = size or C4
    sides, ratios = _suited(scaled_boxes(images, *at)[0])
    ours = [tried("C4, suggested", at, [AnchorLevel(16, sides, each)]) for each in (USUAL, ratios)]
    return (
        tried("C4", at, [AnchorLevel(16, (128, 256, 512), USUAL)]),
        max(ours, key=lambda one: one.recall),
        tried("pyramid", size or FPN, PYRAMID),
    )


def reach(images: Sequence[BoxImage], labels: Sequence[int], size: tuple[int, int] | None = None) -> dict[int, float]:
    """The share of the boxes of each of these labels, percent, that the best anchors fit at a size: C4's, chosen for this class
    alone, or a pyramid's usual ones. Labels without boxes are left out; of more than MOST boxes, so many are taken evenly."""
    at, wide = scaled_boxes(images, *(size or C4)), scaled_boxes(images, *(size or FPN))
    own, found = _labels(images), {}
    for label in labels:
        those = np.flatnonzero(own == label)
        if len(those):
            those = those[np.linspace(0, len(those) - 1, min(len(those), MOST)).astype(int)]
            boxes, sizes = (values[those] for values in at)
            sides, ratios = _suited(boxes)
            fits = [anchor_recall(boxes, sizes, [AnchorLevel(16, sides, each)]).recall for each in (USUAL, ratios)]
            fits.append(anchor_recall(wide[0][those], wide[1][those], PYRAMID).recall)
            found[label] = 100 * max(fits)
    return found


def large_enough(images: Sequence[BoxImage], labels: Sequence[int], size: tuple[int, int]) -> int | None:
    """The least of SIDES above a size's shorter one at which HALF or more of each of these labels is reached, if one is."""
    for side in SIDES:
        longest = round(side * size[1] / size[0])
        if side > size[0] and min(reach(images, labels, (side, longest)).values()) >= HALF:
            return side
    return None


def _labels(images: Sequence[BoxImage]) -> np.ndarray:
    """int64 (N,), of the boxes in scaled_boxes."""
    return np.concatenate([np.zeros(0, np.int64), *(image.objects.labels[~image.objects.crowd] for image in images)])


def _suited(boxes: np.ndarray, count: int = 3) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sides in whole px and ratios that suit boxes (N, 4): the centers of both, found as those of whole anchors are."""
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    side, ratio = np.sqrt(width * height), height / width
    nothing = np.zeros_like(side)
    squares = suggest_anchors(np.stack([nothing, nothing, side, side], axis=1), count)
    shapes = suggest_anchors(np.stack([nothing, nothing, 1 / np.sqrt(ratio), np.sqrt(ratio)], axis=1), count)
    ratios = sorted(round(float(h / w), 2) for w, h in shapes)
    return tuple(dict.fromkeys(float(max(1, round(s))) for s in squares[:, 0])), tuple(dict.fromkeys(ratios))
