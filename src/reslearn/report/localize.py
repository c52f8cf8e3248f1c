"""Localization runs in the report: errors by view and class, box overlaps, pictures of wrong and right boxes."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing
from pydantic import Field

from reslearn.report.elements import LONG, Cell, Figure, Gallery, PageSection, Sheet, Shot, Table, picture
from reslearn.report.plots import INK, as_svg, hue, style, values
from reslearn.report.runs import SPLITS, RunRecord, RunResult, RunSection, SplitNumbers
from reslearn.report.task import Measure, Score, TaskPage
from reslearn.report.text import Interval, Tile, detailed, number, percent, spread, tile

VIEWS = {"one_crop": "one crop", "dense": "dense", "refined": "dense, then R-CNN"}
ERRORS = {
    "true_class": "true class given",
    "top1": "predicted class",
    "top5": "top-5 predicted classes",
    "classification": "class only",
}
HALF = 10  # index of 0.5, the overlap that a correct box needs, among the 21 overlaps
OBJECTS, BOX = Markup('<i class="swatch truth"></i>objects'), Markup('<i class="swatch predicted"></i>')


class LocalizationError(RunSection):
    """An error in percent. right_by_iou: percent of images that are correct at a required IoU of 0, 0.05, ..., 1."""

    error: float
    interval: Interval = None
    right_by_iou: tuple[float, ...] = ()


class ClassLocalizationError(RunSection):
    """The error of one class with the true class given; None if there are no images of it."""

    name: str = Field(alias="class")
    n: int = 0
    error: float | None = None
    interval: Interval = None


class ViewErrors(RunSection):
    """The errors on one view of the images."""

    true_class: LocalizationError
    top1: LocalizationError | None = None
    top5: LocalizationError | None = None
    classification: LocalizationError | None = None
    per_class: tuple[ClassLocalizationError, ...] = ()

    def cell(self, key: str) -> Cell:
        measured = getattr(self, key)
        return Cell(percent(measured.error), spread(measured.interval)) if measured else Cell()


class LocalizationNumbers(SplitNumbers):
    """The output of `localize.evaluate`. refined: of the second stage, if there is one."""

    scales: tuple[int, ...] = ()
    one_crop: ViewErrors = Field(alias="1-crop")
    dense: ViewErrors
    refined: ViewErrors | None = None

    @property
    def views(self) -> dict[str, ViewErrors]:
        """The views by display name."""
        return {title: view for name, title in VIEWS.items() if (view := getattr(self, name))}

    @property
    def final(self) -> tuple[str, ViewErrors]:
        """The last view, which is the most refined one."""
        return list(self.views.items())[-1]


class LocalizationPicture(RunSection):
    """`kind` is worst or right; `iou` is between the box for the true class and an object."""

    image: str
    kind: str
    name: str = ""
    label: str
    predicted: str
    iou: float


class LocalizationResult(RunResult[LocalizationNumbers]):
    """`result.json` of a localizer."""

    gallery: tuple[LocalizationPicture, ...] = ()
    gallery_split: str = ""
    gallery_view: str = ""


LocalizationRun = RunRecord[LocalizationResult]


class LocalizationPage(TaskPage[LocalizationResult]):
    plural, subject = "localizers", "A localizer on "
    result = LocalizationResult
    # With the true class given, on one crop.
    measure = Measure("localization error, %", {}, {"localization_error": "localization error"}, digits=2, falls=True)
    by_class = "Error by class"
    note = "Localization error by view with the true class given, and on the last view with the predicted class."

    def stage(self, run: LocalizationRun) -> str:
        return "second stage (R-CNN)" if run.facts.recipe.get("stage") == "regions" else ""

    def findings(self, result: LocalizationResult, split: str, numbers: LocalizationNumbers) -> str:
        name, view = numbers.final
        final = detailed(percent(view.true_class.error), view.true_class.interval, 2, f"{numbers.n:,} images", name)
        others = [f"{percent(other.true_class.error)} ({title})" for title, other in numbers.views.items() if title != name]
        summary = f" {split.capitalize()} localization error with the true class given: {', '.join([final, *others])}."
        if view.top1:
            summary += f" With the predicted class: {detailed(percent(view.top1.error), view.top1.interval)}."
        return summary

    def score(self, numbers: LocalizationNumbers) -> Score:
        name, view = min(numbers.views.items(), key=lambda item: item[1].true_class.error)
        return Score(view.true_class.error, view.true_class.interval, name)

    def seed_measures(self, numbers: LocalizationNumbers) -> dict[str, float | None]:
        return {"localization error": numbers.final[1].true_class.error}

    def class_values(self, numbers: LocalizationNumbers) -> dict[str, str]:
        return {row.name: percent(row.error) for row in numbers.final[1].per_class}

    def tiles(self, result: LocalizationResult, split: str, numbers: LocalizationNumbers) -> list[Tile]:
        errors = [(name, view.true_class) for name, view in numbers.views.items()]
        errors += [("predicted class", top1)] if (top1 := numbers.final[1].top1) else []
        return [tile(f"{split} error, {name}", percent(measured.error), measured.interval) for name, measured in errors]

    def cells(self, result: LocalizationResult, numbers: LocalizationNumbers) -> dict[str, Cell]:
        views = {name: numbers.views[name].cell("true_class") if name in numbers.views else Cell() for name in VIEWS.values()}
        return views | {"predicted class": numbers.final[1].cell("top1")}

    def compared(self, runs: Sequence[LocalizationRun]) -> list[PageSection]:
        lines = [(i, run.measured[1].final[1].true_class.right_by_iou) for i, run in enumerate(runs) if run.measured]
        caption = "The last view of each run, with the true class given. At the dashed line (0.5), a curve is at 100% minus the"
        caption += " localization error."
        legend = list(enumerate(run.label for run in runs))
        return [PageSection("Box accuracy", [Figure(overlaps(lines, (), "overlaps"), caption, legend)])]

    def details(self, result: LocalizationResult, split: str, numbers: LocalizationNumbers, index: int) -> list[PageSection]:
        return [_errors(result), _overlaps(split, numbers, index), _classes(split, numbers)]

    def pictures(self, run: RunRecord[LocalizationResult], result: LocalizationResult) -> list[PageSection]:
        galleries = []
        for kind, title in (("worst", "Worst of each class"), ("right", "Correct boxes by overlap")):
            shots = [
                Shot(
                    picture(run.folder, shown.image),
                    shown.label,
                    [f"IoU {shown.iou:.2f}", *[f"predicted as {shown.predicted}"][: shown.predicted != shown.label]],
                    shown.name,
                )
                for shown in result.gallery
                if shown.kind == kind
            ]
            galleries.append(Gallery(shots, title))
        split = SPLITS.get(result.gallery_split, result.gallery_split)
        view = VIEWS.get(result.gallery_view, result.gallery_view)
        source = f"{split.capitalize()} images ({view}) with " if split else ""
        intro = Markup("{}{}, the {}box for the true class, and its overlap (IoU). Look for inaccurate boxes, missing annotations,")
        intro = (intro + " and objects that the network has not learned.").format(source, OBJECTS, BOX)
        caption = "Training crops with " + OBJECTS + "."
        if self.stage(run):
            caption = "Training images with " + OBJECTS + " and " + BOX + "regions proposed by the first stage, with their"
            caption += " surroundings. Regions without an object are background."
        examples = Sheet(picture(run.folder, "images/examples.jpg"), caption)
        return [PageSection("Predicted boxes", galleries, intro), PageSection("Training examples", [examples])]


def _errors(result: LocalizationResult) -> PageSection:
    """All errors, one column per view of each evaluation."""
    evaluations = {"": result.last} | ({", best": result.best} if result.best and result.best.step != result.last.step else {})
    columns = {
        f"{SPLITS[split]}{when}, {name}": view
        for when, results in evaluations.items()
        for split in ("test", "val")
        if (numbers := getattr(results, split))
        for name, view in numbers.views.items()
    }
    rows = [[title, *(view.cell(key) for view in columns.values())] for key, title in ERRORS.items()]
    rows = [row for row in rows if any(isinstance(cell, Cell) and cell != Cell() for cell in row)]
    scales = next((numbers.scales for numbers in (result.last.test, result.last.val) if numbers), ())
    after = "Percent of images without a correct prediction, with 95% intervals over images. A prediction is correct if its class"
    after += " is right and its box has an IoU of at least 0.5 with an object. With the true class given, only its box is checked;"
    after += ' "class only" checks the first class and no box. One crop is the center of the image; dense is the whole image'
    after += f", its shorter side scaled to {', '.join(map(str, scales))} px." if scales else "."
    after += " The predicted classes are those of the highest-scoring boxes."
    return PageSection("Localization error", [Table(rows, ["", *columns])], after=after)


def _overlaps(split: str, numbers: LocalizationNumbers, index: int) -> PageSection:
    lines = [(i, view.true_class.right_by_iou) for i, view in enumerate(numbers.views.values())]
    caption = f"{split.capitalize()} images, true class given. Left: correct images by required IoU (dashed: 0.5, the standard)."
    caption += f" Right: images by the IoU of their box ({numbers.final[0]}); orange ones are wrong. Many just below 0.5 mean"
    caption += " inaccurate boxes; many near 0 mean missed objects."
    plot = overlaps(lines, lines[-1][1], f"overlaps{index}")
    return PageSection("Box accuracy", [Figure(plot, caption, list(enumerate(numbers.views)))])


def _classes(split: str, numbers: LocalizationNumbers) -> PageSection:
    """The errors of all views by class, hardest class first."""
    by_view = [
        {row.name: Cell(percent(row.error), spread(row.interval)) for row in view.per_class} for view in numbers.views.values()
    ]
    rows = [
        [row.name, Cell(number(row.n)), Cell(bar=row.error or 0), *(cells.get(row.name, Cell()) for cells in by_view)]
        for row in sorted(numbers.final[1].per_class, key=lambda row: -(row.error or 0))
    ]
    intro = f"{split.capitalize()} images, true class given, with 95% intervals. Sorted by the last column, which the bars show."
    table = Table(rows, ["class", "images", "", *numbers.views], "long" if len(rows) > LONG else "")
    return PageSection("Error by class", [table], intro)


def overlaps(lines: Sequence[tuple[int, Sequence[float]]], shares: Sequence[float], name: str) -> str:
    """Correct images by required overlap, and a histogram of the overlaps, as SVG; "" without lines.

    lines: (color, percentages at overlaps of 0, 0.05, ..., 1). shares: the percentages for the histogram; () for none.
    name: alphanumeric prefix for SVG ids, unique on the page.
    """
    lines = [(color, right) for color, right in lines if len(right) == 2 * HALF + 1]
    if not lines:
        return ""
    with style():
        figure = Drawing(figsize=(9.6, 3.5))
        panels = figure.subplots(1, 2 if len(shares) else 1, squeeze=False, gridspec_kw={"wspace": 0.14}).ravel()
        figure.subplots_adjust(left=0.055, right=0.98, top=0.91, bottom=0.135)
        required = np.linspace(0, 1, 2 * HALF + 1)
        for color, right in lines:
            panels[0].plot(required, right, color=hue(color), lw=1.8, marker="o", ms=2.8)
        panels[0].set_title("correct images, %")
        panels[0].set_xlabel("required overlap (IoU)")
        panels[0].set_ylim(0, 101)
        for panel in panels[1:]:
            share = -np.diff(np.asarray(shares))
            share[-1] += shares[-1]
            for bins, color in ((slice(0, HALF), hue(1)), (slice(HALF, None), hue(0))):
                panel.bar(required[:-1][bins], share[bins], width=0.045, align="edge", color=color, alpha=0.75)
            panel.set_title("images, %, by overlap")
            panel.set_xlabel("overlap (IoU) of the box with the object")
            panel.set_ylim(0, 1.08 * float(share.max()) or 1)
        for panel in panels:
            panel.axvline(HALF / 20, color=INK, lw=1, ls=(0, (3, 2)), zorder=1)
            panel.set_xlim(0, 1.006)
            values(panel)
        return as_svg(figure, name, "Correct images by required overlap, and images by overlap")
