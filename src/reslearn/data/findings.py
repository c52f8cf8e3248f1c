"""The kinds of problems in data sets, and `Finding`, one problem; used by the readers and the doctor."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

IMBALANCE = 10
"""Ratio of the largest class to the smallest at which a set counts as imbalanced."""
ELONGATED = 4
"""Ratio of the longer side to the shorter above which an image is elongated: the center crop shows less than a quarter of it."""
TINY = 8
"""An image is tiny if its shorter side is smaller than the median by more than this factor."""
FEW = 5
"""Classes with fewer images (or objects) are noted: few can be held out."""
SAME_IOU = 0.95
"""Two boxes of an image with at least this IoU probably mark one object."""
OUTLINE_IOU = 0.5
"""A segmentation and a box with a lower IoU probably do not belong together."""


class Kind(NamedTuple):
    """A kind of problem. fault: affects the doctor's exit code; otherwise it is a note. fix: what --fix does about it."""

    fault: bool
    description: str
    fix: str = ""


OUT = "left out"
CLASS_KINDS = {
    "unreadable": Kind(True, "cannot be opened", OUT),
    "missing file": Kind(True, "listed files that do not exist", OUT),
    "empty": Kind(True, "files of 0 bytes", OUT),
    "not an image": Kind(True, "files with an image suffix that are not images", OUT),
    "truncated": Kind(True, "the end of the image data is missing", OUT),
    "damaged": Kind(True, "cannot be decoded", OUT),
    "too large": Kind(True, "more pixels than the decoding limit", OUT),
    "wrong suffix": Kind(True, "the suffix does not match the format: other tools may reject the file", "renamed in a copy"),
    "contradiction": Kind(True, "the same image in several classes", "all copies left out"),
    "leak": Kind(True, "the same image in several splits: results look better than they are", "kept in test, otherwise in val"),
    "duplicate": Kind(True, "the same image several times in a split", "one copy kept"),
    "listed twice": Kind(True, "listed more than once", "one entry kept"),
    "blank": Kind(True, "all pixels have the same color"),
    "tiny": Kind(True, f"shorter side less than 1/{TINY} of the median"),
    "elongated": Kind(True, f"one side more than {ELONGATED} times the other: the center crop shows little of the image"),
    "one class": Kind(True, "training needs at least two classes"),
    "empty class": Kind(True, "class folders without images", OUT),
    "without classes": Kind(True, "splits whose images have no classes", OUT),
    "class not in train": Kind(True, "classes without training images", OUT),
    "class missing": Kind(True, "classes missing from a split: their error (or AP) is not measured"),
    "imbalance": Kind(True, f"the largest class has at least {IMBALANCE} times the images of the smallest: see loss.class_weights"),
    "colliding classes": Kind(True, "class names that differ only in case, spaces or the form of accents"),
    "colliding names": Kind(True, "file names that are identical on Windows and macOS", "renamed in a copy"),
    "odd name": Kind(True, "names with unprintable characters, or with leading or trailing spaces that a list would lose"),
    "name not UTF-8": Kind(True, "names that a list cannot contain", OUT),
    "outside a class folder": Kind(True, "images without a class, not used", OUT),
    "hidden image": Kind(True, "images with hidden names, not used", OUT),
    "foreign format": Kind(True, "images of unsupported formats: convert them", OUT),
    "image without suffix": Kind(True, "images without an image suffix, not used", OUT),
    "gray": Kind(False, "gray images among color ones: read as RGB"),
    "color space": Kind(False, "not RGB: converted without a color profile"),
    "palette": Kind(False, "palette images: read as RGB"),
    "deep": Kind(False, "more than 8 bits per channel: scaled to 8"),
    "transparent": Kind(False, "transparent images: composited over white"),
    "rotated": Kind(False, "rotated upright by EXIF orientation, which other tools may ignore"),
    "animated": Kind(False, "several frames or pages: the first one is used"),
    "few images": Kind(False, f"classes with fewer than {FEW} images: few can be held out"),
    "without a class": Kind(False, "ImageNet's test images: their labels were never published", OUT),
    "hidden": Kind(False, "hidden names, not used", OUT),
    "other file": Kind(False, "not images, not used", OUT),
}
"""Problems of images, and of class folders and lists."""
BOX_KINDS = {
    "no such image": Kind(True, "annotated images that do not exist", OUT),
    "unreadable image": Kind(True, "cannot be opened", OUT),
    "wrong size": Kind(True, "the annotated size is not the image's", OUT),
    "unreadable annotation": Kind(True, "annotations that cannot be read", OUT),
    "unreadable image entry": Kind(True, "invalid image entries in a COCO file", OUT),
    "unreadable category": Kind(True, "invalid categories in a COCO file", OUT),
    "two images": Kind(True, "annotations that match two image files", OUT),
    "image twice": Kind(True, "images listed more than once in a split", "one entry kept"),
    "category twice": Kind(True, "two categories of the same name", "the first kept, with its objects"),
    "duplicate id": Kind(True, "ids used more than once", "the first kept"),
    "unknown class": Kind(True, "objects of unknown classes", OUT),
    "unknown image": Kind(True, "objects of unknown images", OUT),
    "unreadable object": Kind(True, "objects that cannot be read", OUT),
    "not finite": Kind(True, "boxes with NaN or infinite coordinates: they make losses NaN", OUT),
    "no area": Kind(True, "boxes without width or height: they make losses NaN", OUT),
    "outside": Kind(True, "boxes outside the image", OUT),
    "sticks out": Kind(True, "boxes that extend beyond the image", "clipped to the image"),
    "box twice": Kind(True, "objects annotated twice", "one of them kept"),
    "bad segmentation": Kind(True, "objects with invalid segmentations", OUT),
    "class without training objects": Kind(True, "classes that cannot be learned: no objects in train"),
    "no objects": Kind(True, "splits without objects"),
    "list of others": Kind(False, "VOC lists of images outside train, val and test, the only splits examined", OUT),
    "not annotated": Kind(False, "lists without annotations, such as VOC's tests after 2007, which only its server evaluates", OUT),
    "out of reach": Kind(True, "classes with anchors for less than half of their objects: they will rarely be detected"),
    "file aside": Kind(False, "COCO files that could be a split, beside the one that is read", OUT),
    "not listed": Kind(False, "images beside those of the set that no split and no list in ImageSets/Main names", OUT),
    "unknown category": Kind(False, "COCO categories that the first split does not have", OUT),
    "orientation": Kind(False, "EXIF orientation: boxes drawn on the stored image are rotated with it"),
    "nearly twice": Kind(False, f"two boxes of one class with IoU {SAME_IOU:g} or more: perhaps one object"),
    "two classes": Kind(False, f"two boxes of different classes with IoU {SAME_IOU:g} or more: perhaps one object"),
    "outline elsewhere": Kind(False, f"segmentations whose bounding box has an IoU below {OUTLINE_IOU:g} with the object's box"),
    "object imbalance": Kind(False, f"the most frequent class has at least {IMBALANCE} times the objects of the rarest"),
    "few objects": Kind(False, f"classes with fewer than {FEW} training objects"),
}
"""Problems of sets with boxes only."""
KINDS = CLASS_KINDS | BOX_KINDS


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem or note: a key of KINDS, the files, images, classes or splits concerned, and a detail.

    index: of the object (VOC) or annotation (COCO) in the file, from 0; None if it does not concern a single object.
    """

    kind: str
    names: tuple[str, ...]
    detail: str
    index: int | None = None

    @property
    def fault(self) -> bool:
        """Whether it affects the doctor's exit code."""
        return KINDS[self.kind].fault

    @property
    def place(self) -> str:
        """The names on one line, with the object: "Annotations/a.xml object 3"."""
        shown = ", ".join(name if name.isprintable() else repr(name) for name in self.names[:5])
        more = f" and {len(self.names) - 5:,} more" if len(self.names) > 5 else ""
        return shown + more + ("" if self.index is None else f" object {self.index}")

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.detail}"

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "fault": self.fault, "names": self.names, "index": self.index, "detail": self.detail}


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Returns the findings in the order of KINDS, then by names and index."""
    order = {kind: i for i, kind in enumerate(KINDS)}
    return tuple(sorted(findings, key=lambda f: (order[f.kind], f.names, -1 if f.index is None else f.index)))
