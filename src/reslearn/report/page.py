"""Writes one self-contained HTML page from run folders: no scripts, no external resources, light, dark and print styles."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.files import write_text, writing
from reslearn.report import analyses, plots
from reslearn.report.classify import ClassificationPage
from reslearn.report.detect import DetectionPage
from reslearn.report.elements import LONG, Bullets, Cell, Figure, PageSection, Sheet, Table, Tiles, picture, render
from reslearn.report.localize import LocalizationPage
from reslearn.report.runs import latest, open_folders, read_run
from reslearn.report.task import TaskPage
from reslearn.report.text import (
    AnyRecord,
    cost,
    detailed,
    duration,
    net_name,
    notices,
    number,
    over_seeds,
    percent,
    recipe_rows,
    same_data,
    speed,
    text,
    trained,
)

TASKS: dict[str, TaskPage[Any]] = {"classify": ClassificationPage(), "detect": DetectionPage(), "localize": LocalizationPage()}


def write(runs: Sequence[Path], target: Path) -> Path:
    """Write the report of one run, or the comparison of several, and return `target`.

    runs: run folders, finished or not; tables and colors follow their order.
    target: the HTML file; its folder is created if missing, and the file is replaced atomically.

    Raises:
        UserError: a run folder is missing, given twice or broken, the tasks differ, or the page cannot be written.
    """
    target, folders = Path(target), open_folders(runs)
    by_task = {folder.facts.task: folder.label for folder in reversed(folders)}
    if len(by_task) > 1:
        examples = ", ".join(f"{by_task[name]} ({name})" for name in sorted(by_task))
        raise UserError(f"runs of different tasks cannot share a report: {examples}")
    if (name := folders[0].facts.task) not in TASKS:
        raise UserError(f"{folders[0].folder}: task '{name}' has no report; only {', '.join(TASKS)} have one")
    page = _page(TASKS[name], [read_run(folder, TASKS[name].result) for folder in folders])
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, page)
    return target


def _page(task: TaskPage[Any], runs: Sequence[AnyRecord]) -> str:
    several = len(runs) > 1
    head = _comparison(task, runs) if several else [PageSection("", [Tiles(_tiles(task, runs[0]))])]
    recipe = _recipe(runs)
    return render(
        "page.html.j2",
        title=f"{len(runs)} {task.plural} compared" if several else runs[0].label,
        summary=_compared(task, runs) if several else _summary(task, runs[0]),
        notices=notices(runs),
        several=several,
        sections=[*head, _curves(task, runs), *([*task.compared(runs), recipe] if several else [])],
        runs=[
            {
                "label": run.label,
                "color": i,
                "summary": _summary(task, run),
                "sections": [
                    *_results(task, run, i),
                    *analyses.read(run.folder / "analysis"),
                    *_facts(run, [] if several else [recipe]),
                ],
            }
            for i, run in enumerate(runs)
        ],
    )


def _summary(task: TaskPage[Any], run: AnyRecord) -> str:
    """One paragraph: the model, its data, its results and its cost."""
    findings = task.findings(run.result, *run.measured) if run.measured else ""
    subject = f"The {stage} of {task.subject.lower()}" if (stage := task.stage(run)) else task.subject
    return trained(run, subject) + findings + cost(run)


def _compared(task: TaskPage[Any], runs: Sequence[AnyRecord]) -> str:
    """One paragraph: the best run, and the mean over seeds if the runs differ in nothing else."""
    done = [(run, *run.measured) for run in runs if run.measured]
    summary = f"{len(runs)} {task.plural}, {sum(run.result is not None for run in runs)} of them finished."
    if not done or len({split for _, split, _ in done}) > 1 or not same_data([run for run, *_ in done]):
        return summary
    split, digits, sign = done[0][1], task.measure.digits, 1 if task.measure.falls else -1
    scores = [(run, task.score(numbers)) for run, _, numbers in done]
    run, best = min(scores, key=lambda item: math.inf if item[1].value is None else sign * item[1].value)
    value = detailed(percent(best.value, digits), best.interval, digits, best.detail)
    summary += f" {run.label} has the {'lowest' if task.measure.falls else 'highest'} {split} {task.measure.name}: {value}."
    return summary + over_seeds([run for run, *_ in done], split, [task.seed_measures(numbers) for *_, numbers in done], digits)


def _tiles(task: TaskPage[Any], run: AnyRecord) -> list[tuple[str, str, str]]:
    if run.result:
        tiles = task.tiles(run.result, *run.measured) if run.measured else []
        return [*tiles, ("training time", duration(run.result.seconds), speed(run.result.images_per_s))]
    measure, digits, losses = task.measure, task.measure.digits, [line["losses"] for line in run.train]
    values = [(f"training {name}", percent(latest(run.train, key), digits)) for key, name in measure.train.items()]
    values += [(f"{run.split} {name}", percent(latest(run.evals, key), digits)) for key, name in measure.evals.items()]
    values += [("training loss", number(latest(run.train, "loss"), 4))]
    values += [(f"training loss, {plots.term_name(term)}", number(latest(losses, term), 4)) for term in run.loss_terms]
    known = [(f"latest {name}", value, "") for name, value in values if value != "–"]
    return [("iterations so far", number(run.step), ""), *known]


def _comparison(task: TaskPage[Any], runs: Sequence[AnyRecord]) -> list[PageSection]:
    """The tables of all runs: results, and results by class."""
    cells = [task.cells(run.result, run.measured[1]) if run.measured else {} for run in runs]
    titles = dict.fromkeys(title for row in cells for title in row)
    titles = [title for title in titles if any(row.get(title, Cell()) != Cell() for row in cells)]
    rows = [
        [_heading(task, run, i), *(row.get(title, Cell()) for title in titles), *_cost_cells(run)]
        for i, (run, row) in enumerate(zip(runs, cells, strict=True))
    ]
    table = Table(rows, ["run", *titles, "iterations", "time"], "results")
    values = [task.class_values(run.measured[1]) if run.measured else {} for run in runs]
    names = dict.fromkeys(name for column in values for name in column)
    by_class = [[name, *(Cell(column.get(name, "–")) for column in values)] for name in names]
    head = ["class", *(Cell(run.label, color=i) for i, run in enumerate(runs))]
    splits = " and ".join(sorted({run.measured[0] for run in runs if run.measured}))
    after = f"{task.note} Measured on the {splits} images, with 95% intervals." if splits else ""
    return [
        PageSection("Results", [table], after=after),
        PageSection(task.by_class, [Table(by_class, head, "long" if len(by_class) > LONG else "")]),
    ]


def _heading(task: TaskPage[Any], run: AnyRecord, index: int) -> Cell:
    millions = f"{run.result.parameters / 1e6:.1f} M parameters" if run.result and run.result.parameters else ""
    notes = [net_name(run), task.stage(run), millions, "" if run.result else "not finished"]
    return Cell(run.label, ", ".join(note for note in notes if note), index, kind="")


def _cost_cells(run: AnyRecord) -> list[Cell]:
    if run.result is None:
        return [Cell(number(run.step)), Cell()]
    memory = number(run.result.peak_memory_mb, 0, " MB") if run.result.peak_memory_mb else ""
    return [Cell(number(run.step), speed(run.result.images_per_s)), Cell(duration(run.result.seconds), memory)]


def _curves(task: TaskPage[Any], runs: Sequence[AnyRecord]) -> PageSection:
    several, evals = len(runs) > 1, task.measure.evals
    names = [run.label for run in runs] if several else list(evals.values()) if len(evals) > 1 else []
    splits = sorted({run.split for run in runs})
    plot = plots.curves(runs, task.measure)
    caption = (
        f"Training values are from augmented mini-batches, averaged over neighboring steps; {' and '.join(splits)} values are from"
        " images not used for training. The axes are scaled to the end of training, so early values may be off the chart."
    )
    figure = Figure(plot, caption, [*enumerate(names), ("dash", "training"), ("bold", ", ".join(splits))])
    return PageSection("Learning curves", [figure if plot else Bullets(["No measurements yet."])])


def _recipe(runs: Sequence[AnyRecord]) -> PageSection:
    several, rows = len(runs) > 1, recipe_rows([run.facts.recipe for run in runs])
    differs = frozenset(key for key, values in rows.items() if len(set(values)) > 1)
    table = [[key, *(Cell("–" if value is None else value, kind="") for value in values)] for key, values in rows.items()]
    head = ["", *(Cell(run.label, kind="") for run in runs)] if several else []
    intro = "Highlighted rows differ between the runs." if several else ""
    return PageSection("Recipe", [Table(table, head, "recipe", differs)], intro)


def _results(task: TaskPage[Any], run: AnyRecord, index: int) -> list[PageSection]:
    """The run's results in numbers and pictures."""
    augmented = Sheet(picture(run.folder, "images/augmented.png"), "Training images as the network sees them.")
    return [
        PageSection("Loss terms", [Figure(plots.losses(run, index, f"losses{index}"))]),
        *(task.details(run.result, *run.measured, index) if run.measured else []),
        *(task.pictures(run, run.result) if run.result else []),
        PageSection("Augmented training images", [augmented]),
    ]


