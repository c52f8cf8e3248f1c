"""Annotated sets as localization takes them: opened, checked, and read."""

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
    """All splits of a set, train among them. Raises UserError where localization cannot be learned from it."""
    sets = _open(data)
    if "train" not in sets:
        raise UserError(f"{data}: has no train split to learn from")
    for each in sets.values():
        of_one_kind(each)
    if len(sets["train"].classes) < 2:
        raise UserError(f"{data}: has one class only, '{', '.join(sets['train'].classes)}'")
    return sets


def open_to_test(data: str | Path, classes: Sequence[str], split: str | None = None) -> tuple[str, BoxSet]:
    """A split and its name: the one asked for, else test, else val, else all images of a .json file; labeled as `classes` are.

    Raises UserError where there is none (what was trained on is tested on request only), or it has other classes.
    """
    there = split_names(data)
    name = split or next((name for name in ("test", "val", "all") if name in there), None)
    if name is None:
        raise UserError(f"{data}: has neither test nor val images; --split train tests on those that are there to learn from")
    return name, _open(data, classes, (name,))[name]


def _open(data: str | Path, classes: Sequence[str] | None = None, only: Sequence[str] | None = None) -> dict[str, BoxSet]:
    try:
        return open_boxes(data, classes=classes, only=only)
    except BadBoxes as error:
        if unknown := [finding for finding in error.findings if finding.kind == "unknown class"]:
            raise UserError(f"{data}: has a class that the model does not know: {unknown[0]}") from error
        raise BadBoxes(error.findings, f"reslearn doctor {data} --fix COPY") from error
