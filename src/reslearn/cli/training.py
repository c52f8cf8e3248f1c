"""What the commands that train share: start or resume runs, and print their results."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reslearn.errors import UserError

if TYPE_CHECKING:
    from reslearn.training.run import Run


def train_command(task: str, data: str | Path | None, resume: Path | None, seeds: int | None, device: str, **options: Any) -> None:
    """Train or resume one run, or runs with several seeds, and print the final numbers.

    options: keyword arguments of training.request.parse; None or empty if not given.
    """
    if resume is not None:
        given = {"DATA": data, "--seeds": seeds}
        given |= {f"--{'set' if name == 'settings' else name.replace('_', '-')}": value for name, value in options.items()}
        if extra := [name for name, value in given.items() if value not in (None, (), [])]:
            raise UserError(f"{', '.join(extra)} cannot be combined with --resume: the recipe is that of the run")
    elif data is None:
        command = f"reslearn {task} train" if task in ("detect", "localize") else "reslearn train"
        raise UserError(f"DATA is missing: {command} DATA (or --resume RUN)")
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
            error.shared = True  # every rank raises it
            raise
        if seeds is None:
            _print_run(api.train_request(request))
        else:
            _print_seeds(api.train_request_seeds(seeds, request))


def _print_run(run: "Run") -> None:
    """Print the numbers and files of a finished run, on the first rank only."""
    from reslearn.training import ranks

    if not ranks.first():
        return
    for name, value, details in run.numbers():
        typer.echo(f"result   {name} {value}  ({details})")
    typer.echo(f"model    {run.folder / 'model.safetensors'}")
    _print_report(run.folder)


def _print_seeds(runs: "list[Run]") -> None:
    """Print the mean over runs with several seeds: one line per split and measure."""
    from reslearn.training.many import summary
    from reslearn.training.run import SPLITS

    numbers = summary(runs)
    for split, label in SPLITS.items():
        for measure, stats in numbers.get(split, {}).items():
            values = ", ".join(f"{_number(value):.2f}" for value in stats["each"])
            spread = "" if stats["std"] is None else f" +- {stats['std']:.2f}"
            seeds = f"n={len(runs)} seed{'s' * (len(runs) > 1)}"
            typer.echo(f"result   {label} {measure} {_number(stats['mean']):.2f}{spread}%  ({values}; {seeds})")
    _print_report(runs[0].folder.parent)


def _print_report(folder: Path) -> None:
    """Print the path of the report; tasks of other packages may have none."""
    if (page := folder / "report.html").is_file():
        typer.echo(f"report   {page}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
