"""Checks every object and image size of an annotation file: valid objects become `Objects`, the rest `Findings`."""

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

# COCO writes x, y, width, height with two decimals: x + width may be off by as much as this.
_ROUNDING = 0.01 + 1e-6


class Findings(list[Finding]):
    """The findings of a reader, in its order. Those with an index are about one object, which can be left out or cut."""

    def add(self, kind: str, file: str, detail: str, index: int | None = None) -> None:
        self.append(Finding(kind, (file,), " ".join(detail.split()), index))

    def raise_if(self, bad: Bad) -> None:
        """Raise BadBoxes for the faults that the policy does not accept: with "drop" those of files, with "fail" all."""
        if bad not in ("fail", "drop"):
            raise UserError(f"bad={bad!r}: must be fail or drop")
        if stops := [finding for finding in self if finding.fault and (finding.index is None or bad == "fail")]:
            raise BadBoxes(stops)


@dataclass
class RawObject:
    """An object as a file has it, not yet checked: `label` from 1; `box` continuous x1, y1, x2, y2, any numbers; `written`, how
    the file writes the box, where it uses other numbers."""

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
    """Returns the valid objects; the others, and each box that had to be cut to the image, are added to `findings`.

    A box of `min_side` pixels or less in width or height has no area. What lies outside by the rounding of two decimals is
    cut without a finding.
    """
    limits = np.array([width, height, width, height], np.float64)
    valid: list[RawObject] = []
    first: dict[tuple[Any, ...], int] = {}  # label, crowd and box -> index
    for item in objects:
        box = np.array(item.box, np.float64)
        numbers = item.written or ", ".join(f"{number:g}" for number in box)
        cut = np.clip(box, 0, limits)
        if not np.isfinite(box).all():
            kind, text = "not finite", f"the box {numbers}"
        elif (box[2:] - box[:2] <= min_side + 1e-9).any():
            kind, text = "no area", f"the box {numbers}"
        elif (cut[2:] <= cut[:2]).any():
            kind, text = "outside", f"the box {numbers} misses the image of {width} x {height}"
        elif (same := first.setdefault((item.label, item.crowd, *box), item.index)) != item.index:
            kind, text = "box twice", f"the box {numbers} is object {same} again, class and all"
        else:
            kind, text = "", ""
        if kind:
            findings.add(kind, file, text, item.index)
            continue
        if (beyond := np.abs(cut - box).max()) > _ROUNDING:
            text = f"the box {numbers} sticks out of the image of {width} x {height} by {beyond:g}: cut to it"
            findings.add("sticks out", file, text, item.index)
        item.box = cut.tolist()
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
    """(height, width, orientation): the image's upright size, and the EXIF orientation that its annotations need undone.

    Tools draw boxes on the upright image or on the one that is stored: the annotated size tells which, except where
    turning keeps the size (a note then; taken as upright). A missing or damaged image and a size that is neither are
    faults: None.
    """
    try:
        true_height, true_width, orientation = upright_size(path)
    except UserError as why:
        findings.add("no such image" if not path.exists() else "unreadable image", file, str(why))
        return None
    if (height, width) == (true_height, true_width):
        if orientation in (2, 3, 4) or (orientation >= 5 and height == width):
            text = f"{path.name} has EXIF orientation {orientation}: the boxes are taken as drawn on the upright image"
            findings.add("orientation", file, text)
        return true_height, true_width, 1
    if orientation >= 5 and (height, width) == (true_width, true_height):
        text = f"{path.name} has EXIF orientation {orientation}, and its boxes, drawn on the stored image, are turned with it"
        findings.add("orientation", file, text)
        return true_height, true_width, orientation
    text = f"{width:g} x {height:g} (width x height), but {path.name} has {true_width} x {true_height} pixels"
    findings.add("wrong size", file, text)
    return None
