"""Network inputs: random crops around the object in training, the center crop or the whole image in evaluation."""

from typing import NamedTuple

import numpy as np
import torch

from reslearn.data.augment import FLIP, LEFT, SIDE, TOP, Draws
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.preprocess import Preprocessing, center_crop, cover
from reslearn.errors import UserError

OBJECT = 20  # stream of random numbers, distinct from those of augment.py: the object that a crop is around
VISIBLE = 0.5  # smallest visible share of a box's area in a training crop


class Single(NamedTuple):
    """Images with objects of one class each. labels: int64 (N,), from 0. boxes: N arrays, float64 (M, 4), all of that class."""

    labels: np.ndarray
    boxes: tuple[np.ndarray, ...]


def of_one_kind(data: BoxSet) -> Single:
    """Labels and boxes of images whose objects are all of one class, without crowds.

    Raises UserError, naming the image, for objects of several classes or none.
    """
    labels, boxes = [], []
    for image in data.images:
        keep = ~image.objects.crowd
        kinds = np.unique(image.objects.labels[keep])
        if len(kinds) != 1:
            has = " and ".join(data.classes[k - 1] for k in kinds) if len(kinds) else "no objects"
            raise UserError(
                f"{image.path}: has {has}: each image needs objects of one class; see reslearn localize crops to cut out windows"
            )
        labels.append(int(kinds[0]) - 1)
        boxes.append(image.objects.boxes[keep])
    return Single(np.array(labels, np.int64), tuple(boxes))


def _start(low: float, high: float, side: int, length: int, random: float) -> int:
    """Random start of a crop of `side` on an axis of `length` such that it contains low..high, or lies within it if smaller."""
    ends = sorted((high - side, low))
    first, last = np.ceil(max(ends[0], 0)), np.floor(min(ends[1], length - side))
    first = min(first, length - side)
    return int(first + np.floor(random * (max(last, first) - first + 1)))


def training_crop(
    image: np.ndarray, boxes: np.ndarray, size: tuple[int, int], jitter: tuple[int, int], randoms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop, uint8 (height, width, C), of an image, uint8 (H, W, C), and its boxes (M', 4).

    The shorter side is scaled to between jitter[0] and jitter[1] px, limited so that one randomly chosen object fits into the crop.
    The crop is placed randomly around that object and mirrored with probability 1/2. Boxes are clipped to the crop; those of other
    objects are dropped if less than half is visible. randoms: (5,) in [0, 1): side, object, top, left, mirror.
    """
    h, w = image.shape[:2]
    height, width = size
    own = min(int(randoms[1] * len(boxes)), len(boxes) - 1)
    extent = boxes[own, 2:] - boxes[own, :2]  # width, height
    # `side` is the scaled shorter side; cover() scales by side / min(size), relative to just covering the crop
    fits = min(width / extent[0], height / extent[1]) / max(height / h, width / w) * min(size)
    side = int(min(jitter[0] + randoms[0] * (jitter[1] - jitter[0] + 1), max(fits, jitter[0]), jitter[1]))
    resized = cover(image, *(round(s * side / min(size)) for s in size))
    rows, columns = resized.shape[:2]
    scaled = boxes * np.array([columns / w, rows / h] * 2)
    x1, y1, x2, y2 = scaled[own]
    top, left = _start(y1, y2, height, rows, randoms[2]), _start(x1, x2, width, columns, randoms[3])
    crop = resized[top : top + height, left : left + width]
    moved = scaled - np.array([left, top, left, top])
    clipped = np.clip(moved, 0, np.array([width, height, width, height]))
    areas, visible = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (moved, clipped))
    keep = visible >= VISIBLE * areas
    keep[own] = True
    clipped = clipped[keep]
    if randoms[4] < 0.5:
        crop = crop[:, ::-1]
        clipped = np.stack([width - clipped[:, 2], clipped[:, 1], width - clipped[:, 0], clipped[:, 3]], axis=1)
    return np.ascontiguousarray(crop), clipped


def crop_randoms(seed: int, epochs: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    """The random numbers of training_crop for a batch, (N, 5) in [0, 1): a function of seed, epoch and index."""
    draws = Draws(seed, epochs, indices)
    return torch.stack([draws.uniform(stream) for stream in (SIDE, OBJECT, TOP, LEFT, FLIP)], dim=1).double().numpy()


def view_of(image: np.ndarray, preprocessing: Preprocessing, scale: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A view, uint8 (h, w, C), of an image, uint8 (H, W, C), and the transform (4,) of its boxes to the image's pixels: add [0:2],
    then multiply by [2:4], both x, y.

    scale: shorter side, px, of the whole image; None: the center crop, as in classification (1 crop).
    """
    (h, w), size = image.shape[:2], preprocessing.size
    if scale is None:
        resized = preprocessing.shrink(image)
        view = center_crop(resized, *size)
        top, left = (resized.shape[0] - size[0]) // 2, (resized.shape[1] - size[1]) // 2
    else:
        resized = view = cover(image, *(round(s * scale / min(size)) for s in size))
        top = left = 0
    return view, np.array([left, top, w / resized.shape[1], h / resized.shape[0]])
