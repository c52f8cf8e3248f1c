"""Detection runs in the report: average precision, classes and sizes, precision and recall, mistakes with pictures."""

from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing
from pydantic import Field

from reslearn.report.elements import Cell, Figure, Gallery, PageSection, Shot, Table, picture
from reslearn.report.plots import COLORS, LINE, as_svg, hue, style, values
from reslearn.report.runs import SPLITS, RunRecord, RunResult, RunSection, SplitNumbers
from reslearn.report.task import Measure, Score, TaskPage
from reslearn.report.text import Interval, Tile, detailed, number, percent, spread, tile

MISTAKES = {
    "class": "in place, but of another class",
    "location": "of the right class, IoU with its object between 0.1 and 0.5",
    "both": "of another class, and out of place",
    "duplicate": "an object that a more confident detection has found",
    "background": "no object there",
    "missed": "an object without a detection",
}
METRICS = {
    "AP": ("AP", "mean over IoU 0.50 to 0.95"),
    "AP50": ("AP50", "at IoU 0.50"),
    "AP75": ("AP75", "at IoU 0.75"),
    "AP_small": ("AP small", "objects below 32² px"),
    "AP_medium": ("AP medium", "32² to 96² px"),
    "AP_large": ("AP large", "above 96² px"),
    "AR1": ("AR 1", "recall of the best detection of an image and class"),
    "AR10": ("AR 10", "of the best 10"),
    "AR100": ("AR 100", "of the best 100"),
    "AR_small": ("AR small", "of 100, small objects"),
    "AR_medium": ("AR medium", "medium"),
    "AR_large": ("AR large", "large"),
    "VOC07": ("VOC 2007", "AP at IoU 0.50, at 11 recalls"),
    "VOC10": ("VOC 2010", "AP at IoU 0.50, the area"),
}
SIZES = ("small", "medium", "large")
COLORED = COLORS - 1  # classes that can be told apart by color, besides the mean
LEGEND = Markup('<i class="swatch truth"></i>objects, <i class="swatch found"></i>detections')


class ClassPrecision(RunSection):
    """AP of one class in percent; None if there is no object of it."""

    name: str = Field(alias="class")
    objects: int = 0
    AP: float | None = None
    AP50: float | None = None
    AP75: float | None = None


class PrecisionCurve(RunSection):
    """Precision in percent at recalls of 0, 1, ..., 100%."""

    name: str = Field(alias="class")
    iou: float
    precision: list[float]


class PrecisionBySize(RunSection):
    """AP of one class by size in percent, None without objects; `objects` counts them."""

    name: str = Field(alias="class")
    small: float | None = None
    medium: float | None = None
    large: float | None = None
    objects: dict[str, int] = Field(default_factory=dict)


class BestThreshold(RunSection):
    """The score with the highest F1, and precision and recall there in percent."""

    name: str = Field(alias="class")
    score: float | None = None
    precision: float | None = None
    recall: float | None = None


class DetectionReview(RunSection):
    """`evaluation.detection_review.review` as read back, without its list of mistakes, which the gallery shows."""

    curves: tuple[PrecisionCurve, ...] = ()
    by_size: tuple[PrecisionBySize, ...] = ()
    thresholds: tuple[BestThreshold, ...] = ()
    mistakes: dict[str, dict[str, int]] = Field(default_factory=dict)


class DetectionNumbers(SplitNumbers):
    """`evaluation.detection_metrics` as read back: percent, None if not measurable. masks: the same by masks instead of boxes."""

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
    intervals: dict[str, Interval] = Field(default_factory=dict)
    per_class: tuple[ClassPrecision, ...] = ()
    review: DetectionReview = DetectionReview()
    masks: "DetectionNumbers | None" = None

    def cell(self, key: str) -> Cell:
        return Cell(number(getattr(self, key), 1), spread(self.intervals.get(key), 1, ""))


