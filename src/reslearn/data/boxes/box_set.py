"""Images with boxes around their objects: one structure for VOC and COCO, and every fault of a file found and named.

**Coordinates** are continuous: a pixel in column c covers c to c + 1, so an image W wide spans x from 0 to W, and a box is
x1, y1, x2, y2 with x1 < x2 <= W. **Labels** count from 1, as torchvision's detectors want it; 0 is the background.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from reslearn.data.boxes.masks import Segmentation, as_bytes, draw
from reslearn.data.images.files import read, upright
from reslearn.errors import UserError

Bad = Literal["fail", "drop"]
Level = Literal["file", "object", "note"]

# COCO writes x, y, width, height with two decimals: x + width may be off by as much as this.
_ROUNDING = 0.01 + 1e-6


@dataclass(frozen=True)
class Finding:
    """One fault of an annotated set.

    `index` counts the objects (VOC) or annotations (COCO) of `file` from 0, None where no object is meant. `level` says
    what follows: "file", the set cannot be used until it is mended; "object", the object is left out or its box is cut,
    if the policy allows that; "note", nothing.
    """

    level: Level
    kind: str
    file: str
    index: int | None
    text: str

    def __str__(self) -> str:
        where = self.file if self.index is None else f"{self.file} object {self.index}"
        return f"{where}: {self.kind}: {self.text}"


class BadBoxes(UserError):
    """Annotations that cannot be used. The text has the first few of `findings`, which are all there is to mend, and what to do:
    the `remedy` by which objects are left out or boxes cut, or, of files, doctor."""

    def __init__(self, findings: Sequence[Finding], remedy: str = 'bad="drop"', shown: int = 8) -> None:
        more = f"; and {len(findings) - shown} more" if len(findings) > shown else ""
        listed = "; ".join(str(finding) for finding in findings[:shown])
        if any(f.level == "file" for f in findings):
            mend = "reslearn doctor SET --fix COPY copies the set without them"
        elif all(f.kind == "sticks out" for f in findings):
            mend = f"mend them, or have them cut: {remedy}"
        else:
            mend = f"mend them, or leave these objects out: {remedy}"
        super().__init__(f"{len(findings)} fault{'s' * (len(findings) > 1)}: {listed}{more} ({mend})")
        self.findings = tuple(findings)


@contextmanager
def bad_boxes_left_out_by(remedy: str) -> Iterator[None]:
    """What BadBoxes says to do, in the words of the command or function that is used."""
    try:
        yield
    except BadBoxes as error:
        raise BadBoxes(error.findings, remedy) from None


@dataclass(frozen=True, eq=False)
class Objects:
    """The N objects of one image.

    `boxes` float64 (N, 4), x1, y1, x2, y2 in pixels, inside the image and with an area; `labels` int64 (N,) from 1;
    `difficult` and `crowd` bool (N,); `areas` float64 (N,), pixels: COCO's own `area` (of the mask), else the box's;
    `ids` int64 (N,), COCO's annotation ids, else places in the file, from 0; `segmentations` N, where the set has any
    (None for an object without one).
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    segmentations: tuple[Segmentation | None, ...] | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        for name, (dtype, shape) in _FIELDS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != (n, *shape):
                raise ValueError(f"{name} must be {(n, *shape)} {np.dtype(dtype)}, not {array.shape} {array.dtype}")
            array.flags.writeable = False
        if self.segmentations is not None and len(self.segmentations) != n:
            raise ValueError(f"{len(self.segmentations)} segmentations of {n} objects")

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, boxes: Any, labels: Any, **others: Any) -> "Objects":
        """Objects from anything that numpy turns into arrays; what is not given is no, no, the boxes' areas, 0, 1, ..."""
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        n = len(boxes)
        given = {"difficult": np.zeros(n), "crowd": np.zeros(n), "ids": np.arange(n), "areas": box_areas(boxes)} | others
        segmentations = given.pop("segmentations", None)
        arrays = {name: np.array(given[name], _FIELDS[name][0]).reshape(-1) for name in ("difficult", "crowd", "areas", "ids")}
        return cls(boxes, np.array(labels, np.int64).reshape(-1), segmentations=segmentations, **arrays)


