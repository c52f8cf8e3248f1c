"""The page of detectors' runs."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from reslearn.report import analyses, plots
from reslearn.report import detector_plots as detection_plots
from reslearn.report.detector_runs import KINDS, BySize, DetectionRun, Numbers, Precision, Review, Snapshot, read_run
from reslearn.report.runs import Folder
from reslearn.report.shared import SPLITS, cost, net_name, notices, over_seeds, picture, recipe_rows, render, same_data, trained

MEANING = {
    "class": "in place, but of another class",
    "location": "of the right class, IoU between 0.1 and 0.5 with its object",
    "both": "of another class, and out of place",
    "duplicate": "an object again that a surer detection has",
    "background": "nothing there",
    "missed": "an object that no detection is about",
}
NUMBERS = (
    ("AP", "AP", "mean over IoU 0.50 to 0.95"),
    ("AP50", "AP50", "at IoU 0.50"),
    ("AP75", "AP75", "at IoU 0.75"),
    ("AP_small", "AP small", "objects below 32² px"),
    ("AP_medium", "AP medium", "32² to 96² px"),
    ("AP_large", "AP large", "above 96² px"),
    ("AR1", "AR 1", "recall of the best detection of an image and class"),
    ("AR10", "AR 10", "of the best 10"),
    ("AR100", "AR 100", "of the best 100"),
    ("AR_small", "AR small", "of 100, small objects"),
    ("AR_medium", "AR medium", "medium"),
    ("AR_large", "AR large", "large"),
    ("VOC07", "VOC 2007", "AP at IoU 0.50, at 11 recalls"),
    ("VOC10", "VOC 2010", "AP at IoU 0.50, the area"),
)


def page(folders: Sequence[Folder]) -> str:
    """The page of one detector's run, or of several laid over each other. Raises UserError for a broken file."""
    runs = [read_run(folder) for folder in folders]
    several = len(runs) > 1
    measured = [_measured(run.result.last) if run.result else None for run in runs]
    return render(
        "detector.html.j2",
        title=f"{len(runs)} detectors compared" if several else runs[0].label,
        summary=_compared(runs) if several else _summary(runs[0]),
        notices=notices(runs),
        runs=[_view(run, i, several) for i, run in enumerate(runs)],
        several=several,
        curves=Markup(detection_plots.curves(runs)),
        compared_curves=Markup(_compared_curves(measured)) if several else "",
        by_class=_by_class(measured) if several else [],
        split=next((one[0] for one in measured if one), ""),
        splits=sorted({SPLITS.get(run.held_out_split, run.held_out_split) for run in runs}),
        recipe=recipe_rows([run.setup.recipe for run in runs]),
        meaning=MEANING,
    )


def _measured(snapshot: Snapshot | None) -> tuple[str, Numbers] | None:
    """The split to judge by, in words, and its numbers: the test set where there is one."""
    if snapshot and snapshot.test:
        return "test", snapshot.test
    if snapshot and snapshot.val:
        return "held-out", snapshot.val
    return None


def _spread(numbers: Numbers, key: str = "AP") -> str:
    interval = numbers.intervals.get(key)
    return "" if interval is None else "{:.1f} to {:.1f}".format(*interval)


