"""The Python face of the main job: what the command line does, as functions."""

from collections.abc import Sequence
from pathlib import Path

from reslearn import report, training
from reslearn.training import Run


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
) -> Run:
    """Train a network on images and write a run folder with its model, numbers and report.

    The arguments are those of reslearn.training.train; `run.result` is what result.json holds. Raises UserError for whatever
    cannot be used, Interrupted after SIGINT or SIGTERM.

    >>> run = train("fashion-sample", "resnet20", settings=["schedule.epochs=2"], out="runs/first")  # doctest: +SKIP
    >>> run.result["last"]["test"]["top1_error"]  # doctest: +SKIP
    """
    return _reported(training.train(data, model, recipe, settings, seed, out, device, quiet, init))


def resume(run: str | Path, device: str = "auto", quiet: bool = False) -> Run:
    """Continue an interrupted run to its end, bit for bit on the same machine, and write its report."""
    return _reported(training.resume(run, device, quiet))


def _reported(run: Run) -> Run:
    report.write([run.folder], run.folder / "report.html")
    return run
