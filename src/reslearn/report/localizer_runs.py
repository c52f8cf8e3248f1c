"""Run folders of `reslearn localize`, both stages, read and checked."""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from reslearn.report.runs import AnyRun, Folder, Outcome, Part, in_order, number, progress, read_json, read_lines

VIEWS = {"1-crop": "one crop", "dense": "dense", "refined": "dense, then R-CNN"}


class Wrong(Part):
    """An error in percent with its 95% interval. `right_by_iou`: percent of images that are right where an overlap of 0, 0.05,
    ... 1 is asked."""

    error: float
    interval: tuple[float, float] | None = None
    right_by_iou: list[float] = Field(default_factory=list)


class ClassError(Part):
    """The error of one class, its name being given; None where there is no image of it."""

    name: str = Field(alias="class")
    n: int
    error: float | None
    interval: tuple[float, float] | None = None


class View(Part):
    """What a localizer errs on when it looks in one way."""

    true_class: Wrong
    top1: Wrong | None = None
    top5: Wrong | None = None
    classification: Wrong | None = None
    per_class: list[ClassError] = Field(default_factory=list)


class Numbers(Part):
    """`localize.evaluate` as read back."""

    n: int
    scales: list[int] = Field(default_factory=list)
    one_crop: View | None = Field(default=None, alias="1-crop")
    dense: View | None = None
    refined: View | None = None

    @property
    def views(self) -> dict[str, View]:
        """Those that there are, in the order of VIEWS."""
        found = {"1-crop": self.one_crop, "dense": self.dense, "refined": self.refined}
        return {name: view for name, view in found.items() if view is not None}


class Picture(Part):
    """A picture of the gallery; `kind` is worst or right, `iou` that of the guess for the image's class with its true box."""

    image: str
    kind: str
    name: str = ""
    label: str
    predicted: str
    iou: float


class LocalizationResult(Outcome):
    """`result.json` of a localizer."""

    val: Numbers | None = None
    test: Numbers | None = None
    gallery: list[Picture] = Field(default_factory=list)
    gallery_split: str = ""
    gallery_view: str = ""


@dataclass(frozen=True)
class LocalizationRun(AnyRun):
    """A run of a localizer. `train`: columns of metrics.jsonl by name, float64 of one length each, NaN where a line has no number:
    step, lr, loss, and its `parts` by their own names."""

    result: LocalizationResult | None
    train: dict[str, np.ndarray]
    parts: tuple[str, ...]


def read_run(opened: Folder) -> LocalizationRun:
    """A localizer's run. Raises UserError for a broken file."""
    path = opened.folder / "result.json"
    result = read_json(path, LocalizationResult) if path.exists() else None
    lines = read_lines(opened.folder / "metrics.jsonl")
    learned = in_order(line for line in lines if line["event"] == "train")
    losses = [line["losses"] if isinstance(line.get("losses"), dict) else {} for line in learned]
    parts = tuple(dict.fromkeys(str(key) for one in losses for key in one))
    columns = {key: np.array([number(line, key) for line in learned]) for key in ("step", "lr", "loss")}
    columns |= {part: np.array([number(one, part) for one in losses]) for part in parts}
    return LocalizationRun(**vars(opened), train=columns, parts=parts, **progress(lines, result), result=result)
