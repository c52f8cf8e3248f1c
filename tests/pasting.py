"""A set for masks: items of clothing (Fashion-MNIST's, from the package's sample) pasted on photos, written as COCO.

Each item keeps its own gray pixels, a little lifted, and is scaled, turned and laid over what is there. Its segmentation is what
of it can be seen, as COCO's annotators draw it: one polygon for each of its parts, along the edges of the pixels, so that drawn
again it is the same mask, pixel for pixel. Splits share neither items nor photos.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from reslearn.data import sets

CLASSES = ("T-shirt/top", "Trouser", "Bag", "Ankle boot")
SCALES = (0.4, 0.7)  # of the image's side, that the 28 pixels of an item take before they are turned
LEAST = 0.6  # of an item must be seen
_TRIES = 12  # places an item is tried at


@dataclass(frozen=True)
class Item:
    """One item in its 28 x 28 pixels: its class (a place in CLASSES), and gray uint8."""

    label: int
    gray: np.ndarray


def items(split: str, part: slice) -> list[Item]:
    """A part of each class of the sample's split (train: 600 images a class, test: 100)."""
    opened = sets.open("fashion-sample")
    images = opened.splits[split]
    assert images.pixels is not None
    pixels, found = images.pixels[:, 0].numpy(), []
    for label, name in enumerate(CLASSES):
        own = np.flatnonzero(images.labels == opened.classes.index(name))[part]
        found += [Item(label, pixels[i]) for i in own]
    return found


def silhouette(gray: np.ndarray) -> np.ndarray:
    """bool (H, W): the largest part that is not the black ground, with its holes filled (dark cloth, a bag's handle)."""
    parts, n = ndimage.label(gray > 12)
    sizes = ndimage.sum_labels(np.ones(gray.shape), parts, np.arange(1, n + 1))
    return ndimage.binary_fill_holes(parts == 1 + np.argmax(sizes))


def outlines(mask: np.ndarray) -> tuple[list[np.ndarray], bool]:
    """Outlines of a bool (H, W): int64 (P, 2) of x, y along the edges of the pixels, a part of it each; and whether it has holes.

    Parts that touch at a corner only are apart. Outlines of holes are left out.
    """
    padded = np.pad(mask, 1)
    ahead: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner -> the corners that edges lead to, the mask on their right
    for (dy, dx), (start, step) in _EDGES.items():
        there = padded & ~np.roll(padded, (-dy, -dx), (0, 1))
        for y, x in np.argwhere(there) - 1:
            ahead.setdefault((int(x) + start[0], int(y) + start[1]), []).append(step)
    found, holes = [], False
    while ahead:
        first = min(ahead)
        at, step, points = first, ahead[first][0], []
        while True:
            leaving = ahead[at]
            turn = (-step[1], step[0])  # to the right, where two parts meet at this corner: round the same one
            following = turn if turn in leaving else step if step in leaving else leaving[0]
            leaving.remove(following)
            if not leaving:
                del ahead[at]
            if following != step or not points:
                points.append(at)
            step, at = following, (at[0] + following[0], at[1] + following[1])
            if at == first:
                break
        outline = np.array(points, np.int64)
        if doubled_area(outline) > 0:
            found.append(outline)
        else:
            holes = True
    return found, holes


# neighbor that is outside, (down, right) -> the corner of the pixel where its edge starts, and where that leads: clockwise
_EDGES = {(-1, 0): ((0, 0), (1, 0)), (0, 1): ((1, 0), (0, 1)), (1, 0): ((1, 1), (-1, 0)), (0, -1): ((0, 1), (0, -1))}


