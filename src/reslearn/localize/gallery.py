"""Pictures for the report of a run: where a localizer looks worst and where it is right, and what it learns from."""

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

WORST, RIGHT = 12, 6  # pictures of either kind
SIDE = 320  # px: the longer side of a picture
MOST, COLUMNS, TILE = 24, 8, 128  # pictures on the sheet, side by side, px of each
Example = tuple[np.ndarray, Iterable[np.ndarray], Iterable[np.ndarray]]


def save_gallery(folder: Path, data: BoxSet, truth: Single, found: Mapping[str, View]) -> dict[str, Any]:
    """Draw images with their true boxes and the one guessed for their class: RUN/images/{worst,right}-NN.jpg.

    Of what is found last ("refined" where there is a second stage, else "dense"): first the worst image of each class, then each
    one's second worst, and so on, of the same overlap the one with the highest score; then right ones, evenly from the least to
    the greatest overlap. Returns "gallery_view" and "gallery", `{"image": the file, "kind", "name", "label", "predicted", "iou"}`
    each. Raises UserError where a file cannot be read or written.
    """
    name, view = list(found.items())[-1]
    overlaps = best_overlaps(view.boxes, truth.labels, truth.boxes)
    scores = view.scores[np.arange(len(overlaps)), truth.labels]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for kind, those in (("worst", _worst(overlaps, scores, truth.labels)), ("right", _right(overlaps))):
        for rank, i in enumerate(those):
            file = f"images/{kind}-{rank:02d}.jpg"
            boxes = [(box, TRUTH, True) for box in truth.boxes[i]] + [(view.boxes[i, truth.labels[i]], FOUND, True)]
            save_picture(draw(data.images[i].pixels(), boxes, SIDE), folder / file)
            row = {"image": file, "kind": kind, "name": data.images[i].name, "label": data.classes[truth.labels[i]]}
            rows.append(row | {"predicted": data.classes[view.order[i, 0]], "iou": round(float(overlaps[i]), 4)})
    return {"gallery_view": name, "gallery": rows}


def _worst(overlaps: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> list[int]:
    """The images that are wrong, at most WORST, in the gallery's order; overlaps, scores, labels: (N,)."""
    worst = np.lexsort((-scores, overlaps))
    seen: dict[int, int] = {}
    ranked = []
    for place, i in enumerate(worst[overlaps[worst] < IOU].tolist()):
        ranked.append((seen.setdefault(int(labels[i]), 0), place, i))
        seen[int(labels[i])] += 1
    return [i for *_, i in sorted(ranked)[:WORST]]


def _right(overlaps: np.ndarray) -> list[int]:
    """At most RIGHT of the images that are right, evenly from the least to the greatest overlap."""
    order = np.argsort(overlaps, kind="stable")
    order = order[overlaps[order] >= IOU]
    places = np.unique(np.linspace(0, len(order) - 1, min(RIGHT, len(order))).round().astype(int))
    return order[places].tolist()


def save_examples(folder: Path, examples: Iterable[Example]) -> None:
    """RUN/images/examples.jpg: what the network learns from, side by side; each an image uint8 (H, W, 3), its true boxes and the
    boxes that are given with it, (4,) each. Raises UserError where it cannot be written."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tiles = [
        draw(pixels, [*((box, FOUND, False) for box in given), *((box, TRUTH, False) for box in true)], TILE)
        for pixels, true, given in islice(examples, MOST)
    ]
    rows, columns = -(-len(tiles) // COLUMNS), min(COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * (TILE + 2) - 2, rows * (TILE + 2) - 2), "white")
    for at, tile in enumerate(tiles):
        sheet.paste(tile, (at % COLUMNS * (TILE + 2), at // COLUMNS * (TILE + 2)))
    save_picture(sheet, folder / "images" / "examples.jpg")
