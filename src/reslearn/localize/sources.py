"""Data sets for localization: opened, checked and read."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.boxes.box_set import BadBoxes, BoxSet
from reslearn.data.boxes.read import open_boxes, split_names
from reslearn.data.boxes.reader import ImageReader
from reslearn.errors import UserError
from reslearn.localize.views import of_one_kind

CACHE_BYTES = 1 << 29  # decoded images kept in memory


class LocalizeSource:
    """A split: its images, the class and boxes of each, and a reader of their pixels."""

    def __init__(self, split: BoxSet) -> None:
        self.split, self.single = split, of_one_kind(split)
        self.reader = ImageReader(split.images, cache=CACHE_BYTES)
        self.names = [image.name for image in split.images]
        self._proposals: Any = None

    def __len__(self) -> int:
        return len(self.split)

    def share(self, rank: int, count: int) -> "LocalizeSource":
        """A rank's share of the images: every count-th, starting at index `rank`."""
        return LocalizeSource(replace(self.split, images=self.split.images[rank::count]))

    def proposals(self, file: Path) -> np.ndarray:
        """The proposals of these images, float32 (N, P, 4), memory-mapped once."""
        if self._proposals is None:
            self._proposals = np.load(file, mmap_mode="r")
        return self._proposals


def open_to_train(data: str | Path) -> dict[str, BoxSet]:
    """Opens all splits of a set. Raises UserError without train images, or if it does not suit localization."""
    sets = _open(data)
    if "train" not in sets:
        raise UserError(f"{data}: has no train split")
    for split in sets.values():
        of_one_kind(split)
    if len(sets["train"].classes) < 2:
        raise UserError(f"{data}: has only one class, '{', '.join(sets['train'].classes)}': localization needs two or more")
    return sets


def open_to_test(data: str | Path, classes: Sequence[str], split: str | None = None) -> tuple[str, BoxSet]:
    """Opens a split, labeled as in `classes`: by default test, otherwise val or all images of a .json file. Returns its name, too.

    Raises UserError if there is none (training images are evaluated on request only), or for unknown classes.
    """
    names = split_names(data)
    name = split or next((name for name in ("test", "val", "all") if name in names), None)
    if name is None:
        raise UserError(f"{data}: has no test or val images; --split train evaluates on the training images")
    return name, _open(data, classes, (name,))[name]


def _open(data: str | Path, classes: Sequence[str] | None = None, only: Sequence[str] | None = None) -> dict[str, BoxSet]:
    try:
        return open_boxes(data, classes=classes, only=only)
    except BadBoxes as error:
        if unknown := [finding for finding in error.findings if finding.kind == "unknown class"]:
            raise UserError(f"{data}: has a class that the model lacks: {unknown[0]}") from error
        raise BadBoxes(error.findings, f"reslearn doctor {data} --fix COPY") from error
