"""The Python face of the main job: what the command line does, as functions."""

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
    """Train a network; write its run folder, with a report.

    data: a data set's name, a folder or a list; for a detector or localizer, a set with boxes. recipe: a recipe's name, a file, or
    a recipe object; chosen from the data unless given. model: a network's name (see `models`). settings: values for keys of the
    recipe, a mapping such as {"schedule.epochs": 5} or a list of "key=value". init: a model file or run folder to start from: its
    network, weights and preprocessing. out: the run's new folder. device: auto, cpu, cuda or mps. task: classify, detect,
    localize, or one that another package registers. `run.result` is what result.json holds.
    Raises UserError for whatever cannot be used, before anything is written; Interrupted after SIGINT or SIGTERM, when the run can
    be resumed.

    >>> run = train("fashion-sample", settings={"schedule.epochs": 2}, out="runs/first")  # doctest: +SKIP
    >>> run.result["last"]["test"]["top1_error"]  # doctest: +SKIP
    """
    request = parse(
        data, recipe, model=model, settings=settings, seed=seed, init=init, out=out, device=device, task=task, quiet=quiet
    )
    return train_request(request)


def train_request(request: TrainRequest) -> Run:
    """train, of a request that is parsed already."""
    return _reported(run.train(request))


def resume(folder: str | Path, device: str = "auto", quiet: bool = False) -> Run:
    """Continue an interrupted run to its end, bit for bit on the same machine, and write its report."""
    return _reported(run.resume(folder, device, quiet))


def train_seeds(seeds: int, request: TrainRequest) -> list[Run]:
    """Train with several seeds, in OUT/seed-0, ...; OUT/seeds.json and OUT/report.html hold all of them.

    Raises what train raises, and UserError for a request without `out`.
    """
    return _summed_up(many.train_seeds(seeds, request))


def resume_seeds(out: str | Path, device: str = "auto", quiet: bool = False) -> list[Run]:
    """Continue interrupted runs of several seeds to their ends."""
    return _summed_up(many.resume_seeds(out, device, quiet))


def _summed_up(runs: list[Run]) -> list[Run]:
    out = runs[0].folder.parent
    write_text(out / "seeds.json", json.dumps(many.summary(runs), indent=1))
    _write_report([_reported(run) for run in runs], out)
    return runs


def _reported(run: Run) -> Run:
    _write_report([run], run.folder)
    return run


def _write_report(runs: list[Run], folder: Path) -> None:
    """Write FOLDER/report.html, for runs of a task that has a page, where reports are installed."""
    if not ranks.first() or find_spec("reslearn.report") is None:
        return
    from reslearn.report import page

    if all(run.task in page.TASKS for run in runs):
        page.write([run.folder for run in runs], folder / "report.html")
