"""reproduce: the tables and figures of the papers."""

import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from reslearn.cli.options import Device, Json
from reslearn.errors import Interrupted, UserError

Scale = Literal["smoke", "small", "paper"]


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(help="Experiments; without any, list them.")] = None,
    scale_option: Annotated[
        Scale | None,
        typer.Option("--scale", help="smoke: check that it runs; small (default): test an effect; paper: the paper's protocol."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every experiment that has this scale.")] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Seeds per training.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data set, instead of the experiment's own.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Train only this entry; reuse existing runs for the others.")
    ] = None,
    models: Annotated[list[Path] | None, typer.Option("--model", help="Measure this model instead of training.")] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Train missing runs, or only read finished ones.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for runs and results.")] = Path("reproduction"),
    as_json: Json = False,
    device: Device = "auto",
) -> None:
    """Reproduce tables and figures of the papers.

    Shows published numbers next to ours and effects with 95% intervals, and writes plots and an HTML page. Runs are kept and
    shared between experiments. Repeat an interrupted command to resume it.

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

    scale: Scale = scale_option or "small"
    if names and every:
        raise UserError("experiment names cannot be combined with --all")
    if not names and not every:
        if only or models or not train:
            raise UserError("--only, --model and --no-train need the name of an experiment")
        rows = show.listing(scale, seeds, data, out, device)
        typer.echo(json.dumps(rows, indent=1)) if as_json else show.print_listing(rows, scale)
        return
    chosen = [experiment(name) for name in names or EXPERIMENTS]
    if every:
        chosen = [e for e in chosen if scale in e.plans and not e.of_given_models]
    if (only or models) and len(chosen) > 1:
        raise UserError("--only and --model apply to a single experiment")
    if models and scale_option:
        raise UserError("--scale does not apply with --model: nothing is trained")
    if scale_option is None and all(e.of_given_models for e in chosen):
        scale = "paper"  # their only scale
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    page = None
    command = shlex.join(["reslearn", *sys.argv[1:]])
    for e in chosen:
        untrained = every and not e.trains(scale)  # with --all, the options for trainings are ignored here
        try:
            result = run(
                e,
                scale,
                seeds=None if untrained else seeds,
                data=None if untrained else data,
                out=out,
                device=device,
                only=only or (),
                models=models or (),
                training=train or untrained,
                quiet=as_json,
                command=command,
                order=[*EXPERIMENTS].index(e.name),
            )
        except Interrupted as signal:
            raise Interrupted(signal.number, again=command) from None
        except UserError as error:
            if not every:
                raise
            typer.echo(f"reslearn: {e.name}: {error}; continuing with the next experiment", err=True)
            failed.append(e.name)
            continue
        results.append(result)
        page = _write_page(out)
        if not as_json:
            show.print_result(result, out)
    if not results:
        raise UserError("none of the experiments could run")
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    elif page is not None:
        typer.echo(f"page:    {page}")
    if failed:
        raise UserError(f"could not run {', '.join(failed)}; the reasons are above")


def _write_page(out: Path) -> Path | None:
    """Write OUT/index.html, if the report package is installed."""
    if find_spec("reslearn.report") is None:
        return None
    from reslearn.report import story

    return story.write(out, out / "index.html")
