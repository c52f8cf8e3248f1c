"""`Diagnosis`: what a data set holds and what is wrong with it; the same for class folders and sets with boxes."""

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reslearn.data.boxes.anchor_recall import AnchorRecall
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.findings import Finding
from reslearn.data.images.folder import Entry

Span = tuple[float, ...]
"""Minimum, median and maximum; empty where there is nothing to measure."""


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of all images that can be read.

    bytes: of the files. aspect: width / height. mean, std: of the training images (or all), on [0, 1], each image counting the
    same; one number where all is gray. eigenvalues, eigenvectors: of the covariance of RGB on [0, 1], largest first, one column
    each (AlexNet, section 4.1); empty where all is gray.
    """

    bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    height: Span
    width: Span
    aspect: Span
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eigenvalues: tuple[float, ...]
    eigenvectors: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ObjectStatistics:
    """Statistics of the objects of a set with boxes.

    without_objects: images, by split. by_size: {class: {small, medium, large}}. side (square root of the area, px) and aspect
    (width / height): by class. anchors: how well they fit the boxes of the training images.
    """

    without_objects: dict[str, int]
    difficult: int
    crowds: int
    segmented: int
    by_size: dict[str, dict[str, int]]
    side: dict[str, Span]
    aspect: dict[str, Span]
    per_image: Span
    anchors: tuple[AnchorRecall, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What a data set is and what is wrong with it.

    images: by split, readable or not. per_class: {split: {class: number}} of images, or of objects in sets with boxes, which alone
    have `objects`. What --fix keeps: `entries` of class folders and lists (none of sets that are not of files), or `sets` with the
    images to keep of each split; suffixes: those that fit better than a file's own.
    """

    name: str
    classes: tuple[str, ...]
    images: dict[str, int]
    per_class: dict[str, dict[str, int]]
    pixels: ImageStatistics
    findings: tuple[Finding, ...]
    suffixes: dict[Path, str]
    objects: ObjectStatistics | None = None
    entries: tuple[Entry, ...] = ()
    sets: dict[str, BoxSet] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether there is no fault; notes do not count."""
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything but what --fix keeps, in JSON's types."""
        plain = {key.name: getattr(self, key.name) for key in fields(self)[:4]} | vars(self.pixels)
        if self.objects is not None:
            plain["objects"] = vars(self.objects) | {"anchors": [anchor._asdict() for anchor in self.objects.anchors]}
        counts = dict(Counter(finding.kind for finding in self.findings))
        return {"clean": self.clean, **plain, "counts": counts, "findings": [finding.as_json() for finding in self.findings]}