_FIELDS = {
    "boxes": (np.float64, (4,)),
    "labels": (np.int64, ()),
    "difficult": (np.bool_, ()),
    "crowd": (np.bool_, ()),
    "areas": (np.float64, ()),
    "ids": (np.int64, ()),
}


@dataclass(frozen=True, eq=False)
class BoxImage:
    """An image file, its height and width as `read` gives it (upright), and its objects in those coordinates."""

    path: Path
    name: str
    height: int
    width: int
    objects: Objects
    id: int | None = None  # COCO's image id

    def pixels(self, channels: int = 3) -> np.ndarray:
        """uint8 (height, width, channels), upright, 1 or 3 channels. Raises UserError as `images.read` does, with what to do: a
        set is opened by the headers of its images, so damage behind them is met here first."""
        try:
            return read(self.path, channels)
        except UserError as why:
            raise UserError(f"{why}; reslearn doctor names all such files, and --fix copies the set without them") from None

    def target(self, *, masks: bool = False, difficult: bool = True) -> dict[str, torch.Tensor]:
        """What torchvision's detectors are trained on: `boxes` float32 (N, 4), `labels` int64 (N,), and `masks` uint8 (N, H, W).

        Crowds are left out, since a region of many objects is no example of one; so are difficult objects on request, and
        with `masks` those without a segmentation.
        """
        those = self.objects
        keep = ~those.crowd & (~those.difficult | difficult)
        if masks:
            keep &= np.array([s is not None for s in those.segmentations or [None] * len(those)], bool)
        target = {
            "boxes": torch.from_numpy(those.boxes[keep].astype(np.float32)),
            "labels": torch.from_numpy(those.labels[keep]),
        }
        if masks:
            drawn = np.zeros((int(keep.sum()), self.height, self.width), np.uint8)
            for mask, i in zip(drawn, np.flatnonzero(keep), strict=True):
                segmentation = (those.segmentations or ())[i]
                assert segmentation is not None
                mask[:] = draw(segmentation, self.height, self.width)
            target["masks"] = torch.from_numpy(drawn)
        return target


