"""The output of `reslearn reproduce`: the list of experiments, and results as tables."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reslearn import data as datasets
from reslearn.data.sets import DataSet
from reslearn.errors import UserError
from reslearn.reproduce.catalog import EXPERIMENTS
from reslearn.reproduce.experiment import Experiment, Scale
from reslearn.reproduce.run import dataset, make_plan
from reslearn.reproduce.runs import find, open_data
from reslearn.reproduce.speed import seconds

WIDTH = 120  # columns without a terminal
COLUMNS = ("", "published", "ours", "difference", "verdict")
CLAIM_COLUMNS = ("claim", "effect (95% interval)", "disagreeing seeds", "verdict")


def duration(s: float) -> str:
    """`"40 s"`, `"7 min"`, `"3.1 h"` or `"2.4 days"`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if s < limit:
            return f"{s / unit:.1f} {name}" if unit == 3600 else f"{max(1, round(s / unit))} {name}"
    return f"{s / 86_400:.1f} days"


def costs(experiment: Experiment, scale: Scale, seeds: int | None, data: str | None, out: Path, device: str) -> dict[str, Any]:
    """The cost of an experiment at a scale: `state` as text, and `seconds` left to train, None if it cannot run."""
    wanted = data or experiment.data
    if experiment.of_given_models:
        return {"state": "needs --model", "seconds": None}
    try:
        if wanted in datasets.NAMES[1:] and datasets.present(wanted) is None and (data or scale == "paper"):
            return {"state": f"needs {wanted} (RESLEARN_DATA or a download)", "seconds": None}
        source = dataset(experiment, scale, data)
        plan = make_plan(experiment, scale, source)
        if plan.run is not None:
            open_data(source.source, experiment.task)
        if not plan.trainings:
            done = (out / f"{experiment.name}-{scale if plan.run else 'paper'}.json").exists()
            return {"state": "done" if done else "", "seconds": 0.0 if done else 60 * plan.minutes}
        opened = open_data(source.source, experiment.task)
    except UserError as error:
        return {"state": str(error).removeprefix(f"{experiment.name} "), "seconds": None}
    left, done, count = 0.0, 0, seeds or plan.seeds
    for runs in find(plan, opened, source.source, out).values():
        per_run = seconds(runs.recipe, opened, device) if isinstance(opened, DataSet) else 60 * plan.minutes
        finished = sum(runs.done(seed) for seed in range(count))
        done, left = done + finished, left + (count - finished) * per_run
    total = count * len(plan.trainings)
    return {"state": f"{done} of {total} runs done" if done else f"{total} runs", "seconds": left}


def listing(scale: Scale, seeds: int | None, data: str | None, out: Path, device: str) -> list[dict[str, Any]]:
    """All experiments with their cost at a scale on this machine."""
    return [
        {"name": name, "source": e.source, "title": e.title, **costs(e, scale, seeds, data, out, device)}
        for name, e in EXPERIMENTS.items()
    ]


def print_listing(rows: list[dict[str, Any]], scale: Scale) -> None:
    """Prints one line per experiment."""
    table = Table("experiment", "source", "title", f"at scale {scale}", "time left", box=None, pad_edge=False)
    for row in rows:
        left = "" if row["seconds"] is None else "none" if not row["seconds"] else duration(row["seconds"])
        table.add_row(row["name"], row["source"], row["title"], row["state"], left)
    _print(table)


def print_result(result: dict[str, Any], out: Path) -> None:
    """Prints a result: rows, claims, notes, deviations and the files written."""
    table = Table(f"{result['source']}, scale {result['scale']}", *COLUMNS[1:], box=None, pad_edge=False)
    for row in result["rows"]:
        table.add_row(*cells(row))
    _print(table)
    if result["claims"]:
        table = Table(*CLAIM_COLUMNS, box=None, pad_edge=False)
        for claim in result["claims"]:
            table.add_row(*claim_cells(claim))
        _print(table)
    for note in result["notes"]:
        _print(f"note: {note}")
    for deviation in result["deviations"]:
        _print(f"deviation: {deviation}")
    written = [f"{result['experiment']}-{result['scale']}.json", result.get("picture"), result.get("effects_picture")]
    _print(f"written: {', '.join(str(out / name) for name in written if name)}")


def number(value: float | None) -> str:
    """Two decimals; four for small values that two decimals cannot show; "" for None."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 0.01 and abs(value - round(value, 2)) > 1e-9 else f"{value:.2f}"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The table cells of a row of a result, see COLUMNS."""
    ours = row["ours"]
    spread = f" ± {ours['std']:.2f} (n={ours['n']})" if ours and ours["std"] is not None else ""
    mean = f"{number(ours['mean'])}{spread}" if ours else ""
    difference = "" if row.get("difference") is None else f"{row['difference']:+.2f}"
    return row["what"], number(row["published"]), mean, difference, row["verdict"]


def claim_cells(claim: dict[str, Any]) -> tuple[str, ...]:
    """The table cells of a claim of a result, see CLAIM_COLUMNS."""
    effect = claim["effect"]
    if effect is None:
        return claim["text"], "", "", claim["verdict"]
    interval = "{:+.2f} to {:+.2f}".format(*effect["interval"]) if effect["interval"] else "measured once"
    disagree = ", ".join(map(str, claim.get("disagree", []))) or "none"
    return claim["text"], f"{effect['mean']:+.2f} ({interval})", disagree if effect["n"] > 1 else "", claim["verdict"]


def _print(output: str | Table) -> None:
    width = None if sys.stdout.isatty() else WIDTH
    Console(highlight=False, soft_wrap=isinstance(output, str), markup=False, width=width).print(output)
