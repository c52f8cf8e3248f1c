"""Classification runs in the report: test error, classes, confusion matrix, calibration, images with the highest loss."""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import MaxNLocator
from pydantic import Field, model_validator

from reslearn.report.elements import LONG, Bullets, Cell, Columns, Confusion, Figure, Gallery, PageSection, Shot, Table, picture
from reslearn.report.plots import INK, as_svg, hue, style
from reslearn.report.runs import SPLITS, RunRecord, RunResult, RunSection, SplitNumbers
from reslearn.report.task import Measure, Score, TaskPage
from reslearn.report.text import Interval, Tile, detailed, number, percent, spread, tile

MATRIX_CLASSES = 60  # a larger confusion matrix is illegible on a screen


class ConfidenceBin(RunSection):
    """A calibration bin; all values but `n` in percent."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


class ClassAccuracy(RunSection):
    """Accuracy of one class in percent; None if the split has no images of it."""

    name: str = Field(alias="class")
    n: int
    accuracy: float | None


class ClassificationNumbers(SplitNumbers):
    """The output of `evaluation.metrics`; errors and the interval in percent."""

    top1_error: float
    top1_interval: Interval = None
    top5_error: float | None = None
    calibration_error: float | None = None
    calibration_bins: tuple[ConfidenceBin, ...] = ()
    per_class: tuple[ClassAccuracy, ...] = ()
    confusion: tuple[list[int], ...] = ()

    @model_validator(mode="after")
    def _square(self) -> Self:
        if any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError("the confusion matrix is not square")
        if self.confusion and len(self.confusion) != len(self.per_class):
            raise ValueError(f"the confusion matrix has {len(self.confusion)} rows for {len(self.per_class)} classes")
        return self


class WorstImage(RunSection):
    """An image with a high loss; `probability` of the true class, in [0, 1]."""

    image: str
    name: str = ""
    label: str
    predicted: str
    loss: float
    probability: float


class ClassificationResult(RunResult[ClassificationNumbers]):
    """`result.json` of a classifier."""

    worst: tuple[WorstImage, ...] = ()
    worst_split: str = ""


class ClassificationPage(TaskPage[ClassificationResult]):
    plural, subject = "runs", ""
    result = ClassificationResult
    measure = Measure("error, %", {"error": "error"}, {"top1_error": "error"}, digits=2, falls=True)
    by_class = "Accuracy by class"
    note = "Last: after the last iteration. Best: at the iteration with the lowest validation error."

    def findings(self, result: ClassificationResult, split: str, numbers: ClassificationNumbers) -> str:
        error = detailed(percent(numbers.top1_error), numbers.top1_interval, 2, f"{numbers.n:,} images")
        summary = f" {split.capitalize()} error after the last iteration: {error}."
        if result.best and result.best.step == result.last.step:
            summary += " This is also the checkpoint with the lowest validation error."
        elif result.best and (best := result.best.measured):
            summary += f" At iteration {result.best.step:,}, which had the lowest validation error, the {best[0]} error is"
            summary += f" {percent(best[1].top1_error)}."
        return summary

    def score(self, numbers: ClassificationNumbers) -> Score:
        return Score(numbers.top1_error, numbers.top1_interval)

    def seed_measures(self, numbers: ClassificationNumbers) -> dict[str, float | None]:
        return {"error": numbers.top1_error}

    def class_values(self, numbers: ClassificationNumbers) -> dict[str, str]:
        return {row.name: percent(row.accuracy) for row in numbers.per_class}

    def tiles(self, result: ClassificationResult, split: str, numbers: ClassificationNumbers) -> list[Tile]:
        test, val, best = result.last.test, result.last.val, result.best
        tiles = [tile("test error, last", percent(test.top1_error), test.top1_interval)] if test else []
        tiles += [("test error, best", percent(best.test.top1_error), f"iteration {best.step:,}")] if best and best.test else []
        tiles += [("top-5 test error", percent(test.top5_error), "")] if test and test.top5_error is not None else []
        tiles += [tile("validation error", percent(val.top1_error), val.top1_interval)] if val else []
        return tiles + ([("parameters", number(result.parameters), "")] if result.parameters else [])

    def cells(self, result: ClassificationResult, numbers: ClassificationNumbers) -> dict[str, Cell]:
        columns = {"test error, last": result.last.test, "test error, best": result.best and result.best.test}
        columns |= {"validation error": result.last.val}
        return {title: Cell(percent(split.top1_error), spread(split.top1_interval)) for title, split in columns.items() if split}

    def details(self, result: ClassificationResult, split: str, numbers: ClassificationNumbers, index: int) -> list[PageSection]:
        hardest = sorted(numbers.per_class, key=lambda row: math.inf if row.accuracy is None else row.accuracy)
        rows = [[row.name, Cell(number(row.n)), Cell(bar=row.accuracy or 0), Cell(percent(row.accuracy))] for row in hardest]
        table = Table(rows, ["class", "images", "", "accuracy"], "long" if len(rows) > LONG else "")
        names = [row.name for row in numbers.per_class]
        mistakes = [
            [Cell(true, kind=""), Cell(predicted, kind=""), Cell(number(n)), Cell(percent(share))]
            for true, predicted, n, share in most_confused(numbers.confusion, names)
        ]
        pairs = Table(mistakes, ["true class", "predicted as", Cell("images"), Cell("share of the class")], "confused")
        side_by_side = [PageSection("Most confused", [pairs]), PageSection("Calibration", [_calibration(numbers, index)])]
        matrix = numbers.confusion if len(names) <= MATRIX_CLASSES else []
        source = f"{split.capitalize()} images, after the last iteration"
        return [
            PageSection("Accuracy by class", [table], f"{source}. Hardest class first."),
            PageSection("Confusion matrix", [Confusion(matrix, names)], f"{source}."),
            PageSection("", [Columns([section for section in side_by_side if section.shown])]),
        ]

    def pictures(self, run: RunRecord[ClassificationResult], result: ClassificationResult) -> list[PageSection]:
        shots = [
            Shot(
                picture(run.folder, image.image),
                image.label,
                [f"predicted as {image.predicted}", f"loss {image.loss:.2f}", f"p = {image.probability:.2g}"],
                image.name,
            )
            for image in result.worst
        ]
        source = f"{SPLITS.get(result.worst_split, result.worst_split).capitalize()} images. " if result.worst_split else ""
        intro = f"{source}p is the predicted probability of the true class. Look for wrong labels, unusual images, and patterns"
        intro += " that the network has not learned."
        return [PageSection("Images with the highest loss", [Gallery(shots)], intro)]


def _calibration(numbers: ClassificationNumbers, index: int) -> Figure | Bullets:
    if numbers.calibration_error is None:
        return Bullets([])
    bins = [bin for bin in numbers.calibration_bins if bin.confidence is not None and bin.accuracy is not None]
    excess = sum(bin.n * ((bin.confidence or 0) - (bin.accuracy or 0)) for bin in bins) / max(1, numbers.n)
    caption = f"Expected calibration error: {percent(numbers.calibration_error)}, the mean gap between confidence and accuracy."
    if abs(excess) >= 0.5:
        caption += f" On average, the network is {'overconfident' if excess > 0 else 'underconfident'}."
    plot = reliability(numbers.calibration_bins, f"reliability{index}")
    return Figure(plot, caption, narrow=True) if plot else Bullets([caption])


def most_confused(confusion: Sequence[Sequence[int]], classes: Sequence[str], k: int = 10) -> list[tuple[str, str, int, float]]:
    """Returns the k most frequent mistakes: true class, predicted class, images, percent of the true class; ties by class order.

    confusion: K x K, rows are true classes.
    """
    mistakes = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n > 0 and i != j]
    mistakes.sort(key=lambda mistake: -mistake[0])
    return [(classes[i], classes[j], n, 100 * n / sum(confusion[i])) for n, i, j in mistakes[:k]]


def reliability(bins: Sequence[ConfidenceBin], name: str) -> str:
    """Reliability diagram as SVG: accuracy by confidence; the diagonal is perfect calibration (Guo et al. 2017, figure 1).

    name: alphanumeric prefix for SVG ids, unique on the page. Returns "" if all bins are empty.
    """
    filled = [(bin.low, bin.high, bin.n, bin.accuracy) for bin in bins if bin.n and bin.accuracy is not None]
    if not filled:
        return ""
    low, high, n, accuracy = (np.array(column) for column in zip(*filled, strict=True))
    with style():
        figure = Drawing(figsize=(4.2, 3.9))
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1], gridspec_kw={"hspace": 0.28})
        figure.subplots_adjust(left=0.1, right=0.96, top=0.93, bottom=0.115)
        upper.bar(low, accuracy, width=0.9 * (high - low), align="edge", color=hue(0), alpha=0.6)
        upper.plot([0, 100], [0, 100], color=INK, lw=1.3, ls=(0, (3, 2)), zorder=3)
        upper.set_title("accuracy, %")
        upper.set_ylim(0, 100)
        lower.bar(low, 100 * n / n.sum(), width=0.9 * (high - low), align="edge", color=INK, alpha=0.45)
        lower.set_title("share of the images, %")
        lower.yaxis.set_major_locator(MaxNLocator(2))
        lower.set_xlim(0, 100)
        lower.set_xlabel("confidence, %")
        return as_svg(figure, name, "Accuracy by confidence")