class DetectionPicture(RunSection):
    """A picture of one mistake, or of a whole image with all of them (kind "image"), or of its detections (no kind)."""

    image: str
    kind: str = ""
    name: str = ""
    label: str | None = None
    truth: str | None = None
    score: float | None = None
    iou: float | None = None
    objects: int | None = None
    detections: int | None = None
    mistakes: dict[str, int] = Field(default_factory=dict)


class DetectionResult(RunResult[DetectionNumbers]):
    """`result.json` of a detector."""

    gallery: tuple[DetectionPicture, ...] = ()
    gallery_split: str = ""
    examples: tuple[DetectionPicture, ...] = ()


DetectionRun = RunRecord[DetectionResult]


class DetectionPage(TaskPage[DetectionResult]):
    plural, subject = "detectors", "A detector on "
    result = DetectionResult
    measure = Measure("average precision, %", {}, {key: key for key in ("AP", "AP50", "AP75")}, digits=1, falls=False)
    by_class = "AP by class"
    note = "Percent, after the last iteration. Best is the iteration with the highest validation AP."

    def findings(self, result: DetectionResult, split: str, numbers: DetectionNumbers) -> str:
        ap = detailed(percent(numbers.AP, 1), numbers.intervals.get("AP"), 1, f"{numbers.n:,} images")
        says = f" {split.capitalize()} AP after the last iteration: {ap}, {percent(numbers.AP50, 1)} at IoU 0.5."
        if masks := numbers.masks:
            says += (
                f" Mask AP: {detailed(percent(masks.AP, 1), masks.intervals.get('AP'), 1)}, {percent(masks.AP50, 1)} at IoU 0.5."
            )
        if result.best and (best := result.best.measured):
            says += f" At iteration {result.best.step:,}, which had the highest validation AP, the {best[0]} AP is"
            says += f" {percent(best[1].AP, 1)}."
        return says

    def score(self, numbers: DetectionNumbers) -> Score:
        return Score(numbers.AP, numbers.intervals.get("AP"))

    def seed_measures(self, numbers: DetectionNumbers) -> dict[str, float | None]:
        measures = {"AP": numbers.AP, "AP50": numbers.AP50, "AP75": numbers.AP75}
        return measures | {"mask AP": numbers.masks.AP if numbers.masks else None}

    def class_values(self, numbers: DetectionNumbers) -> dict[str, str]:
        return {one.name: number(one.AP, 1) for one in numbers.per_class}

    def tiles(self, result: DetectionResult, split: str, numbers: DetectionNumbers) -> list[Tile]:
        shown = [(f"{split} {key}", numbers, key) for key in ("AP", "AP50", "AP75")]
        shown += [(f"{split} mask AP", numbers.masks, "AP")] if numbers.masks else []
        shown += [("validation AP", result.last.val, "AP")] if result.last.test and result.last.val else []
        tiles = [tile(name, percent(getattr(of, key), 1), of.intervals.get(key), 1) for name, of, key in shown]
        if result.best and (best := result.best.measured):
            tiles.append((f"{best[0]} AP, best", percent(best[1].AP, 1), f"iteration {result.best.step:,}, best.safetensors"))
        return tiles

    def cells(self, result: DetectionResult, numbers: DetectionNumbers) -> dict[str, Cell]:
        best = result.best.measured if result.best else None
        cells = {title: numbers.cell(key) for key, (title, _) in list(METRICS.items())[:6]}
        return cells | ({"AP, best": best[1].cell("AP")} if best else {})

    def compared(self, runs: Sequence[DetectionRun]) -> list[PageSection]:
        lines = [(i, mean_curves(run.measured[1].review.curves)) for i, run in enumerate(runs) if run.measured]
        caption = "Means over the classes: the area below a curve is the mean AP at its IoU."
        legend = list(enumerate(run.label for run in runs))
        return [PageSection("Precision and recall", [Figure(precision_recall(lines, "recall"), caption, legend)])]

    def details(self, result: DetectionResult, split: str, numbers: DetectionNumbers, index: int) -> list[PageSection]:
        return [_table(result), _classes(split, numbers), _curves(numbers, index), _mistakes(numbers.review.mistakes)]

    def pictures(self, run: RunRecord[DetectionResult], result: DetectionResult) -> list[PageSection]:
        def shots(pictures: Iterable[DetectionPicture]) -> list[Shot]:
            return [Shot(picture(run.folder, one.image), *_caption(one), one.name) for one in pictures]

        split = SPLITS.get(result.gallery_split, result.gallery_split)
        galleries = [
            Gallery(shots(one for one in result.gallery if one.kind not in ("missed", "image")), "False positives by score"),
            Gallery(
                shots(one for one in result.gallery if one.kind == "missed"), "Missed objects, the largest of each class first"
            ),
            Gallery(shots(one for one in result.gallery if one.kind == "image"), "Images with the most mistakes", wide=True),
        ]
        found = f"Evenly spaced {split} images with all detections of a score of at least 0.5."
        of = f"From the {split} images: " if split else ""
        worst = Markup("{}{} above the best thresholds; bold boxes are wrong or missed. Look for objects that are not annotated,")
        worst = (worst + " inaccurate boxes, and what the detector has not learned.").format(of, LEGEND)
        return [
            PageSection("Detections", [Gallery(shots(result.examples), wide=True)], found),
            PageSection("The worst mistakes", galleries, worst),
        ]