def drawn(item: Item, numbers: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An item as it is pasted into an image of this side: float64 (h, w, 3) on [0, 255] and alpha (h, w) on [0, 1]."""
    scale = side * numbers.uniform(*SCALES) / 28
    angle = float(numbers.uniform(-35, 35))
    flip = numbers.random() < 0.5
    size = (round(28 * scale),) * 2
    layers = []
    for layer in (item.gray, silhouette(item.gray).astype(np.uint8) * 255):
        image = Image.fromarray(layer[:, ::-1] if flip else layer).resize(size, Image.Resampling.BICUBIC)
        layers.append(np.asarray(image.rotate(angle, Image.Resampling.BICUBIC, expand=True), np.float64) / 255)
    gray, alpha = layers
    rows, columns = (np.flatnonzero((alpha >= 0.5).any(axis)) for axis in (1, 0))
    inside = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return 255 * (0.25 + 0.75 * gray[inside])[..., None].repeat(3, axis=2), alpha[inside]


def compose(
    photo: Image.Image, stock: Sequence[Item], numbers: np.random.Generator, side: int, most: int
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """uint8 (side, side, 3) and the items on it, 1 to `most`, as they lie: (class, what is seen of it, bool (side, side)).

    A place that would hide more than 1 - LEAST of an item below, or leave a hole in what is seen, is not taken.
    """
    share = numbers.uniform(0.5, 1) * min(photo.size)
    left, top = (numbers.uniform(0, length - share) for length in photo.size)
    ground = photo.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + share, top + share))
    canvas, laid, full = np.asarray(ground, np.float64).copy(), list[tuple[int, np.ndarray]](), list[int]()
    for _ in range(numbers.integers(1, most + 1)):
        item = stock[numbers.integers(len(stock))]
        pixels, alpha = drawn(item, numbers, side)
        height, width = alpha.shape
        if max(height, width) > side:
            continue
        for _ in range(_TRIES):
            y, x = (int(numbers.integers(side - length + 1)) for length in (height, width))
            place = slice(y, y + height), slice(x, x + width)
            own = np.zeros((side, side), bool)
            own[place] = alpha >= 0.5
            seen = [mask & ~own for _, mask in laid]
            if all(now.sum() >= LEAST * whole and not outlines(now)[1] for now, whole in zip(seen, full, strict=True)):
                canvas[place] += alpha[..., None] * (pixels - canvas[place])
                laid = [(label, now) for (label, _), now in zip(laid, seen, strict=True)] + [(item.label, own)]
                full.append(int(own.sum()))
                break
    return np.clip(np.round(canvas), 0, 255).astype(np.uint8), laid


def paste(root: Path, photos: Sequence[Path], images: Mapping[str, int], *, side: int = 128, most: int = 4, seed: int = 0) -> Path:
    """Write a set with so many images a split (train, val, test) into a new folder, which is returned.

    Every third of the photos is of one split in turn: half of them train, the others val and test.
    """
    stocks = {"train": ("train", slice(None)), "val": ("test", slice(0, 50)), "test": ("test", slice(50, None))}
    grounds = {"train": [*photos[::4], *photos[2::4]], "val": photos[1::4], "test": photos[3::4]}
    for split, count in images.items():
        numbers = np.random.default_rng([seed, list(stocks).index(split)])
        stock = items(*stocks[split])
        (root / split).mkdir(parents=True)
        entries, annotations = [], list[dict[str, Any]]()
        for i in range(1, count + 1):
            with Image.open(grounds[split][numbers.integers(len(grounds[split]))]) as photo:
                pixels, laid = compose(photo, stock, numbers, side, most)
            Image.fromarray(pixels).save(root / split / f"{i:04d}.png")
            entries.append({"id": i, "file_name": f"{i:04d}.png", "height": side, "width": side})
            annotations += [annotation(len(annotations) + n, i, *each) for n, each in enumerate(laid, 1)]
        (root / "annotations").mkdir(exist_ok=True)
        categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)]
        document = {"images": entries, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return root


def annotation(id: int, image: int, label: int, mask: np.ndarray) -> dict[str, Any]:
    """COCO's, of an item that is seen at mask. Polygons have no holes: one between legs that touch is taken as part of it."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    x, y, width, height = columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1
    polygons, _ = outlines(mask)
    return {
        "id": id,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [int(x), int(y), int(width), int(height)],
        "area": sum(doubled_area(polygon) for polygon in polygons) // 2,
        "iscrowd": 0,
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
    }


def doubled_area(points: np.ndarray) -> int:
    """Twice the area inside (P, 2) of x, y, above 0 where they go clockwise in an image (the shoelace formula)."""
    x, y = points.T
    return int((x * np.roll(y, -1) - y * np.roll(x, -1)).sum())
