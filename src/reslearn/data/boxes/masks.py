"""Converts segmentations (polygons and run lengths) to masks, pixel for pixel like the COCO API."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reslearn.data.images.files import upright


@dataclass(frozen=True, eq=False)
class Runs:
    """A column-major run-length encoded mask. counts: int64, lengths of alternating runs of 0 and 1, summing to height x width."""

    height: int
    width: int
    counts: np.ndarray


Segmentation = tuple[np.ndarray, ...] | Runs
"""Polygons, each float64 (P, 2) of x, y in pixels with P >= 3, whose union is the object; or run lengths."""


def as_bytes(segmentation: Segmentation | None) -> bytes:
    """An unambiguous serialization, for hashing."""
    arrays = () if segmentation is None else (segmentation.counts,) if isinstance(segmentation, Runs) else segmentation
    return len(arrays).to_bytes(8, "little") + b"".join(len(array).to_bytes(8, "little") + array.tobytes() for array in arrays)


def parse(value: Any, height: int, width: int) -> Segmentation | None:
    """Parses COCO's `segmentation`. Returns None for an empty list, which some tools write for boxes without masks.

    Raises ValueError if a polygon has an odd number of coordinates, fewer than three points, no area, non-finite coordinates or no
    overlap with the image, or if runs do not fill the image.
    """
    if isinstance(value, dict):
        return _runs(value, height, width)
    if not isinstance(value, list):
        raise ValueError(f"segmentation must be a list of polygons or an object with counts and size, not {type(value).__name__}")
    polygons = tuple(_polygon(i, numbers, height, width) for i, numbers in enumerate(value))
    return polygons or None


def _polygon(i: int, numbers: Any, height: int, width: int) -> np.ndarray:
    if not isinstance(numbers, list) or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        raise ValueError(f"polygon {i} is not a list of numbers")
    if len(numbers) % 2 or len(numbers) < 6:
        raise ValueError(f"polygon {i} has {len(numbers)} coordinates: must be x, y pairs of at least three points")
    try:
        points = np.array(numbers, np.float64).reshape(-1, 2)
    except OverflowError:
        raise ValueError(f"polygon {i} has a coordinate that is too large") from None
    if not np.isfinite(points).all():
        raise ValueError(f"polygon {i} has a coordinate that is not finite")
    low, high = points.min(0), points.max(0)
    if (high <= low).any():
        raise ValueError(f"polygon {i} has no area")
    if (high <= 0).any() or low[0] >= width or low[1] >= height:
        raise ValueError(f"polygon {i} is outside the {width} x {height} image")
    if (largest := np.abs(points).max()) > 1e6:
        raise ValueError(f"polygon {i} has a coordinate of {largest:g}")
    return points


def _runs(value: dict[str, Any], height: int, width: int) -> Runs:
    if "counts" not in value or "size" not in value:
        raise ValueError("run lengths need counts and size")
    size, counts = value["size"], value["counts"]
    if size != [height, width]:
        raise ValueError(f"size is {str(size)[:40]}, but the image has height {height} and width {width}")
    if isinstance(counts, str):
        counts = unpack(counts)
    elif not isinstance(counts, list) or any(type(n) is not int for n in counts):
        raise ValueError("counts is neither a list of integers nor a string")
    if any(n < 0 or n > height * width for n in counts) or sum(counts) != height * width:
        raise ValueError(f"counts do not add up to the {height * width} pixels of the image")
    if sum(counts[1::2]) == 0:
        raise ValueError("counts describe an empty mask")
    return Runs(height, width, np.array(counts, np.int64))


def unpack(text: str) -> list[int]:
    """Decodes COCO's packed counts to run lengths (maskApi.c, rleFrString). Raises ValueError if they are invalid.

    Each number is stored in groups of five bits, lowest first, as characters from "0" on; a sixth bit marks that more groups
    follow. From the fourth number on, the difference from the second to last number is stored.
    """
    counts: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"packed counts are invalid or truncated at {character!r}")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("packed counts are truncated")
    return counts


def pack(counts: Sequence[int] | np.ndarray) -> str:
    """Encodes run lengths as COCO's packed counts, the inverse of `unpack`."""
    packed = []
    for i, count in enumerate(counts):
        number = int(count) - (int(counts[i - 2]) if i > 2 else 0)
        while True:
            bits, number = number & 31, number >> 5
            last = number == (-1 if bits & 16 else 0)
            packed.append(chr(48 + bits + (0 if last else 32)))
            if last:
                break
    return "".join(packed)


