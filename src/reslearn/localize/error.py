"""The localization error of ILSVRC: predicted classes and boxes against the true boxes of an image's class."""

from collections.abc import Sequence

import numpy as np

IOU = 0.5
"""Smallest IoU of a correct box (Russakovsky et al., 2015, section 4.2)."""


def overlap(first: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU (..., M) of boxes (..., 4) with boxes (M, 4), all x1, y1, x2, y2; 0 if both have no area."""
    low, high = first[..., None, :2], first[..., None, 2:]
    shared = np.clip(np.minimum(high, boxes[:, 2:]) - np.maximum(low, boxes[:, :2]), 0, None).prod(axis=-1)
    union = (high - low).prod(axis=-1) + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)


THRESHOLDS = tuple(i / 20 for i in range(21))
"""IoU thresholds of `right_by_iou`."""


def is_right(classes: Sequence[int] | np.ndarray, boxes: np.ndarray, label: int, truth: np.ndarray, iou: float = IOU) -> bool:
    """Whether one of G predictions has the image's class and an IoU of at least `iou` with one of its true boxes.

    classes (G,) and boxes (G, 4), x1, y1, x2, y2: the predictions. truth: (M, 4), the boxes of class `label`.
    Raises ValueError if there is no true box.
    """
    if not len(truth):
        raise ValueError("an image without a true box has no localization error")
    return any(int(k) == label and bool((overlap(box, truth) >= iou).any()) for k, box in zip(classes, boxes, strict=True))


def best_overlaps(boxes: np.ndarray, labels: np.ndarray, truths: Sequence[np.ndarray]) -> np.ndarray:
    """IoU (N,) of the predicted box of each image's true class with the true box it overlaps most. Arguments: see
    localization_errors."""
    own = boxes[np.arange(len(labels)), labels]
    return np.array([overlap(box, truth).max() for box, truth in zip(own, truths, strict=True)])


def localization_errors(
    order: np.ndarray, boxes: np.ndarray, labels: np.ndarray, truths: Sequence[np.ndarray], guesses: int | None, iou: float = IOU
) -> np.ndarray:
    """Whether each of N images is wrong, bool (N,).

    order: int (N, K), each image's classes, most likely first. boxes: (N, K, 4), predicted boxes by class. labels: (N,), true
    classes from 0. truths: N arrays (M, 4). guesses: number of most likely classes that count (1, or 5 as in ILSVRC); None: the
    true class is given, and only its box counts (DRL Table 13).
    """
    wrong = np.zeros(len(labels), bool)
    for i, (label, truth) in enumerate(zip(labels.tolist(), truths, strict=True)):
        classes = np.array([label]) if guesses is None else order[i, :guesses]
        wrong[i] = not is_right(classes, boxes[i, classes], label, truth, iou)
    return wrong
