"""Cuts windows with one object each out of a detection set, to make a data set for localization."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reslearn.data.boxes.box_set import Bad, BoxSet, Objects
from reslearn.data.boxes.read import open_boxes
from reslearn.errors import UserError
from reslearn.files import writing

SIDES = (1.2, 2.5)  # range of a window's side, relative to its object's longer side
OTHERS = 0.5  # visible share of any other object, exclusive maximum
TRIES = 20  # attempts per object


def window(objects: Objects, own: int, height: int, width: int, rng: np.random.Generator) -> np.ndarray | None:
    """A random square, int (4,), x1, y1, x2, y2, px, that contains all of object `own` and less than half of any other; None if
    TRIES attempts failed."""
    boxes = objects.boxes
    x1, y1, x2, y2 = boxes[own]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for _ in range(TRIES):
        side = int(np.ceil(max(x2 - x1, y2 - y1) * rng.uniform(*SIDES)))
        low = np.ceil(np.maximum(0, [x2 - side, y2 - side]))
        high = np.floor(np.minimum([x1, y1], [width - side, height - side]))
        if (high < low).any():
            continue
        left, top = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
        square = np.array([left, top, left + side, top + side])
        visible = np.clip(np.minimum(boxes[:, 2:], square[2:]) - np.maximum(boxes[:, :2], square[:2]), 0, None).prod(axis=1)
        if (np.delete(visible / areas, own) < OTHERS).all():
            return square
    return None


def cut_out(
    data: str | Path, out: str | Path, *, per_class: int = 600, tested: int = 100, seed: int = 0, bad: Bad = "fail"
) -> dict[str, dict[str, int]]:
    """Writes windows with one whole object each: OUT/SPLIT/CLASS/NAME.png and OUT/SPLIT/_annotations.coco.json.

    The result is a data set for localization and, by its class folders, for classification. Splits are kept; a single file becomes
    train. Training objects are used repeatedly until each class has `per_class` windows; others once, at most `tested` per class.
    Returns the number of windows by split and class. Raises UserError if OUT exists, a class has no window in train, or a class
    name is not a valid folder name.
    """
    sets, folder = open_boxes(data, bad=bad), Path(out)
    if folder.exists():
        raise UserError(f"{folder} already exists: choose another --out")
    if wrong := next((kind for kind in next(iter(sets.values())).classes if Path(kind).name != kind), None):
        raise UserError(f"{data}: class '{wrong}' is not a valid folder name: rename it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts: dict[str, dict[str, int]] = {}
    with writing(folder):
        try:
            for i, (split, one) in enumerate(sets.items()):
                rng, name = np.random.default_rng([seed, i]), "train" if split == "all" else split
                train = name == "train"
                counts[name] = _write(one, partial / name, per_class if train else tested, 1000 if train else 1, rng)
                if train and (empty := next((k for k, n in counts[name].items() if not n), None)):
                    raise UserError(f"{data}: no window contains an object of class '{empty}' alone")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return counts


def _write(data: BoxSet, folder: Path, most: int, rounds: int, rng: np.random.Generator) -> dict[str, int]:
    """Writes the windows of one split. Returns their number by class."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    counts = dict.fromkeys(data.classes, 0)
    for label, kind in enumerate(data.classes, 1):
        objects = [(image, i) for image in data.images for i in np.flatnonzero(image.objects.labels == label).tolist()]
        for _ in range(rounds):
            before = counts[kind]
            for i in rng.permutation(len(objects)).tolist():
                image, own = objects[i]
                if counts[kind] >= most or image.objects.crowd[own]:
                    continue
                square = window(image.objects, own, image.height, image.width, rng)
                if square is None:
                    continue
                counts[kind] += 1
                file = f"{kind}/{Path(image.name).name}-{own}-{counts[kind]}.png"
                (folder / kind).mkdir(parents=True, exist_ok=True)  # no folder for a class without windows
                left, top, right, bottom = square.tolist()
                Image.fromarray(np.ascontiguousarray(image.pixels()[top:bottom, left:right])).save(folder / file)
                x1, y1, x2, y2 = (image.objects.boxes[own] - np.tile(square[:2], 2)).tolist()
                side, number = right - left, len(images) + 1
                images.append({"id": number, "file_name": file, "height": side, "width": side})
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                annotations.append({"id": number, "image_id": number, "category_id": label, **box})
            if counts[kind] >= most or counts[kind] == before:
                break
    kinds = [{"id": i, "name": name} for i, name in enumerate(data.classes, 1)]
    document = {"images": images, "annotations": annotations, "categories": kinds}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    return counts
