"""The table of what can be wrong with a data set, and `Finding`, one thing that is: shared by the readers and the doctor."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

IMBALANCE = 10
"""Ratio of the largest class to the smallest from which a set counts as imbalanced."""
ELONGATED = 4
"""Ratio of the longer side to the shorter above which an image is elongated: the center crop shows less than a quarter of it."""
TINY = 8
"""An image is tiny where its shorter side is less than the median's by more than this factor."""
FEW = 5
"""Classes with fewer images (or objects) are noted: there is little to hold out."""
SAME_IOU = 0.95
"""Two boxes of an image with this IoU or more probably mark one object."""
OUTLINE_IOU = 0.5
"""An outline and a box with a lower IoU probably do not belong together."""


class Kind(NamedTuple):
    """A row of the table. fault: counts for doctor's exit code, else it is a note. fix: what --fix does about it."""

    fault: bool
    description: str
    fix: str = ""


OUT = "left out"
CLASS_KINDS = {
    "unreadable": Kind(True, "cannot be opened", OUT),
    "missing file": Kind(True, "named by the list, but not there", OUT),
    "empty": Kind(True, "files without a byte", OUT),
    "not an image": Kind(True, "something else under an image's name", OUT),
    "truncated": Kind(True, "cut short: the end of the image is missing", OUT),
    "damaged": Kind(True, "cannot be decoded", OUT),
    "too large": Kind(True, "more pixels than are decoded", OUT),
    "wrong suffix": Kind(
        True, "the suffix does not fit the format: read by content here, refused by other tools", "renamed in a copy"
    ),
    "contradiction": Kind(True, "one image in several classes", "all of them left out"),
    "leak": Kind(True, "one image in several splits: the result looks better than it is", "kept in test, else in val"),
    "duplicate": Kind(True, "one image several times in a split", "one of them kept"),
    "listed twice": Kind(True, "named twice by the list", "one of them kept"),
    "blank": Kind(True, "one color all over"),
    "tiny": Kind(True, f"less than 1/{TINY} of the usual size"),
    "elongated": Kind(True, f"one side more than {ELONGATED} times the other: the center crop shows little of it"),
    "one class": Kind(True, "training needs two"),
    "empty class": Kind(True, "a class folder without images", OUT),
    "without classes": Kind(True, "a split whose images have no classes", OUT),
    "class not in train": Kind(True, "there is nothing to learn it from", OUT),
    "class missing": Kind(True, "a class missing from a split: its error (or AP) is not measured"),
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
    "palette": Kind(False, "palette colors: read as RGB"),
    "deep": Kind(False, "more than 8 bits a value: scaled to 8"),
    "transparent": Kind(False, "laid over white"),
    "rotated": Kind(False, "turned upright by their EXIF orientation, which other tools may ignore"),
    "animated": Kind(False, "several images in one file: the first is taken"),
    "few images": Kind(False, f"classes with fewer than {FEW} images: little can be held out"),
    "without a class": Kind(False, "ImageNet's test images: their classes were never published", OUT),
    "hidden": Kind(False, "hidden names, not used", OUT),
    "other file": Kind(False, "not images, not used", OUT),
}
"""What can be wrong with images, and with sets of class folders or lists."""
BOX_KINDS = {
    "no such image": Kind(True, "annotated, but not there", OUT),
    "unreadable image": Kind(True, "cannot be opened", OUT),
    "wrong size": Kind(True, "annotated with another size than the image has", OUT),
    "unreadable annotation": Kind(True, "annotations that cannot be read", OUT),
    "unreadable image entry": Kind(True, "images that the COCO file does not describe", OUT),
    "unreadable category": Kind(True, "categories that the COCO file does not describe", OUT),
    "two images": Kind(True, "an annotation that fits two files", OUT),
    "image twice": Kind(True, "listed twice in a split", "one of them kept"),
    "category twice": Kind(True, "two categories of one name", "the first kept, with its objects"),
    "duplicate id": Kind(True, "an id that is taken", "the first kept"),
    "unknown class": Kind(True, "objects of no known class", OUT),
    "unknown image": Kind(True, "objects of no known image", OUT),
    "unreadable object": Kind(True, "objects that cannot be read", OUT),
    "not finite": Kind(True, "boxes that are NaN or infinite: they make losses NaN", OUT),
    "no area": Kind(True, "boxes without width or height: they make losses NaN", OUT),
    "outside": Kind(True, "boxes that miss the image", OUT),
    "sticks out": Kind(True, "boxes that leave the image", "cut to it"),
    "box twice": Kind(True, "an object annotated twice", "one of them kept"),
    "bad segmentation": Kind(True, "objects whose outline cannot be used", OUT),
    "class without training objects": Kind(True, "there is nothing to learn it from"),
    "no objects": Kind(True, "a split without any object"),
    "list of others": Kind(False, "VOC lists with images of none of train, val and test, the only splits examined", OUT),
    "not annotated": Kind(False, "lists of images without annotations, such as VOC's later tests, which its server evaluates", OUT),
    "out of reach": Kind(True, "classes of which no anchors fit half of the objects: those will hardly be detected"),
    "file aside": Kind(False, "COCO files that could be meant as a split, beside the one that is read", OUT),
    "not listed": Kind(False, "images beside those of the set that no split names, and no list in ImageSets/Main", OUT),
    "unknown category": Kind(False, "categories of a COCO file that the first split does not have", OUT),
    "orientation": Kind(False, "EXIF orientation: the boxes are turned with the image where they were drawn before it"),
    "nearly twice": Kind(False, f"boxes of one class with an IoU of {SAME_IOU:g} or more: perhaps one object"),
    "two classes": Kind(False, f"boxes of two classes with an IoU of {SAME_IOU:g} or more: perhaps one object"),
    "outline elsewhere": Kind(False, f"outlines whose own box has an IoU below {OUTLINE_IOU:g} with the object's"),
    "object imbalance": Kind(False, f"the most frequent class has {IMBALANCE} times the objects of the rarest, or more"),
    "few objects": Kind(False, f"classes with fewer than {FEW} objects in train"),
}
"""What else can be wrong with sets with boxes."""
KINDS = CLASS_KINDS | BOX_KINDS


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or worth a note: a row of KINDS, the files, images, classes or splits it is about, and a detail.

    index: of the object (VOC) or annotation (COCO) in the file, from 0; None where no single object is meant.
    """

    kind: str
    names: tuple[str, ...]
    detail: str
    index: int | None = None

    @property
    def fault(self) -> bool:
        """Whether it counts for doctor's exit code."""
        return KINDS[self.kind].fault

    @property
    def place(self) -> str:
        """The names, each on one line, with the object: "Annotations/a.xml object 3"."""
        shown = ", ".join(name if name.isprintable() else repr(name) for name in self.names[:5])
        more = f" and {len(self.names) - 5:,} more" if len(self.names) > 5 else ""
        return shown + more + ("" if self.index is None else f" object {self.index}")

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.detail}"

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "fault": self.fault, "names": self.names, "index": self.index, "detail": self.detail}


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Findings in the order of the table, then by names and index."""
    order = {kind: place for place, kind in enumerate(KINDS)}
    return tuple(sorted(findings, key=lambda f: (order[f.kind], f.names, -1 if f.index is None else f.index)))