def _table(result: DetectionResult) -> PageSection:
    """All metrics of all evaluations: a column for each."""
    columns = {}
    for when, one in (("last", result.last), ("best", result.best)):
        for split in ("test", "val"):
            if one and (numbers := getattr(one, split)) and (when == "last" or one.step != result.last.step):
                columns[f"{SPLITS[split]}, {when}"] = numbers
                columns |= {f"{SPLITS[split]}, {when}, masks": numbers.masks} if numbers.masks else {}
    rows = [
        [name, Cell(what, kind="soft"), *(numbers.cell(key) for numbers in columns.values())]
        for key, (name, what) in METRICS.items()
    ]
    after = "Percent; below, 95% intervals over images. The first twelve are COCO's. – : there is no such object."
    return PageSection("Average precision and recall", [Table(rows, ["", "", *columns])], after=after)


def _classes(split: str, numbers: DetectionNumbers) -> PageSection:
    sizes = {one.name: one for one in numbers.review.by_size}
    best = {one.name: one for one in numbers.review.thresholds}
    rows = []
    for k, one in enumerate(numbers.per_class):
        name = Cell(one.name, color=k if len(numbers.per_class) <= COLORED else None, kind="th")
        ap = [Cell(number(value, 1)) for value in (one.AP, one.AP50, one.AP75)]
        size, at = sizes.get(one.name), best.get(one.name)
        cells = [Cell(number(getattr(size, key), 1), number(size.objects.get(key, 0))) if size else Cell() for key in SIZES]
        recall = f"P {number(at.precision, 1)}, R {number(at.recall, 1)}" if at and at.score is not None else ""
        rows.append([name, Cell(number(one.objects)), Cell(bar=one.AP or 0), *ap, *cells, Cell(number(at and at.score, 2), recall)])
    intro = f"AP on the {split} images after the last iteration, percent; below the sizes, the numbers of objects. The best"
    intro += " threshold is the score with the highest F1 at IoU 0.5; below it, precision and recall."
    head = ["class", "objects", "", "AP", "AP50", "AP75", *SIZES, "best threshold"]
    return PageSection("By class and size", [Table(rows, head)], intro)


