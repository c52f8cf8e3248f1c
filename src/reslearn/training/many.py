"""Runs with several seeds: one after another, or concurrently on a GPU that a small network cannot fill."""

import shutil
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from signal import SIGINT
from typing import Any

import torch

from reslearn import tasks
from reslearn.errors import Interrupted, UserError
from reslearn.files import writing
from reslearn.training import ranks, runtime
from reslearn.training.display import Display
from reslearn.training.folder import locked, read_facts
from reslearn.training.request import TrainRequest
from reslearn.training.run import Run, begin, finish, make_loop, reopen, resume
from reslearn.training.task import Job

FINISHED = object()


def train_seeds(seeds: int, request: TrainRequest) -> list[Run]:
    """Train with consecutive seeds, starting at that of the recipe, in the folders OUT/seed-0, ...; see train.

    Each run is identical to one trained alone. Raises the errors of train; after Interrupted, resume_seeds(OUT) continues.
    """
    _refuse_ranks()
    if seeds < 1:
        raise UserError(f"seeds={seeds}: must be at least 1")
    if (out := request.out) is None:
        raise UserError("several seeds need a folder for their runs: set --out")
    if out.exists():
        raise UserError(f"{out} already exists: resume its runs with --resume {out}, or choose another --out")
    fresh = out.with_name(f".{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)  # left by a process that was killed
    with writing(out):
        fresh.mkdir(parents=True)
    try:  # the folder appears with all of its runs or not at all, so that resuming it trains every seed
        next_seed: dict[str, int] = {}
        for number in range(seeds):
            job = begin(replace(request, settings=request.settings | next_seed, out=fresh / str(number), quiet=True))
            job.folder.rename(fresh / f"seed-{job.recipe.seed}")
            next_seed = {"seed": job.recipe.seed + 1}
        with writing(out):
            fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return resume_seeds(out, request.device, request.quiet)


def _refuse_ranks() -> None:
    if ranks.launched() > 1:
        raise UserError("several seeds do not support torchrun: start a single process")


def seed_folders(folder: str | Path) -> list[Path]:
    """The runs with several seeds in a folder, ordered by seed; empty for any other folder."""
    folders = [path for path in Path(folder).glob("seed-*") if (path / "recipe.json").is_file()]
    return sorted(folders, key=lambda path: (len(path.name), path.name))


def resume_seeds(folder: str | Path, device: str = "auto", quiet: bool = False) -> list[Run]:
    """Resume all unfinished runs with several seeds. Raises the errors of resume."""
    _refuse_ranks()
    if not seed_folders(folder):
        raise UserError(f"{folder} has no runs of several seeds: there is no folder such as {Path(folder) / 'seed-0'}")
    display, runs = Display(quiet), {}
    waiting = [path for path in seed_folders(folder) if not (path / "result.json").exists()]
    facts = [read_facts(path) for path in waiting]
    if len(waiting) > 1 and all(fact["machine"].get("execution") == "captured" for fact in facts) and torch.cuda.is_available():
        with ExitStack() as locks:
            for path in waiting:
                locks.enter_context(locked(path))
            jobs = [reopen(path, fact, device, True) for path, fact in zip(waiting, facts, strict=True)]
            display.say(f"run      {len(jobs)} concurrent runs in {folder}")
            runs = {run.folder: run for run in train_concurrently(jobs)}
    for path in seed_folders(folder):
        if path not in runs:
            display.say(f"run      {path}")
            try:
                runs[path] = resume(path, device, quiet)
            except Interrupted as signal:
                raise Interrupted(signal.number, Path(folder)) from None
            except KeyboardInterrupt:  # while the data is opened
                raise Interrupted(SIGINT, Path(folder)) from None
    return [runs[path] for path in seed_folders(folder)]


def train_concurrently(jobs: Sequence[Job[Any, Any, Any]]) -> list[Run]:
    """Train runs concurrently: one step of each in turn, each on its own CUDA stream."""
    loops = [make_loop(job) for job in jobs]
    device = jobs[0].device
    with runtime.stop_on_signals() as stop, runtime.deterministic(device):
        active = [(loop.steps(stop), torch.cuda.Stream(device) if device.type == "cuda" else None) for loop in loops]
        try:
            while active:
                unfinished = []
                for steps, stream in active:
                    with torch.cuda.stream(stream) if stream is not None else nullcontext():
                        if next(steps, FINISHED) is not FINISHED:
                            unfinished.append((steps, stream))
                active = unfinished
            return [Run(job.folder, job.task.name, finish(loop, stop)) for job, loop in zip(jobs, loops, strict=True)]
        except Interrupted as signal:
            for loop in loops:
                loop.save()
            raise Interrupted(signal.number, jobs[0].folder.parent) from None


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Statistics over runs of one task with several seeds, from the numbers of their last weights.

    Returns {"runs": folders, split: {measure: {"each": values, "mean": mean, "std": std}}}, with values in the order of the runs.
    std is the sample standard deviation, None for a single run. Both are None if a value is None.
    """
    result: dict[str, Any] = {"runs": [str(run.folder) for run in runs]}
    for split in ("val", "test", "train"):
        numbers = [tasks.get(run.task).measures(run.result["last"][split]) for run in runs if split in run.result["last"]]
        if len(numbers) == len(runs):
            shared = [name for name in numbers[0] if all(name in measures for measures in numbers)]
            result[split] = {name: _spread([measures[name][0] for measures in numbers]) for name in shared}
    return result


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    defined = [value for value in values if value is not None]
    complete = len(defined) == len(values)
    return {
        "each": list(values),
        "mean": statistics.mean(defined) if complete else None,
        "std": statistics.stdev(defined) if complete and len(defined) > 1 else None,
    }
