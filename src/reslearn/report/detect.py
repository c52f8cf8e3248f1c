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
    "class": "right location, wrong class",
    "location": "right class, IoU with the object between 0.1 and 0.5",
    "both": "wrong class and wrong location",
    "duplicate": "object already matched by a more confident detection",
    "background": "no object at this location",
    "missed": "object without a detection",
}
METRICS = {
    "AP": ("AP", "mean over IoU 0.50 to 0.95"),
    "AP50": ("AP50", "at IoU 0.50"),
    "AP75": ("AP75", "at IoU 0.75"),
    "AP_small": ("AP small", "objects below 32² px"),
    "AP_medium": ("AP medium", "32² to 96² px"),
    "AP_large": ("AP large", "above 96² px"),
    "AR1": ("AR 1", "recall with 1 detection per image and class"),
    "AR10": ("AR 10", "recall with 10 detections"),
    "AR100": ("AR 100", "recall with 100 detections"),
    "AR_small": ("AR small", "AR 100, small objects"),
    "AR_medium": ("AR medium", "AR 100, medium objects"),
    "AR_large": ("AR large", "AR 100, large objects"),
    "VOC07": ("VOC 2007", "AP at IoU 0.50, 11-point interpolation"),
    "VOC10": ("VOC 2010", "AP at IoU 0.50, area under the curve"),
}
SIZES = ("small", "medium", "large")
COLORED = COLORS - 1  # classes that can have a color of their own, besides the mean
LEGEND = Markup('<i class="swatch truth"></i>objects and <i class="swatch predicted"></i>detections')


class ClassPrecision(RunSection):
    """AP of one class in percent; None if there are no objects of it."""

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
    """AP of one class by object size in percent, None without objects; `objects` has their counts."""

    name: str = Field(alias="class")
    small: float | None = None
    medium: float | None = None
    large: float | None = None
    objects: dict[str, int] = Field(default_factory=dict)


class BestThreshold(RunSection):
    """The score threshold with the highest F1, and its precision and recall in percent."""

    name: str = Field(alias="class")
    score: float | None = None
    precision: float | None = None
    recall: float | None = None


class DetectionReview(RunSection):
    """The output of `evaluation.detection_review.review` without its list of mistakes, which the gallery shows."""

    curves: tuple[PrecisionCurve, ...] = ()
    by_size: tuple[PrecisionBySize, ...] = ()
    thresholds: tuple[BestThreshold, ...] = ()
    mistakes: dict[str, dict[str, int]] = Field(default_factory=dict)


class DetectionNumbers(SplitNumbers):
    """The output of `evaluation.detection_metrics`: percent, None without objects. masks: the same metrics with mask IoU."""

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
    """A picture of one mistake, of an image with all its mistakes (kind "image"), or of an image's detections (no kind)."""

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
    note = "In percent, after the last iteration. Best: at the iteration with the highest validation AP."

    def findings(self, result: DetectionResult, split: str, numbers: DetectionNumbers) -> str:
        ap = detailed(percent(numbers.AP, 1), numbers.intervals.get("AP"), 1, f"{numbers.n:,} images")
        summary = f" {split.capitalize()} AP after the last iteration: {ap}, {percent(numbers.AP50, 1)} at IoU 0.5."
        if masks := numbers.masks:
            mask_ap = detailed(percent(masks.AP, 1), masks.intervals.get("AP"), 1)
            summary += f" Mask AP: {mask_ap}, {percent(masks.AP50, 1)} at IoU 0.5."
        if result.best and (best := result.best.measured):
            summary += f" At iteration {result.best.step:,}, which had the highest validation AP, the {best[0]} AP is"
            summary += f" {percent(best[1].AP, 1)}."
        return summary

    def score(self, numbers: DetectionNumbers) -> Score:
        return Score(numbers.AP, numbers.intervals.get("AP"))

    def seed_measures(self, numbers: DetectionNumbers) -> dict[str, float | None]:
        measures = {"AP": numbers.AP, "AP50": numbers.AP50, "AP75": numbers.AP75}
        return measures | {"mask AP": numbers.masks.AP if numbers.masks else None}

    def class_values(self, numbers: DetectionNumbers) -> dict[str, str]:
        return {row.name: number(row.AP, 1) for row in numbers.per_class}

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
        caption = "Means over classes. The area under a curve is the mean AP at its IoU."
        legend = list(enumerate(run.label for run in runs))
        return [PageSection("Precision and recall", [Figure(precision_recall(lines, "recall"), caption, legend)])]

    def details(self, result: DetectionResult, split: str, numbers: DetectionNumbers, index: int) -> list[PageSection]:
        return [_table(result), _classes(split, numbers), _curves(numbers, index), _mistakes(numbers.review.mistakes)]

    def pictures(self, run: RunRecord[DetectionResult], result: DetectionResult) -> list[PageSection]:
        def shots(pictures: Iterable[DetectionPicture]) -> list[Shot]:
            return [Shot(picture(run.folder, shown.image), *_caption(shown), shown.name) for shown in pictures]

        split = SPLITS.get(result.gallery_split, result.gallery_split)
        false_positives = shots(shown for shown in result.gallery if shown.kind not in ("missed", "image"))
        missed = shots(shown for shown in result.gallery if shown.kind == "missed")
        images = shots(shown for shown in result.gallery if shown.kind == "image")
        galleries = [
            Gallery(false_positives, "False positives by score"),
            Gallery(missed, "Missed objects, the largest of each class first"),
            Gallery(images, "Images with the most mistakes", wide=True),
        ]
        examples = f"Evenly spaced {split} images with all detections that score at least 0.5."
        source = f"{split.capitalize()} images with " if split else ""
        worst = Markup("{}{} above the best thresholds. Bold boxes are wrong or missed. Look for missing annotations, inaccurate")
        worst = (worst + " boxes, and objects that the detector has not learned.").format(source, LEGEND)
        return [
            PageSection("Detections", [Gallery(shots(result.examples), wide=True)], examples),
            PageSection("Worst mistakes", galleries, worst),
        ]