def _curves(numbers: DetectionNumbers, index: int) -> PageSection:
    """Each class in its color; too many of them in gray, and their mean in the first color."""
    curves, colored = numbers.review.curves, len(numbers.per_class) <= COLORED
    names = [one.name for one in numbers.per_class]
    each = [[curve for curve in curves if curve.name == name] for name in names]
    lines = [*enumerate(each)] if colored else [*((None, some) for some in each), (0, mean_curves(curves))]
    caption = "The best precision at each recall or above; the area below a curve is the AP of the class at that IoU."
    caption += "" if colored else " The mean over classes is bold, single classes are gray."
    plot = precision_recall(lines, f"recall{index}")
    return PageSection("Precision and recall", [Figure(plot, caption, [*enumerate(names)] if colored else [])])


def _mistakes(counts: dict[str, dict[str, int]]) -> PageSection:
    kept, total = counts.get("kept", {}), counts.get("all", {})
    top = max(kept.values(), default=0) or 1
    rows = [
        [kind, Cell(meaning, kind="soft"), Cell(bar=100 * kept.get(kind, 0) / top), Cell(number(kept.get(kind, 0)))]
        + [Cell(number(total.get(kind, 0)), kind="n soft")]
        for kind, meaning in (MISTAKES if counts else {}).items()
    ]
    after = "At IoU 0.5. Kept detections, which the bars show, are those above the best threshold of their class; all are those"
    after += " that AP is computed from."
    return PageSection("Mistakes by kind", [Table(rows, ["kind", "", "", "kept", "all"])], after=after)


def _caption(one: DetectionPicture) -> tuple[str, list[str]]:
    if one.kind in ("", "image"):
        counts = [f"{n:,} {what}" for n, what in ((one.objects, "objects"), (one.detections, "detections")) if n is not None]
        mistakes = ", ".join(f"{n} {kind}" for kind, n in one.mistakes.items() if n)
        line = ", ".join(counts) + (f": {mistakes}" if mistakes else "")
        return "", [line] if line else []
    iou = f", IoU {one.iou:.2f}" if one.iou is not None else ""
    found = [f"detection: {one.label}, {one.score:.2f}"] if one.score is not None else []
    return one.kind, found + ([f"object: {one.truth}{iou}"] if one.truth is not None else [])


def mean_curves(curves: Sequence[PrecisionCurve]) -> list[PrecisionCurve]:
    """The mean over classes at each IoU: the area below it is the mean AP."""
    means = []
    for iou in sorted({curve.iou for curve in curves}):
        rows = [curve.precision for curve in curves if curve.iou == iou]
        if len({len(row) for row in rows}) == 1:
            means.append(PrecisionCurve.model_validate({"class": "", "iou": iou, "precision": np.mean(rows, axis=0).tolist()}))
    return means


def precision_recall(lines: Sequence[tuple[int | None, Sequence[PrecisionCurve]]], name: str) -> str:
    """Precision over recall, a panel for each IoU; "" without curves. lines: (color, None for gray; curves).

    name: letters and digits that no other plot of the page has.
    """
    ious = sorted({curve.iou for _, curves in lines for curve in curves})
    if not ious:
        return ""
    with style():
        figure = Drawing(figsize=(9.6, 4.1))
        panels = figure.subplots(1, len(ious), squeeze=False, sharey=True, gridspec_kw={"wspace": 0.07}).ravel()
        figure.subplots_adjust(left=0.055, right=0.98, top=0.92, bottom=0.115)
        for panel, iou in zip(panels, ious, strict=True):
            for color, curve in ((color, curve) for color, curves in lines for curve in curves if curve.iou == iou):
                line = {"color": LINE, "lw": 1} if color is None else {"color": hue(color), "lw": 1.8}
                panel.plot(np.linspace(0, 100, len(curve.precision)), curve.precision, **line)
            panel.set_title(f"precision, %, at IoU {iou:g}")
            panel.set_xlabel("recall, %")
            panel.set_xlim(0, 100)
            panel.set_ylim(0, 101)
            values(panel)
        return as_svg(figure, name, "Precision over recall")
