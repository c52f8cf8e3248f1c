"""Masks and run lengths against pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as theirs

from reslearn.data.boxes.masks import Runs, draw, extent, pack, parse, runs_of, turn, unpack

POINT = st.tuples(st.floats(-8, 40), st.floats(-8, 40))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # raised by pycocotools
@settings(max_examples=150, deadline=None)
@given(points=st.lists(POINT, min_size=3, max_size=8), height=st.integers(1, 32), width=st.integers(1, 32), whole=st.booleans())
def test_polygons_match_pixel_for_pixel(points: list[tuple[float, float]], height: int, width: int, whole: bool) -> None:
    polygon = np.array([[round(v) if whole else v for v in point] for point in points], np.float64)
    corners = np.trunc(5 * polygon + 0.5)
    if (corners == np.roll(corners, 1, axis=0)).all(axis=1).any():
        return  # pycocotools divides 0 by 0 for coinciding corners
    expected = theirs.decode(theirs.frPyObjects([polygon.ravel().tolist()], height, width))[:, :, 0]
    np.testing.assert_array_equal(draw((polygon,), height, width), expected)


def test_repeated_corners_do_not_change_the_mask() -> None:
    triangle = np.array([[2, 2], [20, 2], [2, 20]], np.float64)
    np.testing.assert_array_equal(draw((np.repeat(triangle, 2, axis=0),), 30, 30), draw((triangle,), 30, 30))
    assert draw((triangle, triangle + 5), 30, 30).sum() > draw((triangle,), 30, 30).sum()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.floats(0.01, 1))
def test_runs(height: int, width: int, seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    if not mask.any():
        return
    runs = runs_of(mask)
    np.testing.assert_array_equal(draw(runs, height, width), mask)
    packed = theirs.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert unpack(packed) == runs.counts.tolist() and pack(runs.counts) == packed
    for counts in (packed, runs.counts.tolist()):
        parsed = parse({"counts": counts, "size": [height, width]}, height, width)
        assert isinstance(parsed, Runs) and parsed.counts.tolist() == runs.counts.tolist()


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=9))
def test_packing_counts_is_lossless(counts: list[int]) -> None:
    assert unpack(pack(counts)) == counts


@given(st.text(alphabet=st.characters(min_codepoint=40, max_codepoint=120), max_size=12))
def test_any_packed_text_is_numbers_or_an_error(text: str) -> None:
    try:
        assert all(isinstance(n, int) for n in unpack(text))
    except ValueError as why:
        assert "packed counts" in str(why)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_polygons_and_runs_rotate_alike(orientation: int) -> None:
    corners = np.array([[3, 2], [17, 2], [17, 9], [3, 9]], np.float64)
    height, width = 12, 20
    stored = draw((corners,), height, width)
    upright = (height, width) if orientation < 5 else (width, height)
    turned = draw(turn((corners,), orientation, height, width), *upright)
    np.testing.assert_array_equal(draw(turn(runs_of(stored), orientation, height, width), *upright), turned)


def test_invalid_polygons() -> None:
    for numbers, text in (
        ([1, 2, 3, 4, 5, 6, 7], "polygon 0 has 7 coordinates: must be x, y pairs"),
        ([0, 0, 2e6, 0, 0, 5], "has a coordinate of 2e"),
    ):
        with pytest.raises(ValueError, match=text):
            parse([numbers], 40, 60)


@settings(max_examples=20, deadline=None)
@given(left=st.integers(0, 20), top=st.integers(0, 20), width=st.integers(2, 20), height=st.integers(2, 20))
def test_the_bounding_box_of_polygons_and_runs(left: int, top: int, width: int, height: int) -> None:
    right, bottom = left + width, top + height
    square = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
    assert extent((square[:3], square[1:])).tolist() == [left, top, right, bottom]
    mask = np.zeros((44, 48), bool)
    mask[top:bottom, left:right] = True
    mask[top + 1 : bottom, left + 1] = False
    assert extent(runs_of(mask)).tolist() == theirs_box(mask) == [left, top, right, bottom]


def theirs_box(mask: np.ndarray) -> list[float]:
    x, y, width, height = theirs.toBbox(theirs.encode(np.asfortranarray(mask.astype(np.uint8)))).tolist()
    return [x, y, x + width, y + height]
