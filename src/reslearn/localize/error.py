"""The localization error of ILSVRC: guesses of a class and a box, against the true boxes of an image's class."""

from collections.abc import Sequence

import numpy as np

IOU = 0.5
"""From this overlap on, a box is right (Russakovsky et al., 2015, section 4.2)."""


def overlap(some: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of a box (4,), or of several (..., 4), with boxes (M, 4), as x1, y1, x2, y2: (..., M) on [0, 1]; 0 where neither has an
    area."""
    low, high = some[..., None, :2], some[..., None, 2:]
    shared = np.clip(np.minimum(high, boxes[:, 2:]) - np.maximum(low, boxes[:, :2]), 0, None).prod(axis=-1)
    union = (high - low).prod(axis=-1) + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)


ASKED = tuple(i / 20 for i in range(21))
"""Overlaps from 0 to 1 that results say for how many images they are reached."""


def is_right(classes: Sequence[int] | np.ndarray, boxes: np.ndarray, label: int, truth: np.ndarray, iou: float = IOU) -> bool:
    """Whether one of the G guesses has the image's class and overlaps any of its true boxes by `iou` or more.

    classes: of the guesses, (G,); boxes (G, 4) x1, y1, x2, y2; truth (M, 4), all objects of the image's class, `label`.
    Raises ValueError for an image without a true box: nothing could be right.
    """
    if not len(truth):
        raise ValueError("an image without a true box has no localization error")
    return any(int(k) == label and bool((overlap(box, truth) >= iou).any()) for k, box in zip(classes, boxes, strict=True))


def best_overlaps(boxes: np.ndarray, labels: np.ndarray, truths: Sequence[np.ndarray]) -> np.ndarray:
    """IoU (N,) of the box that is guessed for each image's own class with the true box that it overlaps most; the arguments are
    those of localization_errors."""
    own = boxes[np.arange(len(labels)), labels]
    return np.array([overlap(box, truth).max() for box, truth in zip(own, truths, strict=True)])


def localization_errors(
    order: np.ndarray, boxes: np.ndarray, labels: np.ndarray, truths: Sequence[np.ndarray], guesses: int | None, iou: float = IOU
) -> np.ndarray:
    """Which of N images are wrong, bool (N,).

    order: int (N, K), each image's K classes, the likeliest first. boxes: (N, K, 4), the box that would be guessed for class k,
    by k. labels: (N,), true classes from 0. truths: N arrays (M, 4). guesses: how many classes, from the likeliest on, are guessed
    (1, or 5 as in ILSVRC; all K where there are fewer); None: the true class is given, and its box alone is judged (DRL Table 13).
    """
    wrong = np.zeros(len(labels), bool)
    for i, (label, truth) in enumerate(zip(labels.tolist(), truths, strict=True)):
        tried = np.array([label]) if guesses is None else order[i, :guesses]
        wrong[i] = not is_right(tried, boxes[i, tried], label, truth, iou)
    return wrong
