"""Detections in COCO's results format, for pycocotools' loadRes and evaluation servers."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.masks import Runs, pack
from reslearn.errors import UserError


def segmentation(runs: Runs) -> dict[str, Any]:
    """A mask as COCO's compressed RLE."""
    return {"size": [runs.height, runs.width], "counts": pack(runs.counts)}


def entries(detections: dict[str, Any], image: int, categories: Sequence[int], file: str | None = None) -> list[dict[str, Any]]:
    """One image's detections, best first: image_id, category_id, bbox (x, y, width, height), score and, from masks, segmentation.

    categories: category ids by label, from 1. file: added as file_name, for images without an id of their own.
    """
    named = {} if file is None else {"file_name": file}
    rows = []
    for i, (label, score) in enumerate(zip(detections["labels"], detections["scores"], strict=True)):
        x1, y1, x2, y2 = detections["boxes"][i].tolist()
        row = {"image_id": image, "category_id": categories[label - 1], "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)}
        rows.append(row | ({"segmentation": segmentation(detections["masks"][i])} if "masks" in detections else {}) | named)
    return rows


def categories(data: BoxSet) -> Sequence[int]:
    """The set's category ids by label; for a set without ids (VOC), the labels. Raises UserError if a class of the detector has no
    category in the set.
    """
    if data.images[0].id is None:
        return range(1, len(data.classes) + 1)
    if data.category_ids is None:
        classes = ", ".join(data.classes)
        raise UserError(f"{data.name}: has no category for some of the classes {classes}: cannot write COCO results")
    return data.category_ids


def results(detections: Sequence[dict[str, Any]], data: BoxSet) -> list[dict[str, Any]]:
    """A whole set's detections, with its image ids; images without ids (VOC) are numbered from 1 and identified by file_name."""
    ids = categories(data)
    rows = []
    for number, (by_image, image) in enumerate(zip(detections, data.images, strict=True), 1):
        file = PurePosixPath(image.name).with_name(image.path.name).as_posix() if image.id is None else None
        rows += entries(by_image, number if image.id is None else image.id, ids, file)
    return rows