def _facts(run: AnyRecord, recipe: list[PageSection]) -> list[PageSection]:
    """How to reproduce the run: automatic choices, data, recipe, machine and command."""
    facts, data, result = run.facts, run.facts.data, run.result
    rows: dict[str, Any] = {"name": data.name, "images": data.n}
    rows |= {"classes": f"{len(data.classes)}: {text(data.classes)}"} if data.classes else {}
    rows |= {"size, pixels": " × ".join(map(str, data.sizes)), "channels": data.channels, "fingerprint": data.fingerprint}
    rows |= {"problems found": data.faults, "excluded": data.left_out}
    machine = facts.machine | facts.versions
    if result:
        machine |= {"training time": duration(result.seconds), "speed": speed(result.images_per_s) or "–"}
        machine |= {"peak memory": f"{number(result.peak_memory_mb)} MB", "parameters": number(result.parameters)}
    return [
        PageSection("Chosen automatically", [Bullets(facts.chose)]),
        PageSection("Data", [_pairs({key: value for key, value in rows.items() if value})]),
        *recipe,
        PageSection("Machine, versions and cost", [_pairs(machine)]),
        PageSection("Command", [Table([[Cell(facts.command, kind="mono")]])] if facts.command else []),
    ]


def _pairs(rows: dict[str, Any]) -> Table:
    return Table([[key, Cell(text(value), kind="")] for key, value in rows.items()])
