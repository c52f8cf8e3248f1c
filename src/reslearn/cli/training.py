"""What the commands that train have in common: one request, carried out, and the numbers of its runs."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reslearn.errors import UserError

if TYPE_CHECKING:
    from reslearn.training.run import Run

SPLITS = {"val": "held-out", "test": "test", "train": "training"}


def train_command(task: str, data: str | Path | None, resume: Path | None, seeds: int | None, device: str, **options: Any) -> None:
    """Train what is asked for, or continue a run of any task, or those of several seeds. Print the last numbers.

    options: those of training.request.parse by name, None or empty where they are not given.
    """
    if resume is not None:
        named = {"DATA": data, "--seeds": seeds}
        named |= {f"--{'set' if name == 'settings' else name.replace('_', '-')}": value for name, value in options.items()}
        if extra := [name for name, value in named.items() if value not in (None, (), [])]:
            raise UserError(f"--resume takes its recipe from the run: leave out {', '.join(extra)}")
    elif data is None:
        command = f"reslearn {task} train" if task in ("detect", "localize") else "reslearn train"
        raise UserError(f"say what to train on: {command} DATA (or --resume RUN)")
    from reslearn import api
    from reslearn.training.request import parse

    if resume is not None and api.many.seed_folders(resume):
        _print_seeds(api.resume_seeds(resume, device))
    elif resume is not None:
        _print_run(api.resume(resume, device))
    else:
        assert data is not None
        try:
            request = parse(data, task=task, device=device, **options)
        except UserError as error:
            error.shared = True  # of several ranks, all have it
            raise
        if seeds is None:
            _print_run(api.train_request(request))
        else:
            _print_seeds(api.train_seeds(seeds, request))


def _print_run(run: "Run") -> None:
    """The numbers of a finished run, and where its files are; of several ranks, the first one says so."""
    from reslearn import tasks
    from reslearn.training import ranks

    if not ranks.first():
        return
    measures = tasks.get(run.task).measures
    same = run.result.get("best", {}).get("step") == run.result["last"]["step"]
    for name in ["last"] if same else [name for name in ("last", "best") if name in run.result]:
        step, title = run.result[name]["step"], "last, best" if same else name
        for split, what in SPLITS.items():
            if split in run.result[name]:
                numbers = run.result[name][split]
                note = " (nothing was held out)" if split == "train" else ""
                for measure, (value, interval) in measures(numbers).items():
                    spread = f"95% interval {interval[0]:.2f} to {interval[1]:.2f}, " if interval else ""
                    about = f"{spread}n={numbers['n']:,}; {title}: step {step:,}"
                    typer.echo(f"result   {what}{note} {measure} {_number(value):.2f}%  ({about})")
    typer.echo(f"model    {run.folder / 'model.safetensors'}")
    _print_report(run.folder)


def _print_seeds(runs: "list[Run]") -> None:
    """The numbers of runs with several seeds: a line for each split and measure."""
    from reslearn.training.many import summary

    found, folder = summary(runs), runs[0].folder.parent
    for split, what in SPLITS.items():
        for measure, of in found.get(split, {}).items():
            values = ", ".join(f"{_number(value):.2f}" for value in of["each"])
            spread = "" if of["std"] is None else f" +- {of['std']:.2f}"
            seeds = f"n={len(runs)} seed{'s' * (len(runs) > 1)}"
            typer.echo(f"result   {what} {measure} {_number(of['mean']):.2f}{spread}%  ({values}; {seeds})")
    _print_report(folder)


def _print_report(folder: Path) -> None:
    """Where the report is; tasks of other packages may have none."""
    if (page := folder / "report.html").is_file():
        typer.echo(f"report   {page}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
