"""The page of localizers' runs, of `reslearn localize train` and `refine`."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from reslearn.report import analyses, plots
from reslearn.report import localizer_plots as localization_plots
from reslearn.report.localizer_runs import VIEWS, LocalizationRun, Numbers, Wrong, read_run
from reslearn.report.runs import Folder
from reslearn.report.shared import SPLITS, cost, net_name, notices, percent, picture, recipe_rows, render, same_data, trained

ASKED = {
    "true_class": ("true class given", "the class is known, its box is judged"),
    "top1": ("predicted class", "class and box must be right"),
    "top5": ("5 predicted classes", "one of five guesses must be right"),
    "classification": ("class alone", "the first guess, wherever its box is"),
}


def page(folders: Sequence[Folder]) -> str:
    """The page of one localizer's run, or of several laid over each other. Raises UserError for a broken file."""
    runs = [read_run(folder) for folder in folders]
    several = len(runs) > 1
    measured = [_measured(run) for run in runs]
    return render(
        "localizer.html.j2",
        title=f"{len(runs)} localizers compared" if several else runs[0].label,
        summary=_compared(runs) if several else _summary(runs[0]),
        notices=notices(runs),
        runs=[_view(run, i) for i, run in enumerate(runs)],
        several=several,
        views=[name for name in VIEWS if any(name in found[1].views for found in measured if found)],
        view_words=VIEWS,
        asked=ASKED,
        curves=Markup(localization_plots.curves(runs)),
        compared_overlaps=Markup(_compared_overlaps(measured)) if several else "",
        by_class=_by_class(measured) if several else [],
        splits=sorted({found[0] for found in measured if found}),
        recipe=recipe_rows([run.setup.recipe for run in runs]),
        spread=_spread,
    )


def _measured(run: LocalizationRun) -> tuple[str, Numbers] | None:
    """The split to judge by, in words, and its numbers: the test set where there is one."""
    for split in ("test", "val"):
        if run.result and (numbers := getattr(run.result, split)) and numbers.views:
            return SPLITS[split], numbers
    return None


def _judged(numbers: Numbers) -> str:
    """The view that a localizer is judged by: of all it can do, the last."""
    return list(numbers.views)[-1]


def _spread(wrong: Wrong) -> str:
    return "" if wrong.interval is None else "{:.2f} to {:.2f}".format(*wrong.interval)


def _interval(wrong: Wrong) -> str:
    return f" (95% interval {_spread(wrong)})" if _spread(wrong) else ""


def _summary(run: LocalizationRun) -> str:
    """One paragraph: what was trained, on what, how often it is wrong, at what cost."""
    data = run.setup.data
    classes = f" of {len(data.classes):,} classes" if data.classes else ""
    refined = run.setup.recipe.get("stage") == "refine"
    what = "The second stage, R-CNN, of a localizer" if refined else "A localizer"
    says = trained(run, f"{what} on ", classes)
    if found := _measured(run):
        split, numbers = found
        judged = _judged(numbers)
        last, others = numbers.views[judged], [name for name in numbers.views if name != judged]
        each = "".join(f", {percent(numbers.views[name].true_class.error)} {VIEWS[name]}" for name in others)
        says += (
            f" With the true class given, its box is wrong on {percent(last.true_class.error)} of the {numbers.n:,} {split} images"
        )
        says += f"{_interval(last.true_class)}, {VIEWS[judged]}{each.replace(',', ';', 1)}."
        if last.top1:
            says += f" With the class to be guessed as well it errs on {percent(last.top1.error)}{_interval(last.top1)}."
    return says + cost(run)


