"""`Diagnosis`: the contents and problems of a data set, for class folders and sets with boxes alike."""

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reslearn.data.boxes.anchor_recall import AnchorRecall
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.findings import Finding
from reslearn.data.images.folder import Entry

Span = tuple[float, ...]
"""Minimum, median and maximum; empty if there are no values."""


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of all readable images.

    bytes: total file size. aspect: width / height. mean, std: per channel on [0, 1] over the training images (all images of an
    undivided set), each image weighted equally; one number for grayscale sets. eigenvalues, eigenvectors: of the RGB covariance
    on [0, 1], largest first, an eigenvector per column (AlexNet, section 4.1); empty for grayscale sets.
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

    without_objects: images without objects, by split. by_size: {class: {small, medium, large}}. side (square root of the box
    area, px) and aspect (width / height): by class. anchors: anchor recall on the training images.
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
    """The contents and problems of a data set.

    images: number by split, readable or not. per_class: {split: {class: number}} of images, or of objects for sets with boxes.
    objects: for sets with boxes, else None. suffixes: the correct suffix of each misnamed file. --fix keeps `entries` (class
    folders and lists; empty if the images are not files) or `sets` (sets with boxes).
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
        """Whether there are no faults. Notes do not count."""
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything except `suffixes`, `entries` and `sets`, as JSON types."""
        plain = {key.name: getattr(self, key.name) for key in fields(self)[:4]} | vars(self.pixels)
        if self.objects is not None:
            plain["objects"] = vars(self.objects) | {"anchors": [anchor._asdict() for anchor in self.objects.anchors]}
        counts = dict(Counter(finding.kind for finding in self.findings))
        return {"clean": self.clean, **plain, "counts": counts, "findings": [finding.as_json() for finding in self.findings]}
