"""Detections as COCO's results: what pycocotools' loadRes and evaluation servers take."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.masks import Runs, pack
from reslearn.errors import UserError


def segmentation(runs: Runs) -> dict[str, Any]:
    """A mask as COCO's packed runs."""
    return {"size": [runs.height, runs.width], "counts": pack(runs.counts)}


def entries(found: dict[str, Any], image: int, categories: Sequence[int], file: str | None = None) -> list[dict[str, Any]]:
    """One image's detections, best first: image_id, category_id, bbox (x, y, width, height), score, and segmentation, if any.

    categories: ids by label, from 1. file: written as file_name, where image ids are ours.
    """
    named = {} if file is None else {"file_name": file}
    rows = []
    for i, (label, score) in enumerate(zip(found["labels"], found["scores"], strict=True)):
        x1, y1, x2, y2 = found["boxes"][i].tolist()
        row = {"image_id": image, "category_id": categories[label - 1], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
        rows.append(row | ({"segmentation": segmentation(found["masks"][i])} if "masks" in found else {}) | named)
    return rows


def categories(data: BoxSet) -> Sequence[int]:
    """The set's own category ids by label, or of one without (VOC) the labels themselves. Raises UserError where a class of the
    detector has no category in the set's file.
    """
    if data.images[0].id is None:
        return range(1, len(data.classes) + 1)
    if data.category_ids is None:
        raise UserError(f"{data.name}: has no category for some of the classes {', '.join(data.classes)}: no COCO results of it")
    return data.category_ids


def results(detections: Sequence[dict[str, Any]], data: BoxSet) -> list[dict[str, Any]]:
    """Of a whole set, with its own image ids; one without (VOC) gets ids by place, from 1, and each row its file_name."""
    ids = categories(data)
    rows = []
    for place, (found, image) in enumerate(zip(detections, data.images, strict=True), 1):
        file = PurePosixPath(image.name).with_name(image.path.name).as_posix() if image.id is None else None
        rows += entries(found, place if image.id is None else image.id, ids, file)
    return rows