def _compared(runs: Sequence[LocalizationRun]) -> str:
    """One paragraph: which of the runs did best."""
    done = [(run, *found) for run in runs if run.result and (found := _measured(run))]
    says = f"{len(runs)} localizers, {sum(run.result is not None for run in runs)} of them finished."
    if not done or len({split for _, split, _ in done}) > 1 or not same_data([run for run, *_ in done]):
        return says
    every = [(view.true_class, run, split, name) for run, split, numbers in done for name, view in numbers.views.items()]
    wrong, run, split, name = min(every, key=lambda one: one[0].error)
    says += f" With the true class given, the lowest {split} error, {percent(wrong.error)}{_interval(wrong)},"
    return f"{says} is that of {run.label} ({VIEWS[name]})."


def _compared_overlaps(measured: Sequence[tuple[str, Numbers] | None]) -> str:
    lines = [(i, one[1].views[_judged(one[1])].true_class.right_by_iou) for i, one in enumerate(measured) if one]
    return localization_plots.overlaps(lines, (), "overlaps")


def _by_class(measured: Sequence[tuple[str, Numbers] | None]) -> list[tuple[str, list[str]]]:
    """(class, error of each run), its true class given."""
    by_run = [{one.name: one.error for one in found[1].views[_judged(found[1])].per_class} if found else {} for found in measured]
    names = dict.fromkeys(name for of in by_run for name in of)
    return [(name, [percent(of.get(name)) for of in by_run]) for name in names]


def _view(run: LocalizationRun, index: int) -> dict[str, Any]:
    """What the template shows of one run; every string in it is still to be escaped."""
    result, found = run.result, _measured(run)
    numbers = found[1] if found else None
    last = numbers.views[_judged(numbers)] if numbers else None
    gallery = [(one, picture(run.folder, one.image)) for one in result.gallery] if result else []
    return {
        "label": run.label,
        "color": index % plots.COLORS,
        "net": net_name(run),
        "summary": _summary(run),
        "setup": run.setup,
        "result": result,
        "step": run.step,
        "latest": {part: float(run.train[part][-1]) for part in run.parts if len(run.train[part])},
        "split": found[0] if found else "",
        "numbers": numbers,
        "judged": _judged(numbers) if numbers else "",
        "last": last,
        "table": _table(result) if result else None,
        "classes": _classes(numbers) if numbers else [],
        "overlaps": Markup(_overlaps(numbers, f"overlaps{index}")) if numbers else "",
        "worst": [(one, shot) for one, shot in gallery if one.kind == "worst"],
        "right": [(one, shot) for one, shot in gallery if one.kind == "right"],
        "gallery_split": SPLITS.get(result.gallery_split, result.gallery_split) if result else "",
        "gallery_view": VIEWS.get(result.gallery_view, result.gallery_view) if result else "",
        "examples": picture(run.folder, "images/examples.jpg"),
        "analyses": analyses.read(run.folder / "analysis"),
        "augmented": None,
    }


def _overlaps(numbers: Numbers, name: str) -> str:
    """Each view in a color, the last one's images by overlap beside."""
    lines = [(i, view.true_class.right_by_iou) for i, view in enumerate(numbers.views.values())]
    return localization_plots.overlaps(lines, lines[-1][1], name)


def _table(result: Any) -> dict[str, Any]:
    """All errors: a column for each view of each split."""
    splits = [(SPLITS[split], getattr(result, split)) for split in ("test", "val") if getattr(result, split)]
    columns = [(f"{split}, {VIEWS[name]}", view) for split, numbers in splits for name, view in numbers.views.items()]
    rows = [(*words, [getattr(view, key) for _, view in columns]) for key, words in ASKED.items()]
    return {"titles": [title for title, _ in columns], "rows": [row for row in rows if any(row[2])]}


def _classes(numbers: Numbers) -> list[dict[str, Any]]:
    """A row for each class, the hardest first by the last view: its errors in all views."""
    by_view = [{one.name: one for one in view.per_class} for view in numbers.views.values()]
    rows = [
        {"name": one.name, "n": one.n, "width": one.error or 0, "each": [view.get(one.name) for view in by_view]}
        for one in by_view[-1].values()
    ]
    return sorted(rows, key=lambda row: -row["width"])
