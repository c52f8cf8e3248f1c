"""Localization errors against a pixel count and a direct reading of the rule."""

import numpy as np
import pytest

from reslearn.localize.error import is_right, localization_errors, overlap


def pixels(box: np.ndarray, side: int = 20) -> np.ndarray:
    """The pixels of a box in whole numbers."""
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
    some = random_boxes(numbers, 6).reshape(2, 3, 4)
    each = np.stack([[overlap(box, boxes) for box in row] for row in some])
    np.testing.assert_array_equal(overlap(some, boxes), each)
    point = np.zeros(4)
    assert overlap(point, point[None]).tolist() == [0.0]


def test_errors_are_those_of_the_rule_spelled_out() -> None:
    numbers = np.random.default_rng(1)
    n, k, seen = 300, 7, set()
    labels = numbers.integers(0, k, n)
    truths = [random_boxes(numbers, numbers.integers(1, 4)) for _ in range(n)]
    boxes = np.stack([random_boxes(numbers, k) for _ in range(n)])
    for i in range(0, n, 2):  # half of them near
        boxes[i, labels[i]] = np.clip(truths[i][-1] + numbers.integers(-1, 2, 4), 0, None)
    order = np.stack([numbers.permutation(k) for _ in range(n)])
    for guesses in (None, 1, 5):
        found = localization_errors(order, boxes, labels, truths, guesses)
        for i in range(n):
            right = False
            for which in [labels[i]] if guesses is None else order[i][:guesses]:
                for truth in truths[i]:
                    here, there = pixels(boxes[i, which]), pixels(truth)
                    right |= which == labels[i] and 2 * (here & there).sum() >= (here | there).sum()
            assert found[i] == (not right)
            seen.add((guesses, right))
    assert len(seen) == 6, "each kind was wrong and right"


def test_half_is_enough_and_the_class_counts() -> None:
    truth = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    half = np.array([[0.0, 0, 10, 5]])
    assert is_right([3], half, 3, truth)
    assert not is_right([3], np.array([[0.0, 0, 10, 4.99]]), 3, truth)
    assert not is_right([2], half, 3, truth)
    assert is_right([2, 3], np.array([[0.0, 0, 1, 1], [20, 20, 30, 30]]), 3, truth), "any guess, any true box"
    with pytest.raises(ValueError, match="without a true box"):
        is_right([3], half, 3, np.zeros((0, 4)))