def runs_of(mask: np.ndarray) -> Runs:
    """Encodes a mask, bool (H, W), as run lengths."""
    height, width = mask.shape
    flat = np.concatenate([[False], mask.astype(bool).T.reshape(-1)])
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return Runs(height, width, np.diff(np.concatenate([[0], ends, [mask.size]])).astype(np.int64))


def draw(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """The mask of a segmentation: bool (height, width)."""
    if isinstance(segmentation, Runs):
        ones = np.arange(len(segmentation.counts)) % 2 == 1
        return np.repeat(ones, segmentation.counts).reshape(width, height).T.copy()
    mask = np.zeros((height, width), bool)
    for polygon in segmentation:
        mask |= _fill(polygon, height, width)
    return mask


def _fill(polygon: np.ndarray, height: int, width: int) -> np.ndarray:
    """Rasterizes a polygon like maskApi.c (rleFrPoly): traces its outline on a 5x finer grid, then fills column by column."""
    scale = 5
    corners = np.trunc(scale * polygon + 0.5).astype(np.int64)
    xs, ys = [], []
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy = abs(x1 - x0), abs(y1 - y0)
        flat = dx >= dy
        flip = x0 > x1 if flat else y0 > y1
        if flip:
            x0, y0, x1, y1 = x1, y1, x0, y0
        steps = np.arange(max(dx, dy) + 1)[:: -1 if flip else 1]
        slope = ((y1 - y0) / dx if flat else (x1 - x0) / dy) if len(steps) > 1 else 0.0
        along, across = (x0, y0) if flat else (y0, x0)
        other = np.trunc(across + slope * steps + 0.5).astype(np.int64)
        xs.append(along + steps if flat else other)
        ys.append(other if flat else along + steps)
    x, y = np.concatenate(xs), np.concatenate(ys)
    moved = np.flatnonzero(x[1:] != x[:-1]) + 1
    column = (np.minimum(x[moved], x[moved - 1]) + 0.5) / scale - 0.5
    row = np.ceil(np.clip((np.minimum(y[moved], y[moved - 1]) + 0.5) / scale - 0.5, 0, height))
    inside = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    crossings = (column[inside] * height + row[inside]).astype(np.int64)
    times = np.bincount(crossings, minlength=height * width + 1)[: height * width]
    return (np.cumsum(times) % 2 == 1).reshape(width, height).T


def extent(segmentation: Segmentation) -> np.ndarray:
    """The bounding box, float64 (4,): x1, y1, x2, y2 in continuous coordinates."""
    if isinstance(segmentation, Runs):
        rows, columns = (np.flatnonzero(draw(segmentation, segmentation.height, segmentation.width).any(axis)) for axis in (1, 0))
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
    points = np.concatenate(segmentation)
    return np.concatenate([points.min(0), points.max(0)])


def turn(segmentation: Segmentation, orientation: int, height: int, width: int) -> Segmentation:
    """Rotates the segmentation of a stored image of this height and width upright. orientation: EXIF's, 1 to 8."""
    if isinstance(segmentation, Runs):
        return runs_of(upright(draw(segmentation, height, width), orientation))
    return tuple(turn_points(polygon, orientation, height, width) for polygon in segmentation)


def turn_points(points: np.ndarray, orientation: int, height: int, width: int) -> np.ndarray:
    """Rotates points, float64 (P, 2) of x, y in a stored image, upright, like `images.files.read`."""
    x, y = points.T
    if orientation >= 5:
        x, y, height, width = y, x, width, height
    x = width - x if orientation in (2, 3, 6, 7) else x
    return np.stack([x, height - y if orientation in (3, 4, 7, 8) else y], axis=1)


def turn_box(box: Sequence[float], orientation: int, height: int, width: int) -> list[float]:
    """Rotates a box, x1, y1, x2, y2 in a stored image, upright. Non-finite values stay non-finite."""
    corners = turn_points(np.array(box, np.float64).reshape(2, 2), orientation, height, width)
    flip_x, flip_y = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    (x1, y1), (x2, y2) = corners.tolist()
    return [x2 if flip_x else x1, y2 if flip_y else y1, x1 if flip_x else x2, y1 if flip_y else y2]
