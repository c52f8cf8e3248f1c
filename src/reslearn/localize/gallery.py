"""Pictures for a run's report: a localizer's worst and correct predictions, and its training examples."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reslearn.data.boxes.box_set import BoxSet
from reslearn.detect.gallery import FOUND, TRUTH, draw, save_picture
from reslearn.localize.error import IOU, best_overlaps
from reslearn.localize.evaluate import View
from reslearn.localize.views import Single

WORST, RIGHT = 12, 6  # number of pictures
SIDE = 320  # px: longer side of a picture
MOST, COLUMNS, TILE = 24, 8, 128  # sheet of examples: maximum number, columns, px per tile
Example = tuple[np.ndarray, Iterable[np.ndarray], Iterable[np.ndarray]]


def save_gallery(folder: Path, data: BoxSet, truth: Single, views: Mapping[str, View]) -> dict[str, Any]:
    """Draws images with their true boxes and the predicted box of their class: RUN/images/{worst,right}-NN.jpg.

    Uses the last view ("refined" with a second stage, else "dense"). First come the worst images, one of each class in turn (ties:
    the highest score first); then correct ones, evenly from the smallest to the largest IoU. Returns "gallery_view", and "gallery"
    with rows {"image": file, "kind", "name", "label", "predicted", "iou"}. Raises UserError if a file cannot be read or written.
    """
    name, view = list(views.items())[-1]
    overlaps = best_overlaps(view.boxes, truth.labels, truth.boxes)
    scores = view.scores[np.arange(len(overlaps)), truth.labels]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for kind, chosen in (("worst", _worst(overlaps, scores, truth.labels)), ("right", _right(overlaps))):
        for rank, i in enumerate(chosen):
            file = f"images/{kind}-{rank:02d}.jpg"
            boxes = [(box, TRUTH, True) for box in truth.boxes[i]] + [(view.boxes[i, truth.labels[i]], FOUND, True)]
            save_picture(draw(data.images[i].pixels(), boxes, SIDE), folder / file)
            row = {"image": file, "kind": kind, "name": data.images[i].name, "label": data.classes[truth.labels[i]]}
            rows.append(row | {"predicted": data.classes[view.order[i, 0]], "iou": round(float(overlaps[i]), 4)})
    return {"gallery_view": name, "gallery": rows}


def _worst(overlaps: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> list[int]:
    """Indices of up to WORST wrong images, in the gallery's order; overlaps, scores, labels: (N,)."""
    worst = np.lexsort((-scores, overlaps))
    counts = Counter[int]()
    ranked = []
    for rank, i in enumerate(worst[overlaps[worst] < IOU].tolist()):
        ranked.append((counts[int(labels[i])], rank, i))
        counts[int(labels[i])] += 1
    return [i for *_, i in sorted(ranked)[:WORST]]


def _right(overlaps: np.ndarray) -> list[int]:
    """Indices of up to RIGHT correct images, evenly from the smallest to the largest overlap."""
    order = np.argsort(overlaps, kind="stable")
    order = order[overlaps[order] >= IOU]
    return order[np.unique(np.linspace(0, len(order) - 1, min(RIGHT, len(order))).round().astype(int))].tolist()


def save_examples(folder: Path, examples: Iterable[Example]) -> None:
    """Saves a sheet of training examples: RUN/images/examples.jpg. Each is an image, uint8 (H, W, 3), its true boxes and its
    proposals, (4,) each. Raises UserError if it cannot be written."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tiles = [
        draw(pixels, [*((box, FOUND, False) for box in proposals), *((box, TRUTH, False) for box in true)], TILE)
        for pixels, true, proposals in islice(examples, MOST)
    ]
    rows, columns = -(-len(tiles) // COLUMNS), min(COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * (TILE + 2) - 2, rows * (TILE + 2) - 2), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * (TILE + 2), i // COLUMNS * (TILE + 2)))
    save_picture(sheet, folder / "images" / "examples.jpg")
