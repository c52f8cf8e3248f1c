"""Localization errors against counted pixels and a direct implementation of the rule."""

import numpy as np
import pytest

from reslearn.localize.error import is_right, localization_errors, overlap


def pixels(box: np.ndarray, side: int = 20) -> np.ndarray:
    """A mask of the pixels of a box with integer corners."""
    mask = np.zeros((side, side), bool)
    x1, y1, x2, y2 = box.astype(int)
    mask[y1:y2, x1:x2] = True
    return mask


def random_boxes(numbers: np.random.Generator, n: int) -> np.ndarray:
    low = numbers.integers(0, 12, (n, 2))
    return np.concatenate([low, low + numbers.integers(3, 9, (n, 2))], 1).astype(float)


def test_overlap_counts_pixels() -> None:
    numbers = np.random.default_rng(0)
    for _ in range(50):
        box, boxes = random_boxes(numbers, 1)[0], random_boxes(numbers, 5)
        slow = [(pixels(box) & pixels(b)).sum() / (pixels(box) | pixels(b)).sum() for b in boxes]
        assert overlap(box, boxes) == pytest.approx(slow)
    several = random_boxes(numbers, 6).reshape(2, 3, 4)
    expected = np.stack([[overlap(box, boxes) for box in row] for row in several])
    np.testing.assert_array_equal(overlap(several, boxes), expected)
    point = np.zeros(4)
    assert overlap(point, point[None]).tolist() == [0.0]


def test_errors_match_a_direct_implementation() -> None:
    numbers = np.random.default_rng(1)
    n, k, seen = 300, 7, set()
    labels = numbers.integers(0, k, n)
    truths = [random_boxes(numbers, numbers.integers(1, 4)) for _ in range(n)]
    boxes = np.stack([random_boxes(numbers, k) for _ in range(n)])
    for i in range(0, n, 2):  # half of them close to a true box
        boxes[i, labels[i]] = np.clip(truths[i][-1] + numbers.integers(-1, 2, 4), 0, None)
    order = np.stack([numbers.permutation(k) for _ in range(n)])
    for guesses in (None, 1, 5):
        wrong = localization_errors(order, boxes, labels, truths, guesses)
        for i in range(n):
            right = False
            for which in [labels[i]] if guesses is None else order[i][:guesses]:
                for truth in truths[i]:
                    here, there = pixels(boxes[i, which]), pixels(truth)
                    right |= which == labels[i] and 2 * (here & there).sum() >= (here | there).sum()
            assert wrong[i] == (not right)
            seen.add((guesses, right))
    assert len(seen) == 6, "correct and wrong images for each number of guesses"


def test_iou_of_half_is_enough_and_the_class_counts() -> None:
    truth = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    half = np.array([[0.0, 0, 10, 5]])
    assert is_right([3], half, 3, truth)
    assert not is_right([3], np.array([[0.0, 0, 10, 4.99]]), 3, truth)
    assert not is_right([2], half, 3, truth)
    assert is_right([2, 3], np.array([[0.0, 0, 1, 1], [20, 20, 30, 30]]), 3, truth), "any guess, any true box"
    with pytest.raises(ValueError, match="without a true box"):
        is_right([3], half, 3, np.zeros((0, 4)))
