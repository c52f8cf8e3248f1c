"""Training from Python: the functions behind the command line."""

import json
from importlib.util import find_spec
from pathlib import Path

from reslearn.files import write_text
from reslearn.training import many, ranks, run
from reslearn.training.recipe import Recipe
from reslearn.training.request import Settings, TrainRequest, parse
from reslearn.training.run import Run


def train(
    data: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    model: str | None = None,
    settings: Settings = (),
    seed: int | None = None,
    init: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    task: str = "classify",
    quiet: bool = False,
) -> Run:
    """Train a network and write a run folder with a report.

    data: data set name, folder or list; for a detector or localizer, a set with boxes. recipe: recipe name, file or object; by
    default chosen from the data. model: network name (see `models`). settings: recipe values, as a mapping such as
    {"schedule.epochs": 5} or a list of "key=value". init: model file or run folder to start from; its network, weights and
    normalization are reused. out: new run folder. device: auto, cpu, cuda or mps. task: classify, detect, localize, or a task
    that another package registers.
    Returns the run; `run.result` is the content of result.json. Raises UserError for invalid input, before anything is written;
    Interrupted after SIGINT or SIGTERM, with the run saved.

    >>> run = train("fashion-sample", settings={"schedule.epochs": 2}, out="runs/first")  # doctest: +SKIP
    >>> run.result["last"]["test"]["top1_error"]  # doctest: +SKIP
    """
    request = parse(
        data, recipe, model=model, settings=settings, seed=seed, init=init, out=out, device=device, task=task, quiet=quiet
    )
    return train_request(request)


def train_request(request: TrainRequest) -> Run:
    """Train from a parsed request; see train."""
    return _with_report(run.train(request))


def resume(folder: str | Path, device: str = "auto", quiet: bool = False) -> Run:
    """Resume an interrupted run (bit-exact on the same machine) and write its report."""
    return _with_report(run.resume(folder, device, quiet))


def train_seeds(seeds: int, request: TrainRequest) -> list[Run]:
    """Train with consecutive seeds in OUT/seed-0, ...; write OUT/seeds.json and OUT/report.html.

    Raises the errors of train, and UserError for a request without `out`.
    """
    return _with_summary(many.train_seeds(seeds, request))


def resume_seeds(out: str | Path, device: str = "auto", quiet: bool = False) -> list[Run]:
    """Resume interrupted runs with several seeds."""
    return _with_summary(many.resume_seeds(out, device, quiet))


def _with_summary(runs: list[Run]) -> list[Run]:
    out = runs[0].folder.parent
    write_text(out / "seeds.json", json.dumps(many.summary(runs), indent=1))
    _write_report([_with_report(run) for run in runs], out)
    return runs


def _with_report(run: Run) -> Run:
    _write_report([run], run.folder)
    return run


def _write_report(runs: list[Run], folder: Path) -> None:
    """Write FOLDER/report.html, if the task has a report page and the report package is installed."""
    if not ranks.first() or find_spec("reslearn.report") is None:
        return
    from reslearn.report import page

    if all(run.task in page.TASKS for run in runs):
        page.write([run.folder for run in runs], folder / "report.html")
