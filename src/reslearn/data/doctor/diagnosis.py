"""The table of what can be wrong with a data set, and what an examination of one says."""

import unicodedata
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from reslearn.data.images.folder import Entry

IMBALANCE = 10
"""The largest class has at least so many times the images of the smallest: a fault."""
ELONGATED = 4
"""One side is more than so many times the other: the center that a network sees is less than a quarter of the image."""
TINY = 8
"""The shorter side is less than the median's by more than this factor."""
FEW = 5
"""A class of fewer images is noted: there is little to hold out."""


class Kind(NamedTuple):
    """A row of the table of what can be found. fault: it counts for the exit code; else it is a note. mended: by --fix, how."""

    fault: bool
    what: str
    mended: str = ""


OUT = "left out"
KINDS = {
    "unreadable": Kind(True, "cannot be opened", OUT),
    "missing file": Kind(True, "named by the list, but not there", OUT),
    "empty": Kind(True, "files without a byte", OUT),
    "not an image": Kind(True, "something else under an image's name", OUT),
    "truncated": Kind(True, "cut short: the end of the image is missing", OUT),
    "damaged": Kind(True, "cannot be decoded", OUT),
    "too large": Kind(True, "more pixels than are decoded", OUT),
    "wrong suffix": Kind(
        True, "of another format than the name says: read by content here, refused by other tools", "renamed in a copy"
    ),
    "contradiction": Kind(True, "one image in several classes", "all of them left out"),
    "leak": Kind(True, "one image in several splits: the result looks better than it is", "kept in test, else in val"),
    "duplicate": Kind(True, "one image several times in a class", "one of them kept"),
    "listed twice": Kind(True, "named twice by the list", "one of them kept"),
    "blank": Kind(True, "one color all over"),
    "tiny": Kind(True, f"less than 1/{TINY} of the usual size"),
    "elongated": Kind(True, f"one side more than {ELONGATED} times the other: the crop in the middle shows little of it"),
    "one class": Kind(True, "training needs two"),
    "empty class": Kind(True, "a class folder without images", OUT),
    "without classes": Kind(True, "a split whose images have no classes", OUT),
    "class not in train": Kind(True, "there is nothing to learn it from", OUT),
    "class missing": Kind(True, "a class without images in a split: its error is not measured"),
    "imbalance": Kind(True, f"the largest class has {IMBALANCE} times the images of the smallest, or more: see loss.class_weights"),
    "colliding classes": Kind(True, "classes whose names differ by case, space or the form of their accents alone"),
    "colliding names": Kind(True, "files whose names are one name on Windows and macOS", "renamed in a copy"),
    "odd name": Kind(True, "names with control characters, or space at an end, which a list would lose"),
    "name not UTF-8": Kind(True, "names that no list can hold", OUT),
    "outside a class folder": Kind(True, "images that have no class, and are not used", OUT),
    "hidden image": Kind(True, "images with a hidden name, which are not used", OUT),
    "foreign format": Kind(True, "images of a format that is not read: convert them", OUT),
    "image without suffix": Kind(True, "images whose names do not end like an image's, which are not used", OUT),
    "gray": Kind(False, "gray images among color ones: read as gray RGB"),
    "color space": Kind(False, "not RGB: converted without a color profile"),
    "palette": Kind(False, "colors of a palette: read as RGB"),
    "deep": Kind(False, "more than 8 bits a value: scaled to 8"),
    "transparent": Kind(False, "laid over white"),
    "rotated": Kind(False, "turned upright by their EXIF orientation, which other tools may ignore"),
    "animated": Kind(False, "several images in one file: the first is taken"),
    "few images": Kind(False, f"classes of fewer than {FEW} images: little can be held out"),
    "without a class": Kind(False, "ImageNet's test images: their classes were never published", OUT),
    "hidden": Kind(False, "hidden names, not used", OUT),
    "other file": Kind(False, "not images, not used", OUT),
}


class Finding(NamedTuple):
    """One thing that was found: a row of KINDS, the names of the images, classes or splits that it is about, and a detail."""

    kind: str
    names: tuple[str, ...]
    detail: str

    @property
    def fault(self) -> bool:
        """Whether it counts for the exit code."""
        return KINDS[self.kind].fault


class Kept(NamedTuple):
    """An image that is worth keeping, and the suffix that fits its format."""

    entry: Entry
    suffix: str


@dataclass(frozen=True)
class Diagnosis:
    """What a data set is and what is wrong with it.

    images: {split: {class: number}}, readable or not. height, width, aspect (width / height): minimum, median, maximum of what can
    be read. mean, std: of the training images (or all), on [0, 1], each image counting the same; one number where all is gray.
    eigenvalues, eigenvectors: of the covariance of RGB on [0, 1], largest first, one column each (AlexNet, section 4.1); empty
    where all is gray. kept: what --fix keeps; empty where the set is not of files.
    """

    name: str
    images: dict[str, dict[str, int]]
    bytes: int
    formats: dict[str, int]
    modes: dict[str, int]
    height: tuple[float, ...]
    width: tuple[float, ...]
    aspect: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eigenvalues: tuple[float, ...]
    eigenvectors: tuple[tuple[float, ...], ...]
    findings: tuple[Finding, ...]
    kept: tuple[Kept, ...]

    @property
    def clean(self) -> bool:
        """Whether there is no fault; notes do not count."""
        return not any(finding.fault for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """All but `kept`, in JSON's types."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("findings", "kept")}
        findings = [{"kind": f.kind, "fault": f.fault, "names": f.names, "detail": f.detail} for f in self.findings]
        return {"clean": self.clean, **plain, "findings": findings}


def folded(name: str) -> str:
    """What two names have in common that differ by case, space around them or the form of their accents alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()
