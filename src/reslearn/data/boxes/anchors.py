"""Measures anchor recall, and fits anchors to boxes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from reslearn.data.boxes.box_set import BoxImage


class AnchorLevel(NamedTuple):
    """Anchors at every `stride` pixels: each of `sizes` (square root of the area) with each of `ratios` (height / width)."""

    stride: int
    sizes: Sequence[float]
    ratios: Sequence[float] = (0.5, 1.0, 2.0)

    def shapes(self) -> np.ndarray:
        """(A, 2): width and height, rounded to even pixels like torchvision's AnchorGenerator."""
        sizes, ratios = (np.array(values, np.float64) for values in (self.sizes, self.ratios))
        root = np.sqrt(ratios)[:, None]
        return 2 * np.round(np.stack([(sizes / root).ravel(), (sizes * root).ravel()], axis=1) / 2)


class AnchorFit(NamedTuple):
    """recall: the fraction of boxes whose best anchor reaches the IoU threshold. best (N,): the IoU of each box's best anchor."""

    recall: float
    best: np.ndarray


def scaled_boxes(images: Iterable[BoxImage], shorter: int, longer: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes (N, 4) scaled to the network's input, and (N, 2), the scaled height and width of each box's image.

    The shorter side becomes `shorter` px unless the longer side would exceed `longer`. Crowds are left out.
    """
    boxes, sizes = [np.zeros((0, 4))], [np.zeros((0, 2))]
    for image in images:
        sides = np.array([image.height, image.width], np.float64)
        scale = min(shorter / sides.min(), longer / sides.max())
        scaled = image.objects.boxes[~image.objects.crowd] * scale
        boxes.append(scaled)
        sizes.append(np.repeat(np.floor(sides * scale)[None], len(scaled), axis=0))
    return np.concatenate(boxes), np.concatenate(sizes)


def anchor_recall(boxes: np.ndarray, sizes: np.ndarray, levels: Sequence[AnchorLevel], iou: float = 0.5) -> AnchorFit:
    """Measures anchors centered on multiples of the stride against boxes (N, 4) in images of sizes (N, 2), height and width.

    Tries only the nearest center, where an anchor's overlap is largest. Raises ValueError without boxes.
    """
    if not len(boxes):
        raise ValueError("no boxes to fit anchors to")
    best = np.zeros(len(boxes))
    for level in levels:
        last = np.ceil(sizes[:, ::-1] / level.stride) - 1
        center = np.clip(np.round((boxes[:, :2] + boxes[:, 2:]) / 2 / level.stride), 0, last) * level.stride
        for shape in level.shapes():
            low, high = center - shape / 2, center + shape / 2
            shared = np.clip(np.minimum(high, boxes[:, 2:]) - np.maximum(low, boxes[:, :2]), 0, None).prod(axis=1)
            union = shape.prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared
            best = np.maximum(best, shared / union)
    return AnchorFit(float((best >= iou).mean()), best)


def suggest_anchors(boxes: np.ndarray, count: int = 9, *, seed: int = 0, rounds: int = 100) -> np.ndarray:
    """Fits anchor shapes to boxes (N, 4): returns widths and heights (count, 2), sorted by area.

    Seeded k-means with k-means++ initialization and 1 - IoU of centered boxes as the distance (Redmon and Farhadi 2017, section 2).
    Returns fewer rows if there are fewer distinct boxes. Raises ValueError without boxes.
    """
    shapes = boxes[:, 2:] - boxes[:, :2]
    if not len(shapes):
        raise ValueError("no boxes to fit anchors to")
    rng = np.random.default_rng(seed)
    centers = shapes[rng.integers(len(shapes))][None]
    while len(centers) < min(count, len(np.unique(shapes, axis=0))):
        distance = (1 - shape_iou(shapes, centers).max(axis=1)).clip(0)
        weights = distance**2 if distance.any() else np.ones(len(shapes))
        centers = np.concatenate([centers, shapes[rng.choice(len(shapes), p=weights / weights.sum())][None]])
    nearest = np.full(len(shapes), -1)
    for _ in range(rounds):
        before, nearest = nearest, shape_iou(shapes, centers).argmax(axis=1)
        if np.array_equal(before, nearest):
            break
        centers = np.stack([shapes[nearest == k].mean(axis=0) if (nearest == k).any() else c for k, c in enumerate(centers)])
    return centers[np.argsort(centers.prod(axis=1), kind="stable")]


def shape_iou(shapes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU (N, M) of centered boxes with widths and heights (N, 2) and (M, 2)."""
    shared = np.minimum(shapes[:, None], others[None]).prod(axis=2)
    return shared / (shapes.prod(axis=1)[:, None] + others.prod(axis=1)[None] - shared)
