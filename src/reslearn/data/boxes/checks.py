"""Checks the objects and image sizes of annotation files: valid objects become `Objects`, problems become `Findings`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.boxes.box_set import Bad, BadBoxes, Objects, box_areas
from reslearn.data.boxes.masks import Segmentation
from reslearn.data.findings import Finding
from reslearn.data.images.files import upright_size
from reslearn.errors import UserError

# COCO rounds x, y, width and height to two decimals, so x + width may be off by this much.
_ROUNDING = 0.01 + 1e-6


class Findings(list[Finding]):
    """The findings of a reader, in reading order. Those with an index concern one object, which can be left out or clipped."""

    def add(self, kind: str, file: str, detail: str, index: int | None = None) -> None:
        self.append(Finding(kind, (file,), " ".join(detail.split()), index))

    def raise_if(self, bad: Bad) -> None:
        """Raises BadBoxes for all faults if `bad` is "fail", and for faults of files if it is "drop"."""
        if bad not in ("fail", "drop"):
            raise UserError(f"bad={bad!r}: must be fail or drop")
        if faults := [finding for finding in self if finding.fault and (finding.index is None or bad == "fail")]:
            raise BadBoxes(faults)


@dataclass
class RawObject:
    """An unchecked object of an annotation file.

    label: from 1. box: continuous x1, y1, x2, y2; may be invalid. written: the box as in the file, if that differs.
    """

    index: int
    label: int
    box: Sequence[float]
    difficult: bool = False
    crowd: bool = False
    area: float | None = None
    id: int | None = None
    segmentation: Segmentation | None = None
    written: str | None = None


def check_objects(
    objects: Iterable[RawObject], height: int, width: int, file: str, findings: Findings, *, min_side: float = 0
) -> Objects:
    """Returns the valid objects. Adds invalid objects and clipped boxes to `findings`.

    A box with a width or height of `min_side` pixels or less has no area. Boxes that exceed the image only by rounding to two
    decimals are clipped without a finding.
    """
    limits = np.array([width, height, width, height], np.float64)
    valid: list[RawObject] = []
    first: dict[tuple[Any, ...], int] = {}  # label, crowd and box -> index
    for item in objects:
        box = np.array(item.box, np.float64)
        numbers = item.written or ", ".join(f"{number:g}" for number in box)
        clipped = np.clip(box, 0, limits)
        if not np.isfinite(box).all():
            kind, text = "not finite", f"box {numbers}"
        elif (box[2:] - box[:2] <= min_side + 1e-9).any():
            kind, text = "no area", f"box {numbers}"
        elif (clipped[2:] <= clipped[:2]).any():
            kind, text = "outside", f"box {numbers} is outside the {width} x {height} image"
        elif (same := first.setdefault((item.label, item.crowd, *box), item.index)) != item.index:
            kind, text = "box twice", f"box {numbers} has the same class and coordinates as object {same}"
        else:
            kind, text = "", ""
        if kind:
            findings.add(kind, file, text, item.index)
            continue
        if (excess := np.abs(clipped - box).max()) > _ROUNDING:
            findings.add("sticks out", file, f"box {numbers} exceeds the {width} x {height} image by {excess:g} px", item.index)
        item.box = clipped.tolist()
        valid.append(item)
    boxes = np.array([item.box for item in valid], np.float64).reshape(-1, 4)
    segmentations = tuple(item.segmentation for item in valid)
    return Objects.of(
        boxes,
        [item.label for item in valid],
        difficult=[item.difficult for item in valid],
        crowd=[item.crowd for item in valid],
        areas=[area if item.area is None else item.area for item, area in zip(valid, box_areas(boxes), strict=True)],
        ids=[item.index if item.id is None else item.id for item in valid],
        segmentations=segmentations if any(s is not None for s in segmentations) else None,
    )


def check_size(path: Path, height: float, width: float, file: str, findings: Findings) -> tuple[int, int, int] | None:
    """Returns (height, width, orientation): the upright size, and the EXIF orientation to apply to the annotations, else 1.

    Annotation tools use either the upright or the stored image; the annotated size tells which. If rotation keeps the size, the
    boxes are assumed upright and a note is added. Adds a fault and returns None if the image is missing or damaged, or if the
    annotated size matches neither.
    """
    try:
        true_height, true_width, orientation = upright_size(path)
    except UserError as why:
        findings.add("no such image" if not path.exists() else "unreadable image", file, str(why))
        return None
    if (height, width) == (true_height, true_width):
        if orientation in (2, 3, 4) or (orientation >= 5 and height == width):
            text = f"{path.name} has EXIF orientation {orientation}: assuming that the boxes refer to the upright image"
            findings.add("orientation", file, text)
        return true_height, true_width, 1
    if orientation >= 5 and (height, width) == (true_width, true_height):
        text = f"{path.name} has EXIF orientation {orientation}: the boxes refer to the stored image and are rotated with it"
        findings.add("orientation", file, text)
        return true_height, true_width, orientation
    text = f"annotated as {width:g} x {height:g} (width x height), but {path.name} has {true_width} x {true_height} pixels"
    findings.add("wrong size", file, text)
    return None
