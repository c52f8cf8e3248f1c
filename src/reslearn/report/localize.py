"""Localization runs in the report: errors by view and class, overlaps, pictures of wrong and right boxes."""

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
    "top5": "5 predicted classes",
    "classification": "class alone",
}
HALF = 10  # the place of 0.5, from which a box is right, among the 21 overlaps
OBJECTS, BOX = Markup('<i class="swatch truth"></i>objects'), Markup('<i class="swatch found"></i>')


class LocalizationError(RunSection):
    """An error in percent. right_by_iou: percent of images that are right if an overlap of 0, 0.05, ... 1 is required."""

    error: float
    interval: Interval = None
    right_by_iou: tuple[float, ...] = ()


class ClassLocalizationError(RunSection):
    """The error of one class, the true class given; None if there is no image of it."""

    name: str = Field(alias="class")
    n: int = 0
    error: float | None = None
    interval: Interval = None


class ViewErrors(RunSection):
    """The errors in one view of the images."""

    true_class: LocalizationError
    top1: LocalizationError | None = None
    top5: LocalizationError | None = None
    classification: LocalizationError | None = None
    per_class: tuple[ClassLocalizationError, ...] = ()

    def cell(self, key: str) -> Cell:
        wrong = getattr(self, key)
        return Cell(percent(wrong.error), spread(wrong.interval)) if wrong else Cell()


class LocalizationNumbers(SplitNumbers):
    """`localize.evaluate` as read back. refined: the second stage's, if there is one."""

    scales: tuple[int, ...] = ()
    one_crop: ViewErrors = Field(alias="1-crop")
    dense: ViewErrors
    refined: ViewErrors | None = None

    @property
    def views(self) -> dict[str, ViewErrors]:
        """By name in words."""
        return {words: view for name, words in VIEWS.items() if (view := getattr(self, name))}

    @property
    def final(self) -> tuple[str, ViewErrors]:
        """The view that counts: the last."""
        return list(self.views.items())[-1]


class LocalizationPicture(RunSection):
    """`kind` is worst or right; `iou` is the overlap of the box for the true class with an object."""

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
    measure = Measure(
        "localization error, %", {}, {"localization_error": "localization error"}, digits=2, falls=True
    )  # the true class given, on one crop
    by_class = "Error by class"
    note = "Localization error, the true class given, by view; with the predicted class, in the last view."

    def stage(self, run: LocalizationRun) -> str:
        return "second stage, R-CNN" if run.facts.recipe.get("stage") == "regions" else ""

    def findings(self, result: LocalizationResult, split: str, numbers: LocalizationNumbers) -> str:
        name, view = numbers.final
        given = detailed(percent(view.true_class.error), view.true_class.interval, 2, f"{numbers.n:,} images", name)
        others = [f"{percent(other.true_class.error)} ({words})" for words, other in numbers.views.items() if words != name]
        says = f" {split.capitalize()} localization error with the true class given: {', '.join([given, *others])}."
        if view.top1:
            says += f" With the predicted class: {detailed(percent(view.top1.error), view.top1.interval)}."
        return says

    def score(self, numbers: LocalizationNumbers) -> Score:
        name, view = min(numbers.views.items(), key=lambda one: one[1].true_class.error)
        return Score(view.true_class.error, view.true_class.interval, name)

    def seed_measures(self, numbers: LocalizationNumbers) -> dict[str, float | None]:
        return {"localization error": numbers.final[1].true_class.error}

    def class_values(self, numbers: LocalizationNumbers) -> dict[str, str]:
        return {one.name: percent(one.error) for one in numbers.final[1].per_class}

    def tiles(self, result: LocalizationResult, split: str, numbers: LocalizationNumbers) -> list[Tile]:
        shown = [(name, view.true_class) for name, view in numbers.views.items()]
        shown += [("predicted class", wrong)] if (wrong := numbers.final[1].top1) else []
        return [tile(f"{split} error, {name}", percent(wrong.error), wrong.interval) for name, wrong in shown]

    def cells(self, result: LocalizationResult, numbers: LocalizationNumbers) -> dict[str, Cell]:
        views = {name: numbers.views[name].cell("true_class") if name in numbers.views else Cell() for name in VIEWS.values()}
        return views | {"predicted class": numbers.final[1].cell("top1")}

    def compared(self, runs: Sequence[LocalizationRun]) -> list[PageSection]:
        lines = [(i, run.measured[1].final[1].true_class.right_by_iou) for i, run in enumerate(runs) if run.measured]
        caption = "The true class given, in the last view of each run. At 0.5, the dashed line, a curve is 100% minus the"
        caption += " localization error."
        legend = list(enumerate(run.label for run in runs))
        return [PageSection("Accuracy of the boxes", [Figure(overlaps(lines, (), "overlaps"), caption, legend)])]

    def details(self, result: LocalizationResult, split: str, numbers: LocalizationNumbers, index: int) -> list[PageSection]:
        return [_errors(result), _overlaps(split, numbers, index), _classes(split, numbers)]

    def pictures(self, run: RunRecord[LocalizationResult], result: LocalizationResult) -> list[PageSection]:
        galleries = []
        for kind, title in (("worst", "The worst of each class"), ("right", "Correct boxes, by overlap")):
            shown = [one for one in result.gallery if one.kind == kind]
            lines = [[f"IoU {one.iou:.2f}", *[f"predicted as {one.predicted}"][: one.predicted != one.label]] for one in shown]
            shots = [Shot(picture(run.folder, one.image), one.label, of, one.name) for one, of in zip(shown, lines, strict=True)]
            galleries.append(Gallery(shots, title))
        split = SPLITS.get(result.gallery_split, result.gallery_split)
        of = f"From the {split} images ({result.gallery_view}): " if split else ""
        intro = Markup("{}{}, {}the box for the true class, with their overlap (IoU). Look for inaccurate boxes, objects that are")
        intro = (intro + " not annotated, and what the network has not learned.").format(of, OBJECTS, BOX)
        regions = BOX + "regions proposed by the first stage, with their surroundings; those without an object are background"
        caption = OBJECTS + (", " + regions if self.stage(run) else " in training crops") + "."
        examples = Sheet(picture(run.folder, "images/examples.jpg"), caption)
        return [PageSection("Where it looks", galleries, intro), PageSection("Training examples", [examples])]