def points(value: float | None) -> str:
    """A percentage as detection's tables have it: 43.8."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _interval(numbers: Numbers) -> str:
    return f" (95% interval {_spread(numbers)})" if _spread(numbers) else ""


def _summary(run: DetectionRun) -> str:
    """One paragraph: what was trained, on what, how well it finds objects, at what cost."""
    data, result = run.setup.data, run.result
    classes = f" with {len(data.classes):,} class{'es' * (len(data.classes) != 1)} of objects" if data.classes else ""
    says = trained(run, "A detector on ", classes)
    if result and (last := _measured(result.last)):
        split, numbers = last
        says += f" After the last iteration its AP is {points(numbers.AP)}%{_interval(numbers)} on {numbers.n:,} {split} images,"
        says += f" {points(numbers.AP50)}% at IoU 0.5."
        if numbers.masks:
            says += f" By its masks instead of its boxes, AP is {points(numbers.masks.AP)}%{_interval(numbers.masks)},"
            says += f" {points(numbers.masks.AP50)}% at IoU 0.5."
    if result and result.best and (best := _measured(result.best)):
        says += f" At iteration {result.best.step:,}, where the held-out AP was highest, it is {points(best[1].AP)}%."
    return says + cost(run)


def _compared(runs: Sequence[DetectionRun]) -> str:
    """One paragraph: which of the runs did best."""
    done = [(run, *found) for run in runs if run.result and (found := _measured(run.result.last))]
    says = f"{len(runs)} detectors, {sum(run.result is not None for run in runs)} of them finished."
    if not done or len({split for _, split, _ in done}) > 1 or not same_data([run for run, *_ in done]):
        return says
    run, split, numbers = max(done, key=lambda one: -math.inf if one[2].AP is None else one[2].AP)
    says += f" After the last iteration the highest {split} AP, {points(numbers.AP)}%{_interval(numbers)}, is that of"
    measured = {key: [getattr(one, key) for _, _, one in done] for key in ("AP", "AP50", "AP75")}
    measured["mask AP"] = [one.masks.AP if one.masks else None for _, _, one in done]
    return f"{says} {run.label}.{over_seeds([one for one, *_ in done], split, measured, 1)}"


def _compared_curves(measured: Sequence[tuple[str, Numbers] | None]) -> str:
    reviews = [(i, one[1].review) for i, one in enumerate(measured) if one]
    lines = [(i, detection_plots.mean_curves(review.curves)) for i, review in reviews if review]
    return detection_plots.precision_recall(lines, "recall")


def _by_class(measured: Sequence[tuple[str, Numbers] | None]) -> list[tuple[str, list[str]]]:
    """(class, AP of each run)."""
    by_run = [{one.name: one.AP for one in found[1].per_class} if found else {} for found in measured]
    names = dict.fromkeys(name for of in by_run for name in of)
    return [(name, [points(of.get(name)) for of in by_run]) for name in names]


def _view(run: DetectionRun, index: int, several: bool) -> dict[str, Any]:
    """What the template shows of one run; every string in it is still to be escaped."""
    result = run.result
    measured = _measured(result.last) if result else None
    numbers = measured[1] if measured else None
    review = numbers.review if numbers else None
    gallery = [(one, picture(run.folder, one.image)) for one in result.gallery] if result else []
    best = _measured(result.best) if result and result.best else None
    classes = _classes(numbers)
    colored = len(classes) <= detection_plots.MOST
    return {
        "label": run.label,
        "color": index % plots.COLORS,
        "net": net_name(run),
        "summary": _summary(run),
        "setup": run.setup,
        "result": result,
        "step": run.step,
        "best": best[1] if best else None,
        "held_out": result.last.val if result and measured and measured[0] == "test" else None,
        "latest": [(key, _latest(run, key)) for key in ("AP", "AP50", "AP75")],
        "split": measured[0] if measured else "",
        "numbers": numbers,
        "spread": _spread,
        "table": _table(result) if result else None,
        "classes": classes,
        "colored": colored,
        "recall": Markup(detection_plots.precision_recall(_lines(review, colored), f"recall{index}")) if review else "",
        "losses": Markup(detection_plots.losses(run, index if several else 0, f"losses{index}")),
        "mistakes": _mistakes(review.mistakes) if review else [],
        "alarms": [(one, shot) for one, shot in gallery if one.kind not in ("missed", "image")],
        "missed": [(one, shot) for one, shot in gallery if one.kind == "missed"],
        "whole": [(one, shot) for one, shot in gallery if one.kind == "image"],
        "examples": [(one, picture(run.folder, one.image)) for one in result.examples] if result else [],
        "gallery_split": SPLITS.get(result.gallery_split, result.gallery_split) if result else "",
        "analyses": analyses.read(run.folder / "analysis"),
        "augmented": picture(run.folder, "images/augmented.png"),
    }


def _lines(review: Review, colored: bool) -> list[tuple[int | None, list[Precision]]]:
    """The curves of each class in its color; where there are too many, in gray, and their mean in the first."""
    names = [one.name for one in review.by_size] or list(dict.fromkeys(curve.name for curve in review.curves))
    each = [[curve for curve in review.curves if curve.name == name] for name in names]
    if colored:
        return list(enumerate(each))
    return [*((None, some) for some in each), (0, detection_plots.mean_curves(review.curves))]


def _latest(run: DetectionRun, key: str) -> float | None:
    values = run.held_out[key]
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else None


def _table(result: Any) -> dict[str, Any]:
    """All numbers of all snapshots: a column for each that was measured."""
    columns = []
    for when, snapshot in (("last", result.last), ("best", result.best)):
        for split in ("test", "val"):
            if snapshot and (numbers := getattr(snapshot, split)) and (when == "last" or snapshot.step != result.last.step):
                columns.append((f"{SPLITS[split]}, {when}", numbers))
                columns += [(f"{SPLITS[split]}, {when}, masks", numbers.masks)] if numbers.masks else []
    return {
        "titles": [title for title, _ in columns],
        "rows": [
            (name, what, [(points(getattr(numbers, key)), _spread(numbers, key)) for _, numbers in columns])
            for key, name, what in NUMBERS
        ],
    }


def _classes(numbers: Numbers | None) -> list[dict[str, Any]]:
    """A row for each class, in the set's order."""
    if numbers is None:
        return []
    sizes = {one.name: one for one in numbers.review.by_size} if numbers.review else {}
    cuts = {one.name: one for one in numbers.review.thresholds} if numbers.review else {}
    return [
        {
            "name": one.name,
            "color": k % plots.COLORS,
            "objects": one.objects,
            "width": one.AP or 0,
            "AP": [points(value) for value in (one.AP, one.AP50, one.AP75)],
            "sizes": _sizes(sizes[one.name]) if one.name in sizes else [],
            "cut": cuts.get(one.name),
        }
        for k, one in enumerate(numbers.per_class)
    ]


def _sizes(row: BySize) -> list[tuple[str, int]]:
    """(AP, number of objects) by size."""
    return [(points(getattr(row, size)), row.objects.get(size, 0)) for size in ("small", "medium", "large")]


def _mistakes(counts: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """A row for each kind: how many, of the detections that are kept and of all, and the lengths of their bars in percent."""
    if not {"all", "kept"} <= set(counts):
        return []
    rows = [{"kind": kind, **{which: counts[which].get(kind, 0) for which in ("kept", "all")}} for kind in KINDS]
    top = max((row["kept"] for row in rows), default=0) or 1
    return [{**row, "width": 100 * row["kept"] / top} for row in rows]
