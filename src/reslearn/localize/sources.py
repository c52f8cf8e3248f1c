"""Data sets for localization: opened, checked, and read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reslearn.data.boxes.box_set import BadBoxes, BoxSet
from reslearn.data.boxes.read import open_boxes, split_names
from reslearn.data.boxes.reader import ImageReader
from reslearn.errors import UserError
from reslearn.localize.views import of_one_kind

CACHE_BYTES = 1 << 29  # of decoded images that stay in memory


class LocalizeSource:
    """A split: its images, the class and boxes of each, and a reader of their pixels."""

    def __init__(self, data: BoxSet) -> None:
        self.data, self.single = data, of_one_kind(data)
        self.reader = ImageReader(data.images, cache=CACHE_BYTES)
        self.names = [image.name for image in data.images]

    def __len__(self) -> int:
        return len(self.data)

    def share(self, rank: int, count: int) -> "LocalizeSource":
        """Every count-th image from the rank-th on."""
        return LocalizeSource(replace(self.data, images=self.data.images[rank::count]))


def open_to_train(data: str | Path) -> dict[str, BoxSet]:
    """Opens all splits of a set. Raises UserError without train images, or if it does not suit localization."""
    sets = _open(data)
    if "train" not in sets:
        raise UserError(f"{data}: has no train split")
    for each in sets.values():
        of_one_kind(each)
    if len(sets["train"].classes) < 2:
        raise UserError(f"{data}: has only one class, '{', '.join(sets['train'].classes)}': localization needs two or more")
    return sets


def open_to_test(data: str | Path, classes: Sequence[str], split: str | None = None) -> tuple[str, BoxSet]:
    """Opens one split, labeled as in `classes`; returns its name too. By default test, otherwise val or all images of a .json file.

    Raises UserError if there is none (training images are evaluated on request only), or for unknown classes.
    """
    there = split_names(data)
    name = split or next((name for name in ("test", "val", "all") if name in there), None)
    if name is None:
        raise UserError(f"{data}: has no test or val images; --split train evaluates on the training images")
    return name, _open(data, classes, (name,))[name]


def _open(data: str | Path, classes: Sequence[str] | None = None, only: Sequence[str] | None = None) -> dict[str, BoxSet]:
    try:
        return open_boxes(data, classes=classes, only=only)
    except BadBoxes as error:
        if unknown := [finding for finding in error.findings if finding.kind == "unknown class"]:
            raise UserError(f"{data}: has a class that the model does not know: {unknown[0]}") from error
        raise BadBoxes(error.findings, f"reslearn doctor {data} --fix COPY") from error
