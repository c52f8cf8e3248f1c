"""Run folders of detectors, read and checked."""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from reslearn.report.runs import AnyRun, Folder, Outcome, Part, followed, in_order, number, progress, read_json, read_lines

KINDS = ("class", "location", "both", "duplicate", "background", "missed")


class ClassNumbers(Part):
    """AP of one class in percent; None where there is no object of it."""

    name: str = Field(alias="class")
    objects: int = 0
    AP: float | None = None
    AP50: float | None = None
    AP75: float | None = None


class Precision(Part):
    """Precision in percent at recalls of 0, 1, ..., 100%."""

    name: str = Field(alias="class")
    iou: float
    precision: list[float]


class BySize(Part):
    """AP of one class by size in percent, None without objects; `objects` counts them."""

    name: str = Field(alias="class")
    small: float | None = None
    medium: float | None = None
    large: float | None = None
    objects: dict[str, int] = Field(default_factory=dict)


class Cut(Part):
    """The score with the highest F1, and what a class has there in percent."""

    name: str = Field(alias="class")
    score: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


class Review(Part):
    """`evaluation.detection_review.review` as read back, less its list of mistakes, of which the gallery has the pictures."""

    curves: list[Precision] = Field(default_factory=list)
    by_size: list[BySize] = Field(default_factory=list)
    thresholds: list[Cut] = Field(default_factory=list)
    mistakes: dict[str, dict[str, int]] = Field(default_factory=dict)


class Numbers(Part):
    """`evaluation.detection.detection_metrics` as read back: percent, None where nothing can be measured."""

    n: int
    objects: int = 0
    AP: float | None
    AP50: float | None = None
    AP75: float | None = None
    AP_small: float | None = None
    AP_medium: float | None = None
    AP_large: float | None = None
    AR1: float | None = None
    AR10: float | None = None
    AR100: float | None = None
    AR_small: float | None = None
    AR_medium: float | None = None
    AR_large: float | None = None
    VOC07: float | None = None
    VOC10: float | None = None
    intervals: dict[str, tuple[float, float] | None] = Field(default_factory=dict)
    per_class: list[ClassNumbers] = Field(default_factory=list)
    review: Review | None = None
    masks: "Numbers | None" = None  # of a detector with masks, by them instead of by boxes


class Snapshot(Part):
    """The detector at one step, measured."""

    step: int
    val: Numbers | None = None
    test: Numbers | None = None


class Picture(Part):
    """A picture of the gallery: of one mistake, or (kind "image") of a whole image with all of its mistakes."""

    image: str
    kind: str
    name: str = ""
    label: str | None = None
    truth: str | None = None
    score: float | None = None
    iou: float | None = None
    objects: int | None = None
    detections: int | None = None
    mistakes: dict[str, int] = Field(default_factory=dict)


class Example(Part):
    """A picture of what is found in an image."""

    image: str
    name: str = ""


class DetectionResult(Outcome):
    """`result.json` of a detector."""

    last: Snapshot
    best: Snapshot | None = None
    gallery: list[Picture] = Field(default_factory=list)
    gallery_split: str = ""
    examples: list[Example] = Field(default_factory=list)


@dataclass(frozen=True)
class DetectionRun(AnyRun):
    """A run of a detector. `train` and `held_out`: columns of metrics.jsonl by name, float64 of one length each, NaN where a line
    has no number: step, loss, lr, AP, AP50, AP75, and the parts of the loss by their own names."""

    result: DetectionResult | None
    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    held_out_split: str
    parts: tuple[str, ...]


def read_run(opened: Folder) -> DetectionRun:
    """A detector's run. Raises UserError for a broken file."""
    path = opened.folder / "result.json"
    result = read_json(path, DetectionResult) if path.exists() else None
    lines = read_lines(opened.folder / "metrics.jsonl")
    split, evals = followed(lines)
    sorts = {"train": in_order(line for line in lines if line["event"] == "train"), "held_out": in_order(evals)}
    losses = {sort: [_parts(line.get("losses")) for line in some] for sort, some in sorts.items()}
    parts = tuple(dict.fromkeys(key for some in losses.values() for one in some for key in one))
    columns = {
        sort: {key: np.array([number(line, key) for line in some]) for key in ("step", "loss", "lr", "AP", "AP50", "AP75")}
        | {part: np.array([number(one, part) for one in losses[sort]]) for part in parts}
        for sort, some in sorts.items()
    }
    return DetectionRun(**vars(opened), **columns, held_out_split=split, parts=parts, **progress(lines, result), result=result)


def _parts(losses: object) -> dict[str, object]:
    return {str(key): value for key, value in losses.items()} if isinstance(losses, dict) else {}