def _errors(result: LocalizationResult) -> PageSection:
    """All errors: a column for each view of each evaluation."""
    evaluated = {"": result.last} | ({", best": result.best} if result.best and result.best.step != result.last.step else {})
    columns = {
        f"{SPLITS[split]}{when}, {name}": view
        for when, one in evaluated.items()
        for split in ("test", "val")
        if (numbers := getattr(one, split))
        for name, view in numbers.views.items()
    }
    rows = [[words, *(view.cell(key) for view in columns.values())] for key, words in ERRORS.items()]
    rows = [row for row in rows if any(isinstance(cell, Cell) and cell != Cell() for cell in row)]
    scales = next((numbers.scales for numbers in (result.last.test, result.last.val) if numbers), ())
    after = "Percent of images without a correct prediction: the right class, and an IoU of at least 0.5 with an object. With the"
    after += " true class given, only its box counts; with the class alone, only the first class. Below, 95% intervals over images."
    after += " One crop is the center of the image, dense the whole image"
    after += f", its shorter side scaled to {', '.join(map(str, scales))} px." if scales else "."
    after += " Predicted classes are those of the highest-scored boxes."
    return PageSection("Localization error", [Table(rows, ["", *columns])], after=after)


def _overlaps(split: str, numbers: LocalizationNumbers, index: int) -> PageSection:
    lines = [(i, one.true_class.right_by_iou) for i, one in enumerate(numbers.views.values())]
    caption = (
        f"On the {split} images, the true class given. Left: a box is right from an overlap of 0.5 on, the dashed line. Right:"
    )
    caption += f" the overlaps of the boxes ({numbers.final[0]}); those in orange are wrong. Many just below 0.5 call for more"
    caption += " accurate boxes, many near 0 for finding the object at all."
    plot = overlaps(lines, lines[-1][1], f"overlaps{index}")
    return PageSection("Accuracy of the boxes", [Figure(plot, caption, list(enumerate(numbers.views)))])


def _classes(split: str, numbers: LocalizationNumbers) -> PageSection:
    """The hardest first, in all views."""
    last, view = numbers.final
    by_view = [{one.name: Cell(percent(one.error), spread(one.interval)) for one in of.per_class} for of in numbers.views.values()]
    rows = [
        [one.name, Cell(number(one.n)), Cell(bar=one.error or 0), *(of.get(one.name, Cell()) for of in by_view)]
        for one in sorted(view.per_class, key=lambda one: -(one.error or 0))
    ]
    intro = (
        f"On the {split} images, the true class given; the hardest class first ({last}, which the bars show). Below, 95% intervals."
    )
    table = Table(rows, ["class", "images", "", *numbers.views], "long" if len(rows) > LONG else "")
    return PageSection("Error by class", [table], intro)


def overlaps(lines: Sequence[tuple[int, Sequence[float]]], shares: Sequence[float], name: str) -> str:
    """The percentage of right images over the required overlap, and a histogram of the overlaps; "" without lines.

    lines: the page's color and the percentages at overlaps of 0, 0.05, ... 1. shares: those of the histogram; () for none.
    name: letters and digits that no other plot of the page has.
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
        panels[0].set_title("right images, %")
        panels[0].set_xlabel("required overlap (IoU)")
        panels[0].set_ylim(0, 101)
        for panel in panels[1:]:
            share = -np.diff(np.asarray(shares))
            share[-1] += shares[-1]
            for some, color in ((slice(0, HALF), hue(1)), (slice(HALF, None), hue(0))):
                panel.bar(required[:-1][some], share[some], width=0.045, align="edge", color=color, alpha=0.75)
            panel.set_title("images, %, by overlap")
            panel.set_xlabel("overlap (IoU) of the box with the object")
            panel.set_ylim(0, 1.08 * float(share.max()) or 1)
        for panel in panels:
            panel.axvline(HALF / 20, color=INK, lw=1, ls=(0, (3, 2)), zorder=1)
            panel.set_xlim(0, 1.006)
            values(panel)
        return as_svg(figure, name, "Right images over the required overlap, and images by overlap")
