"""The Python face of the main job: what the command line does, as functions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reslearn import report, training
from reslearn.files import write_text
from reslearn.training import Run, many, ranks


def train(
    data: str | Path,
    model: str | None = None,
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    init: str | Path | None = None,
    task: str = "classify",
) -> Run:
    """Train a network on images, or a detector (task="detect") on images with boxes; write its run folder, with a report.

    The arguments are those of reslearn.training.train; `run.result` is what result.json holds. Raises UserError for whatever
    cannot be used, Interrupted after SIGINT or SIGTERM.

    >>> run = train("fashion-sample", "resnet20", settings=["schedule.epochs=2"], out="runs/first")  # doctest: +SKIP
    >>> run.result["last"]["test"]["top1_error"]  # doctest: +SKIP
    """
    return _reported(training.train(data, model, recipe, settings, seed, out, device, quiet, init, task))


def resume(run: str | Path, device: str = "auto", quiet: bool = False) -> Run:
    """Continue an interrupted run to its end, bit for bit on the same machine, and write its report."""
    return _reported(training.resume(run, device, quiet))


def train_seeds(seeds: int, data: str | Path, out: str | Path | None = None, device: str = "auto", **arguments: Any) -> list[Run]:
    """Train with several seeds, in OUT/seed-0, ...; OUT/seeds.json and OUT/report.html hold all of them.

    The other arguments are train's. Raises what train raises, and UserError without `out`.
    """
    return _summed_up(many.train_seeds(seeds, data, out=out, device=device, **arguments))


def resume_seeds(out: str | Path, device: str = "auto", quiet: bool = False) -> list[Run]:
    """Continue interrupted runs of several seeds to their ends."""
    return _summed_up(many.resume_seeds(out, device, quiet))


def _summed_up(runs: list[Run]) -> list[Run]:
    out = runs[0].folder.parent
    write_text(out / "seeds.json", json.dumps(many.summary(runs), indent=1))
    report.write([_reported(run).folder for run in runs], out / "report.html")
    return runs


def _reported(run: Run) -> Run:
    if not ranks.first():
        return run
    report.write([run.folder], run.folder / "report.html")
    return run
