"""reproduce: every table and figure as a command."""

import json
import shlex
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from reslearn.cli.options import Device, Json
from reslearn.errors import Interrupted, UserError


class Scale(StrEnum):
    """smoke: shows only that it runs; small: tests an effect, in minutes; paper: the paper's protocol."""

    smoke = "smoke"
    small = "small"
    paper = "paper"


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; without any, list them.")] = None,
    asked: Annotated[
        Scale | None, typer.Option("--scale", help="smoke: runs only; small (default): an effect; paper: its protocol.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all experiments that have this scale.")] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Number of seeds per training.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data set instead of the experiment's own (name or path).")] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Train only this entry; reuse runs of the others.")] = None,
    models: Annotated[
        list[Path] | None, typer.Option("--model", help="Measure this model instead of training; repeatable.")
    ] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Train what is missing, or only read finished runs.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for runs and results.")] = Path("reproduction"),
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Reproduce tables and figures of the papers: published numbers beside ours, effects with intervals, plots, a page.

    Runs are kept and shared between experiments. Repeat an interrupted command to resume it.

    \b
    Examples:
      reslearn reproduce
      reslearn reproduce table1
      reslearn reproduce figure1 --scale small
      reslearn reproduce table6 --scale paper --only resnet20
      reslearn reproduce veit --model runs/resnet56
      reslearn reproduce table4 --model resnet50.safetensors --data path/to/imagenet
      reslearn reproduce --all --scale small
    """
    from reslearn.reproduce import show
    from reslearn.reproduce.catalog import EXPERIMENTS, experiment
    from reslearn.reproduce.run import reproduce as run

    scale = asked or Scale.small
    if names and every:
        raise UserError("give names or --all, not both")
    if not names and not every:
        if only or models or not train:
            raise UserError("--only, --model and --no-train go with an experiment's name")
        rows = show.listing(scale.value, seeds, data, out, device)
        typer.echo(json.dumps(rows, indent=1)) if as_json else show.print_listing(rows, scale.value)
        return
    chosen = [experiment(name) for name in names or EXPERIMENTS]
    if every:
        chosen = [e for e in chosen if scale.value in e.plans and not e.of_given_models]
    if (only or models) and len(chosen) > 1:
        raise UserError("--only and --model go with one experiment")
    if models and asked:
        raise UserError("--scale does not apply with --model: nothing is trained")
    if asked is None and all(e.of_given_models for e in chosen):
        scale = Scale.paper  # the only one they have
    results: list[dict[str, Any]] = []
    missed: list[str] = []
    page = out
    command = shlex.join(["reslearn", *sys.argv[1:]])
    for each in chosen:
        order = [*EXPERIMENTS].index(each.name)
        idle = every and not each.trains(scale.value)  # what is for trainings is for others than this one
        count, source = (None, None) if idle else (seeds, data)
        try:
            results.append(
                run(
                    each,
                    scale.value,
                    seeds=count,
                    data=source,
                    out=out,
                    device=device,
                    only=only or (),
                    models=models or (),
                    training=train or idle,
                    quiet=as_json,
                    command=command,
                    order=order,
                )
            )
        except Interrupted as signal:
            raise Interrupted(signal.number, again=command) from None
        except UserError as error:
            if not every:
                raise
            typer.echo(f"reslearn: {each.name}: {error}; continuing with the next", err=True)
            missed.append(each.name)
            continue
        page = _page(out)
        if not as_json:
            show.print_result(results[-1], out)
    if not results:
        raise UserError("none of the experiments could run")
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    elif page is not None:
        typer.echo(f"page:    {page}")
    if missed:
        raise UserError(f"what could not run: {', '.join(missed)}; the reasons are above")


def _page(out: Path) -> Path | None:
    """OUT/index.html, where reports are installed."""
    if find_spec("reslearn.report") is None:
        return None
    from reslearn.report import story

    return story.write(out, out / "index.html")
