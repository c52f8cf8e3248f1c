"""Run folders to one HTML page that stands alone: no script, nothing loaded, readable light, dark and printed."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reslearn.errors import UserError
from reslearn.report import analyses, plots
from reslearn.report import detector as detection
from reslearn.report import localizer as localization
from reslearn.report.runs import KINDS, Folder, Metrics, Run, Snapshot, most_confused, open_folders, read_run
from reslearn.report.shared import SPLITS, cost, net_name, notices, over_seeds, percent, picture, recipe_rows, render, trained

GRID_CLASSES = 60  # more rows of a confusion matrix than this cannot be told apart on a screen


def write(runs: Sequence[Path], target: Path) -> Path:
    """Writes the report of one run, or the comparison of several, and returns `target`.

    runs: run folders, finished or not; their order is that of the tables and colors.
    target: the HTML file; its folder is made, and a reader sees the old page or the new one, never a half.

    Raises:
        UserError: a run folder is missing, given twice or broken, runs are of different kinds, or the page cannot be written.
    """
    target = Path(target)
    folders = open_folders(runs)
    by_kind = {one.setup.kind: one.label for one in reversed(folders)}
    if len(by_kind) > 1:
        some = ", and ".join(f"{by_kind[kind]} {KINDS[kind]}" for kind in KINDS if kind in by_kind)
        raise UserError(f"{some}: they share no page, make one of each kind")
    pages = {"classify": _page, "detect": detection.page, "localize": localization.page}
    page = pages[folders[0].setup.kind](folders)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target}: the report cannot be written: {error.strerror}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return target


def _page(folders: Sequence[Folder]) -> str:
    runs = [read_run(folder) for folder in folders]
    several = len(runs) > 1
    return render(
        "classifier.html.j2",
        title=f"{len(runs)} runs compared" if several else runs[0].label,
        summary=_compared(runs) if several else _summary(runs[0]),
        several=several,
        notices=notices(runs),
        runs=[_view(run, i) for i, run in enumerate(runs)],
        curves=Markup(plots.curves(runs)),
        splits=sorted({SPLITS.get(run.held_out_split, run.held_out_split) for run in runs}),
        recipe=recipe_rows([run.setup.recipe for run in runs]),
        colors=plots.COLORS,
    )


def _measured(snapshot: Snapshot | None) -> tuple[str, Metrics] | None:
    """The split to judge by, in words, and its numbers: the test set where there is one."""
    if snapshot and snapshot.test:
        return "test", snapshot.test
    if snapshot and snapshot.val:
        return "held-out", snapshot.val
    return None


def _spread(metrics: Metrics) -> str:
    return "" if metrics.top1_interval is None else "{:.2f} to {:.2f}%".format(*metrics.top1_interval)


def _summary(run: Run) -> str:
    """One paragraph: what was trained, on what, how well it does, at what cost."""
    data, result = run.setup.data, run.result
    classes = f" of {len(data.classes):,} classes" if data.classes else ""
    says = trained(run, "", classes)
    if result is None:
        return says
    if last := _measured(result.last):
        split, metrics = last
        interval = f" (95% interval {_spread(metrics)})" if _spread(metrics) else ""
        says += f" After the last iteration it errs on {percent(metrics.top1_error)} of the {metrics.n:,}"
        says += f" {split} images{interval}."
    if result.best and (best := _measured(result.best)):
        says += f" At iteration {result.best.step:,}, where the held-out error was lowest, it errs on"
        says += f" {percent(best[1].top1_error)} of the {best[0]} images."
    return says + cost(run)


def _compared(runs: list[Run]) -> str:
    """One paragraph: which of the runs did best, and how far seeds alone move it where only they differ."""
    done = [(run, *found) for run in runs if run.result and (found := _measured(run.result.last))]
    says = f"{len(runs)} runs, {sum(run.result is not None for run in runs)} of them finished."
    if not done or len({split for _, split, _ in done}) > 1:
        return says
    run, split, metrics = min(done, key=lambda one: one[2].top1_error)
    interval = f" (95% interval {_spread(metrics)})" if _spread(metrics) else ""
    says += f" After the last iteration the lowest {split} error, {percent(metrics.top1_error)}{interval},"
    says += f" is that of {run.label}."
    return says + over_seeds([run for run, _, _ in done], split, {"error": [metrics.top1_error for _, _, metrics in done]}, 2)


def _view(run: Run, index: int) -> dict[str, Any]:
    """What the template shows of one run; every string in it is still to be escaped."""
    result = run.result
    measured = _measured(result.last) if result else None
    metrics = measured[1] if measured else None
    worst = [(image, picture(run.folder, image.image)) for image in result.worst] if result else []
    return {
        "label": run.label,
        "color": index % plots.COLORS,
        "net": net_name(run),
        "summary": _summary(run),
        "setup": run.setup,
        "result": result,
        "step": run.step,
        "epoch": run.epoch,
        "latest": [
            ("training error", _latest(run.train.error)),
            (f"{SPLITS.get(run.held_out_split, run.held_out_split)} error", _latest(run.held_out.error)),
        ],
        "split": measured[0] if measured else "",
        "worst_split": SPLITS.get(result.worst_split, result.worst_split) if result else "",
        "spread": _spread,
        "metrics": metrics,
        "classes": sorted(metrics.per_class, key=lambda one: math.inf if one.accuracy is None else one.accuracy) if metrics else [],
        "grid": _grid(metrics) if metrics and len(metrics.confusion) <= GRID_CLASSES else [],
        "confused": most_confused(metrics.confusion, [one.name for one in metrics.per_class])
        if metrics and metrics.confusion
        else [],
        "reliability": Markup(plots.reliability(metrics.calibration_bins, f"reliability{index}")) if metrics else "",
        "too_sure": _too_sure(metrics) if metrics else 0.0,
        "worst": worst,
        "analyses": analyses.read(run.folder / "analysis"),
        "augmented": picture(run.folder, "images/augmented.png"),
    }


def _latest(values: Any) -> float | None:
    return float(values[-1]) if len(values) else None


def _grid(metrics: Metrics) -> list[list[dict[str, Any]]]:
    """Cells of the confusion matrix; `shade` in [0, 1] is the cube root of the row's share: rare mistakes show."""
    return [
        [{"n": n, "shade": round((n / total) ** (1 / 3), 2), "right": i == j} for j, n in enumerate(row)]
        for i, row in enumerate(metrics.confusion)
        for total in [max(1, sum(row))]
    ]


def _too_sure(metrics: Metrics) -> float:
    """Mean confidence less accuracy, in percent points: above 0 the network promises more than it keeps."""
    filled = [bin for bin in metrics.calibration_bins if bin.confidence is not None and bin.accuracy is not None]
    return sum(bin.n * ((bin.confidence or 0) - (bin.accuracy or 0)) for bin in filled) / max(1, metrics.n)