@dataclass(frozen=True, eq=False)
class BoxSet:
    """Images with boxes: label k is `classes[k - 1]`. `findings` are the faults that the policy let pass, each named."""

    name: str
    classes: tuple[str, ...]
    images: tuple[BoxImage, ...]
    findings: tuple[Finding, ...] = ()
    category_ids: tuple[int, ...] | None = None  # COCO's, by label; they may have holes

    def __len__(self) -> int:
        return len(self.images)

    def counts(self) -> dict[str, int]:
        """How many objects of each class there are."""
        each = np.concatenate([np.zeros(0, np.int64)] + [image.objects.labels for image in self.images])
        return dict(zip(self.classes, np.bincount(each, minlength=len(self.classes) + 1)[1:].tolist(), strict=True))

    def fingerprint(self) -> str:
        """A sha256 in hex of the classes and of each image's name, size in bytes and objects, in their order."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for image in self.images:
            those = image.objects
            digest.update(json.dumps([image.name, image.path.stat().st_size, image.height, image.width, len(those)]).encode())
            for array in (those.boxes, those.labels, those.difficult, those.crowd, those.areas):
                digest.update(array.tobytes())
            for segmentation in those.segmentations or ():
                digest.update(as_bytes(segmentation))
        return digest.hexdigest()

    def faults(self) -> dict[str, int]:
        """How many findings of each kind there are."""
        return dict(Counter(finding.kind for finding in self.findings))


@dataclass
class Draft:
    """An object as a file has it, before it is checked: `label` from 1; `box` continuous x1, y1, x2, y2, any numbers, and how to
    print it, where the file `wrote` others."""

    index: int
    label: int
    box: Sequence[float]
    difficult: bool = False
    crowd: bool = False
    area: float | None = None
    id: int | None = None
    segmentation: Segmentation | None = None
    wrote: str | None = None


@dataclass
class Faults:
    """The findings of a reader, as they come."""

    found: list[Finding] = field(default_factory=list)

    def add(self, level: Level, kind: str, file: str, index: int | None, text: str) -> None:
        self.found.append(Finding(level, kind, file, index, " ".join(text.split())))

    def raise_if(self, bad: Bad) -> None:
        """BadBoxes for all that cannot be let pass: every fault of a file, and with "fail" those of objects."""
        if bad not in ("fail", "drop"):
            raise UserError(f"bad={bad!r}: must be fail or drop")
        if stops := [f for f in self.found if f.level == "file" or (bad == "fail" and f.level == "object")]:
            raise BadBoxes(stops)


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) -> (N,), pixels."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def settle(drafts: Iterable[Draft], height: int, width: int, file: str, faults: Faults, *, least: float = 0) -> Objects:
    """The drafts that are sound as Objects; the others, and each box that had to be cut to the image, go into `faults`.

    A box of `least` pixels or less in width or height has no area. What lies outside by the rounding of two decimals is
    cut without a word.
    """
    limits = np.array([width, height, width, height], np.float64)
    kept: list[Draft] = []
    seen: dict[tuple[Any, ...], int] = {}
    for draft in drafts:
        box = np.array(draft.box, np.float64)
        numbers = draft.wrote or ", ".join(f"{number:g}" for number in box)
        cut = np.clip(box, 0, limits)
        if not np.isfinite(box).all():
            kind, text = "not finite", f"the box {numbers}"
        elif (box[2:] - box[:2] <= least + 1e-9).any():
            kind, text = "no area", f"the box {numbers}"
        elif (cut[2:] <= cut[:2]).any():
            kind, text = "outside", f"the box {numbers} misses the image of {width} x {height}"
        elif (same := seen.setdefault((draft.label, draft.crowd, *box), draft.index)) != draft.index:
            kind, text = "duplicate", f"the box {numbers} is object {same} again, class and all"
        else:
            kind, text = "", ""
        if kind:
            faults.add("object", kind, file, draft.index, text)
            continue
        if (beyond := np.abs(cut - box).max()) > _ROUNDING:
            text = f"the box {numbers} sticks out of the image of {width} x {height} by {beyond:g}: cut to it"
            faults.add("object", "sticks out", file, draft.index, text)
        draft.box = cut.tolist()
        kept.append(draft)
    boxes = np.array([draft.box for draft in kept], np.float64).reshape(-1, 4)
    areas = [box if draft.area is None else draft.area for draft, box in zip(kept, box_areas(boxes), strict=True)]
    segmentations = tuple(draft.segmentation for draft in kept)
    return Objects.of(
        boxes,
        [draft.label for draft in kept],
        difficult=[draft.difficult for draft in kept],
        crowd=[draft.crowd for draft in kept],
        areas=areas,
        ids=[draft.index if draft.id is None else draft.id for draft in kept],
        segmentations=segmentations if any(s is not None for s in segmentations) else None,
    )


def place(path: Path, height: float, width: float, file: str, faults: Faults) -> tuple[int, int, int] | None:
    """(height, width, orientation): the image's upright size, and the EXIF orientation that its annotations need undone.

    Tools draw boxes on the upright image or on the one that is stored: the annotated size tells which, except where
    turning keeps the size (a note then; taken as upright). A missing or damaged image and a size that is neither are
    faults: None.
    """
    try:
        real_height, real_width, orientation = upright(path)
    except UserError as why:
        faults.add("file", "no such image" if not path.exists() else "unreadable image", file, None, str(why))
        return None
    if (height, width) == (real_height, real_width):
        if orientation in (2, 3, 4) or (orientation >= 5 and height == width):
            text = f"{path.name} has EXIF orientation {orientation}: the boxes are taken as drawn on the upright image"
            faults.add("note", "orientation", file, None, text)
        return real_height, real_width, 1
    if orientation >= 5 and (height, width) == (real_width, real_height):
        text = f"{path.name} has EXIF orientation {orientation}, and its boxes, drawn on the stored image, are turned with it"
        faults.add("note", "orientation", file, None, text)
        return real_height, real_width, orientation
    text = f"{width:g} x {height:g} (width x height), but {path.name} has {real_width} x {real_height} pixels"
    faults.add("file", "wrong size", file, None, text)
    return None