def _table(result: DetectionResult) -> PageSection:
    """All metrics, one column per evaluation."""
    columns = {}
    for when, results in (("last", result.last), ("best", result.best)):
        for split in ("test", "val"):
            if results and (numbers := getattr(results, split)) and (when == "last" or results.step != result.last.step):
                columns[f"{SPLITS[split]}, {when}"] = numbers
                columns |= {f"{SPLITS[split]}, {when}, masks": numbers.masks} if numbers.masks else {}
    rows = [
        [name, Cell(meaning, kind="soft"), *(numbers.cell(key) for numbers in columns.values())]
        for key, (name, meaning) in METRICS.items()
    ]
    after = "In percent, with 95% intervals over images. The first twelve metrics are COCO's. A dash means that there are no such"
    return PageSection("Average precision and recall", [Table(rows, ["", "", *columns])], after=after + " objects.")


def _classes(split: str, numbers: DetectionNumbers) -> PageSection:
    sizes = {row.name: row for row in numbers.review.by_size}
    thresholds = {row.name: row for row in numbers.review.thresholds}
    rows = []
    for k, row in enumerate(numbers.per_class):
        name = Cell(row.name, color=k if len(numbers.per_class) <= COLORED else None, kind="th")
        ap = [Cell(number(value, 1)) for value in (row.AP, row.AP50, row.AP75)]
        size, best = sizes.get(row.name), thresholds.get(row.name)
        cells = [Cell(number(getattr(size, key), 1), number(size.objects.get(key, 0))) if size else Cell() for key in SIZES]
        note = f"P {number(best.precision, 1)}, R {number(best.recall, 1)}" if best and best.score is not None else ""
        cells.append(Cell(number(best and best.score, 2), note))
        rows.append([name, Cell(number(row.objects)), Cell(bar=row.AP or 0), *ap, *cells])
    intro = f"AP in percent on the {split} images after the last iteration; by size, with the number of objects. The best"
    intro += " threshold is the score with the highest F1 at IoU 0.5, shown with its precision (P) and recall (R) in percent."
    head = ["class", "objects", "", "AP", "AP50", "AP75", *SIZES, "best threshold"]
    return PageSection("By class and size", [Table(rows, head)], intro)


def _curves(numbers: DetectionNumbers, index: int) -> PageSection:
    """Each class in its color; more than COLORED classes in gray, and their mean in the first color."""
    curves, colored = numbers.review.curves, len(numbers.per_class) <= COLORED
    names = [row.name for row in numbers.per_class]
    by_class = [[curve for curve in curves if curve.name == name] for name in names]
    lines = [*enumerate(by_class)] if colored else [*((None, lines) for lines in by_class), (0, mean_curves(curves))]
    caption = "The highest precision at each recall or above. The area under a curve is the AP of the class at that IoU."
    caption += "" if colored else " The bold curve is the mean over classes; gray curves are single classes."
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
    after = 'At IoU 0.5. "Kept" (bars) counts detections above the best threshold of their class; "all" counts every detection'
    after += " that AP is computed from."
    return PageSection("Mistakes by kind", [Table(rows, ["kind", "", "", "kept", "all"])], after=after)


def _caption(shown: DetectionPicture) -> tuple[str, list[str]]:
    if shown.kind in ("", "image"):
        counts = [(shown.objects, "objects"), (shown.detections, "detections")]
        line = ", ".join(f"{n:,} {name}" for n, name in counts if n is not None)
        mistakes = ", ".join(f"{n} {kind}" for kind, n in shown.mistakes.items() if n)
        line += f": {mistakes}" if mistakes else ""
        return "", [line] if line else []
    iou = f", IoU {shown.iou:.2f}" if shown.iou is not None else ""
    lines = [f"detection: {shown.label}, {shown.score:.2f}"] if shown.score is not None else []
    return shown.kind, lines + ([f"object: {shown.truth}{iou}"] if shown.truth is not None else [])


def mean_curves(curves: Sequence[PrecisionCurve]) -> list[PrecisionCurve]:
    """The mean over classes at each IoU; the area under it is the mean AP."""
    means = []
    for iou in sorted({curve.iou for curve in curves}):
        rows = [curve.precision for curve in curves if curve.iou == iou]
        if len({len(row) for row in rows}) == 1:
            means.append(PrecisionCurve.model_validate({"class": "", "iou": iou, "precision": np.mean(rows, axis=0).tolist()}))
    return means


def precision_recall(lines: Sequence[tuple[int | None, Sequence[PrecisionCurve]]], name: str) -> str:
    """Precision over recall as SVG, one panel per IoU; "" without curves.

    lines: (color or None for gray, curves). name: alphanumeric prefix for SVG ids, unique on the page.
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
