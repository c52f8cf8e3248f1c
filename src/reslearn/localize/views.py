"""The views that a network gets: random crops with the object in training, the center or the whole image in evaluation."""

from typing import NamedTuple

import numpy as np
import torch

from reslearn.data.augment import FLIP, LEFT, SIDE, TOP, Draws
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.preprocess import Preprocessing, center_crop, cover
from reslearn.errors import UserError

OBJECT = 20  # which draw says which of several objects a crop is around; apart from those of augment.py
VISIBLE = 0.5  # of a box's area: of one that is cut more than so, too little is left to learn from


class Single(NamedTuple):
    """Images with one class each: labels int64 (N,), from 0; boxes N times float64 (M, 4), all of that class."""

    labels: np.ndarray
    boxes: tuple[np.ndarray, ...]


def of_one_kind(data: BoxSet) -> Single:
    """Labels and boxes of images whose objects are all of one class (crowds are left out).

    Raises UserError, naming the image, for objects of several classes, or none.
    """
    labels, boxes = [], []
    for image in data.images:
        keep = ~image.objects.crowd
        kinds = np.unique(image.objects.labels[keep])
        if len(kinds) != 1:
            has = " and ".join(data.classes[k - 1] for k in kinds) if len(kinds) else "no objects"
            raise UserError(
                f"{image.path}: has {has}: each image needs objects of one class; reslearn localize crops cuts out such windows"
            )
        labels.append(int(kinds[0]) - 1)
        boxes.append(image.objects.boxes[keep])
    return Single(np.array(labels, np.int64), tuple(boxes))


def _place(low: float, high: float, side: int, length: int, draw: float) -> int:
    """Where a crop of `side` begins on an axis of `length`, so that low..high lies in it; or it in low..high, if that is longer."""
    ends = sorted((high - side, low))
    first, last = np.ceil(max(ends[0], 0)), np.floor(min(ends[1], length - side))
    first = min(first, length - side)
    return int(first + np.floor(draw * (max(last, first) - first + 1)))


def training_crop(
    image: np.ndarray, boxes: np.ndarray, size: tuple[int, int], jitter: tuple[int, int], draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A crop uint8 (height, width, C) of an image uint8 (H, W, C), and the boxes (M', 4) of it.

    The shorter side is scaled to between jitter[0] and jitter[1] px, but to no more than lets one object (drawn of several) fit
    into the crop, then the crop is put anywhere around that object, and mirrored with probability 1/2. Boxes are cut to the crop;
    others than that object's are left out where less than half of them is seen. draws: (5,) in [0, 1): side, object, top, left,
    mirror.
    """
    h, w = image.shape[:2]
    height, width = size
    own = min(int(draws[1] * len(boxes)), len(boxes) - 1)
    extent = boxes[own, 2:] - boxes[own, :2]  # width, height
    # `side` is the scaled shorter side; cover() scales by side / min(size) of what just covers the crop
    fits = min(width / extent[0], height / extent[1]) / max(height / h, width / w) * min(size)
    side = int(min(jitter[0] + draws[0] * (jitter[1] - jitter[0] + 1), max(fits, jitter[0]), jitter[1]))
    seen = cover(image, *(round(s * side / min(size)) for s in size))
    rows, columns = seen.shape[:2]
    scaled = boxes * np.array([columns / w, rows / h] * 2)
    x1, y1, x2, y2 = scaled[own]
    top, left = _place(y1, y2, height, rows, draws[2]), _place(x1, x2, width, columns, draws[3])
    crop = seen[top : top + height, left : left + width]
    moved = scaled - np.array([left, top, left, top])
    cut = np.clip(moved, 0, np.array([width, height, width, height]))
    areas, left_of = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (moved, cut))
    keep = left_of >= VISIBLE * areas
    keep[own] = True
    cut = cut[keep]
    if draws[4] < 0.5:
        crop, cut = crop[:, ::-1], np.stack([width - cut[:, 2], cut[:, 1], width - cut[:, 0], cut[:, 3]], axis=1)
    return np.ascontiguousarray(crop), cut


def draws_of(seed: int, epochs: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    """What training_crop draws for images of a batch, (N, 5) in [0, 1): a function of seed, epoch and index alone."""
    draws = Draws(seed, epochs, indices)
    return torch.stack([draws.uniform(which) for which in (SIDE, OBJECT, TOP, LEFT, FLIP)], dim=1).double().numpy()


def view_of(image: np.ndarray, look: Preprocessing, scale: int | None) -> tuple[np.ndarray, np.ndarray]:
    """A view uint8 (h, w, C) of an image uint8 (H, W, C), and (4,), what turns its boxes into the image's: [0:2] added, then
    times [2:4], both x, y.

    scale: None for the center crop, as in classification (1 crop); otherwise the shorter side in px of the whole image.
    """
    h, w = image.shape[:2]
    if scale is None:
        seen = look.shrink(image)
        view = center_crop(seen, *look.size)
        top, left = (seen.shape[0] - look.size[0]) // 2, (seen.shape[1] - look.size[1]) // 2
    else:
        seen = view = cover(image, *(round(s * scale / min(look.size)) for s in look.size))
        top = left = 0
    return view, np.array([left, top, w / seen.shape[1], h / seen.shape[0]])
