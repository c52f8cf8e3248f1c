"""`BoxSet`: images with boxes around their objects, the same for VOC and COCO.

**Coordinates** are continuous: a pixel in column c covers c to c + 1, so an image of width W spans x from 0 to W. A box is
x1, y1, x2, y2 with x1 < x2 <= W. **Labels** start at 1, as in torchvision's detectors; 0 is the background.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from reslearn.data.boxes.masks import Segmentation, as_bytes, draw
from reslearn.data.findings import Finding
from reslearn.data.images.files import read
from reslearn.errors import UserError

Bad = Literal["fail", "drop"]


class BadBoxes(UserError):
    """Invalid annotations. The text lists the first `shown` of `findings` and what to do: `remedy` leaves out objects or clips
    boxes; for faulty files, run the doctor."""

    def __init__(self, findings: Sequence[Finding], remedy: str = 'bad="drop"', shown: int = 8) -> None:
        more = f"; and {len(findings) - shown} more" if len(findings) > shown else ""
        listed = "; ".join(str(finding) for finding in findings[:shown])
        if any(f.index is None for f in findings):
            advice = "to copy the set without them, run reslearn doctor SET --fix COPY"
        elif all(f.kind == "sticks out" for f in findings):
            advice = f"fix the boxes, or clip them with {remedy}"
        else:
            advice = f"fix the objects, or leave them out with {remedy}"
        super().__init__(f"{len(findings)} fault{'s' * (len(findings) > 1)}: {listed}{more} ({advice})")
        self.findings = tuple(findings)


@contextmanager
def bad_boxes_left_out_by(remedy: str) -> Iterator[None]:
    """Makes BadBoxes name `remedy`, the option of the command or function in use."""
    try:
        yield
    except BadBoxes as error:
        raise BadBoxes(error.findings, remedy) from None


@dataclass(frozen=True, eq=False)
class Objects:
    """The N objects of one image.

    boxes: float64 (N, 4), x1, y1, x2, y2 in pixels, inside the image, with positive area. labels: int64 (N,), from 1. difficult,
    crowd: bool (N,). areas: float64 (N,), pixels; COCO's `area` (of the mask), else the box's. ids: int64 (N,); COCO's annotation
    ids, else indices in the file. segmentations: N entries, None for an object without one; or None if there are none.
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
            raise ValueError(f"{len(self.segmentations)} segmentations for {n} objects")

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, boxes: Any, labels: Any, **others: Any) -> "Objects":
        """Creates objects from array-likes; by default neither difficult nor crowds, with the boxes' areas and ids 0, 1, ..."""
        boxes = np.array(boxes, np.float64).reshape(-1, 4)
        n = len(boxes)
        fields = {"difficult": np.zeros(n), "crowd": np.zeros(n), "ids": np.arange(n), "areas": box_areas(boxes)} | others
        segmentations = fields.pop("segmentations", None)
        arrays = {name: np.array(fields[name], _FIELDS[name][0]).reshape(-1) for name in ("difficult", "crowd", "areas", "ids")}
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
    """An image file, its upright height and width in pixels, and its objects in these coordinates."""

    path: Path
    name: str
    height: int
    width: int
    objects: Objects
    id: int | None = None  # COCO's image id

    def pixels(self, channels: int = 3) -> np.ndarray:
        """uint8 (height, width, channels), upright; 1 or 3 channels.

        Raises UserError like `files.read`: opening a set reads only the image headers, so other damage first shows up here.
        """
        try:
            return read(self.path, channels)
        except UserError as why:
            advice = "to copy the set without damaged images, run reslearn doctor SET --fix COPY"
            raise UserError(f"{why}; {advice}") from None

    def target(self, *, masks: bool = False, difficult: bool = True) -> dict[str, torch.Tensor]:
        """The target for torchvision's detectors: boxes float32 (N, 4), labels int64 (N,), optionally masks uint8 (N, H, W).

        Leaves out crowds; difficult objects if `difficult` is False; and objects without a segmentation if `masks` is True.
        """
        objects = self.objects
        keep = ~objects.crowd & (~objects.difficult | difficult)
        if masks:
            keep &= np.array([s is not None for s in objects.segmentations or [None] * len(objects)], bool)
        target = {
            "boxes": torch.from_numpy(objects.boxes[keep].astype(np.float32)),
            "labels": torch.from_numpy(objects.labels[keep]),
        }
        if masks:
            drawn = np.zeros((int(keep.sum()), self.height, self.width), np.uint8)
            for mask, i in zip(drawn, np.flatnonzero(keep), strict=True):
                segmentation = (objects.segmentations or ())[i]
                assert segmentation is not None
                mask[:] = draw(segmentation, self.height, self.width)
            target["masks"] = torch.from_numpy(drawn)
        return target


@dataclass(frozen=True, eq=False)
class BoxSet:
    """Images with boxes. Label k is `classes[k - 1]`. findings: the faults that were left out or clipped, and notes."""

    name: str
    classes: tuple[str, ...]
    images: tuple[BoxImage, ...]
    findings: tuple[Finding, ...] = ()
    category_ids: tuple[int, ...] | None = None  # COCO's ids in label order, possibly with gaps

    def __len__(self) -> int:
        return len(self.images)

    def counts(self) -> dict[str, int]:
        """Number of objects by class."""
        labels = np.concatenate([np.zeros(0, np.int64)] + [image.objects.labels for image in self.images])
        return dict(zip(self.classes, np.bincount(labels, minlength=len(self.classes) + 1)[1:].tolist(), strict=True))

    def fingerprint(self) -> str:
        """The sha256, in hex, of the classes and of each image's name, size in bytes and objects, in order."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for image in self.images:
            objects = image.objects
            digest.update(json.dumps([image.name, image.path.stat().st_size, image.height, image.width, len(objects)]).encode())
            for array in (objects.boxes, objects.labels, objects.difficult, objects.crowd, objects.areas):
                digest.update(array.tobytes())
            for segmentation in objects.segmentations or ():
                digest.update(as_bytes(segmentation))
        return digest.hexdigest()

    def faults(self) -> dict[str, int]:
        """Number of findings by kind."""
        return dict(Counter(finding.kind for finding in self.findings))


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """The areas (N,) of boxes (N, 4), in pixels."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
