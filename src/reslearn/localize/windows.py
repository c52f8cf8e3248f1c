"""Windows of one object each, cut out of images of many: a data set for localization made from one for detection."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reslearn.data.boxes.box_set import Bad, BoxImage, BoxSet, Objects
from reslearn.data.boxes.read import open_boxes
from reslearn.errors import UserError
from reslearn.files import writing

SIDES = (1.2, 2.5)  # range of a window's side, in longer sides of its object
OTHERS = 0.5  # every other object shows less than this share of its area
TRIES = 20  # random windows per object


def window(those: Objects, own: int, height: int, width: int, numbers: np.random.Generator) -> np.ndarray | None:
    """A random square in whole px, int (4,) x1, y1, x2, y2, that contains all of object `own` and less than half of any other;
    None if TRIES attempts found none."""
    boxes = those.boxes
    x1, y1, x2, y2 = boxes[own]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for _ in range(TRIES):
        side = int(np.ceil(max(x2 - x1, y2 - y1) * numbers.uniform(*SIDES)))
        low = np.ceil(np.maximum(0, [x2 - side, y2 - side]))
        high = np.floor(np.minimum([x1, y1], [width - side, height - side]))
        if (high < low).any():
            continue
        left, top = (int(numbers.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
        found = np.array([left, top, left + side, top + side])
        shown = np.clip(np.minimum(boxes[:, 2:], found[2:]) - np.maximum(boxes[:, :2], found[:2]), 0, None).prod(axis=1)
        if (np.delete(shown / areas, own) < OTHERS).all():
            return found
    return None


def cut_out(
    data: str | Path, out: str | Path, *, per_class: int = 600, tested: int = 100, seed: int = 0, bad: Bad = "fail"
) -> dict[str, dict[str, int]]:
    """Write OUT/SPLIT/CLASS/NAME.png with OUT/SPLIT/_annotations.coco.json: windows with one whole object each.

    The folder is a data set for localization, and one of class folders for classification. Splits stay as they are; a single file
    is train. Training objects are used repeatedly until there are `per_class` windows of each class; others once, at most `tested`
    per class. Returns the number of windows by split and class. Raises UserError if OUT exists, a class has no window in train, or
    its name cannot be a folder's.
    """
    sets, folder = open_boxes(data, bad=bad), Path(out)
    if folder.exists():
        raise UserError(f"{folder} already exists: choose another --out")
    if wrong := next((kind for kind in next(iter(sets.values())).classes if Path(kind).name != kind), None):
        raise UserError(f"{data}: class '{wrong}' cannot be a folder's name: rename it")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts: dict[str, dict[str, int]] = {}
    with writing(folder):
        try:
            for place, (split, each) in enumerate(sets.items()):
                numbers, name = np.random.default_rng([seed, place]), "train" if split == "all" else split
                many = name == "train"
                counts[name] = _write(each, partial / name, per_class if many else tested, 1000 if many else 1, numbers)
                if many and (empty := next((k for k, n in counts[name].items() if not n), None)):
                    raise UserError(f"{data}: no window contains an object of class '{empty}' alone")
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return counts


def _write(data: BoxSet, folder: Path, most: int, rounds: int, numbers: np.random.Generator) -> dict[str, int]:
    """The windows of one split."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    counts = dict.fromkeys(data.classes, 0)
    for label, kind in enumerate(data.classes, 1):
        objects = [(image, i) for image in data.images for i in np.flatnonzero(image.objects.labels == label).tolist()]
        for _ in range(rounds):
            before = counts[kind]
            for at in numbers.permutation(len(objects)).tolist():
                image, own = objects[at]
                if counts[kind] >= most or image.objects.crowd[own]:
                    continue
                found = window(image.objects, own, image.height, image.width, numbers)
                if found is None:
                    continue
                counts[kind] += 1
                file = f"{kind}/{Path(image.name).name}-{own}-{counts[kind]}.png"
                (folder / kind).mkdir(parents=True, exist_ok=True)  # a class without windows has no folder
                _cut(image, found).save(folder / file)
                x1, y1, x2, y2 = (image.objects.boxes[own] - np.tile(found[:2], 2)).tolist()
                side = int(found[2] - found[0])
                number = len(images) + 1
                images.append({"id": number, "file_name": file, "height": side, "width": side})
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                annotations.append({"id": number, "image_id": number, "category_id": label, **box})
            if counts[kind] >= most or counts[kind] == before:
                break
    kinds = [{"id": i, "name": name} for i, name in enumerate(data.classes, 1)]
    document = {"images": images, "annotations": annotations, "categories": kinds}
    (folder / "_annotations.coco.json").write_text(json.dumps(document))
    return counts


def _cut(image: BoxImage, found: np.ndarray) -> Image.Image:
    x1, y1, x2, y2 = found.tolist()
    return Image.fromarray(np.ascontiguousarray(image.pixels()[y1:y2, x1:x2]))
