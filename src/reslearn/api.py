"""The Python face of the main job: what the command line does, as functions."""

from pathlib import Path
from typing import Any

from reslearn import report, training
from reslearn.training import Run


def train(data: str | Path, model: str | None = None, **options: Any) -> Run:
    """Train a network on images and write a run folder with its model, numbers and report (see reslearn.training.train).

    >>> run = train("fashion-sample", "resnet20", settings=["schedule.epochs=2"], out="runs/first")  # doctest: +SKIP
    """
    return _reported(training.train(data, model, **options))


def resume(run: str | Path, **options: Any) -> Run:
    """Continue an interrupted run to its end, bit for bit (see reslearn.training.resume)."""
    return _reported(training.resume(run, **options))


def _reported(run: Run) -> Run:
    report.write([run.folder], run.folder / "report.html")
    return run
