"""The same run with several seeds: one after the other, or side by side on a GPU that a small network cannot fill."""

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

OVER = object()


def train_seeds(seeds: int, request: TrainRequest) -> list[Run]:
    """Runs with the seeds `seed`, `seed` + 1, ... (from the recipe's on), in the folders OUT/seed-0, ...; see train.

    Each gives the same as alone. Raises what train raises; Interrupted leaves runs that resume_seeds(OUT) continues.
    """
    _alone()
    if seeds < 1:
        raise UserError(f"seeds={seeds}: must be at least 1")
    if (out := request.out) is None:
        raise UserError("several seeds need a folder for their runs: say where with --out")
    if out.exists():
        raise UserError(f"{out} exists: continue its runs with --resume {out}, or choose another --out")
    fresh = out.with_name(f".{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)  # of one that was killed
    with writing(out):
        fresh.mkdir(parents=True)
    try:  # the folder appears with all of its runs, or not at all: what is resumed is what was asked for
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


def _alone() -> None:
    if ranks.asked() > 1:
        raise UserError("several seeds are trained one after the other, each by one process: start them without torchrun")


def seed_folders(folder: str | Path) -> list[Path]:
    """The runs of several seeds in a folder, in their order; none where the folder is something else."""
    found = [path for path in Path(folder).glob("seed-*") if (path / "recipe.json").is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def resume_seeds(folder: str | Path, device: str = "auto", quiet: bool = False) -> list[Run]:
    """Go on with the runs of several seeds to their ends. Raises what resume raises."""
    _alone()
    if not seed_folders(folder):
        raise UserError(f"{folder} holds no runs of several seeds: they are folders such as {Path(folder) / 'seed-0'}")
    display, runs = Display(quiet), {}
    waiting = [path for path in seed_folders(folder) if not (path / "result.json").exists()]
    facts = [read_facts(path) for path in waiting]
    if len(waiting) > 1 and all(fact["machine"].get("execution") == "captured" for fact in facts) and torch.cuda.is_available():
        with ExitStack() as locks:
            for path in waiting:
                locks.enter_context(locked(path))
            jobs = [reopen(path, fact, device, True) for path, fact in zip(waiting, facts, strict=True)]
            display.say(f"run      {len(jobs)} runs side by side in {folder}")
            runs = {run.folder: run for run in side_by_side(jobs)}
    for path in seed_folders(folder):
        if path not in runs:
            display.say(f"run      {path}")
            try:
                runs[path] = resume(path, device, quiet)
            except Interrupted as signal:
                raise Interrupted(signal.number, Path(folder)) from None
            except KeyboardInterrupt:  # while its data is opened
                raise Interrupted(SIGINT, Path(folder)) from None
    return [runs[path] for path in seed_folders(folder)]


def side_by_side(jobs: Sequence[Job[Any, Any, Any]]) -> list[Run]:
    """Runs to their ends, a step of each in turn, each on its own stream of the device."""
    loops = [make_loop(job) for job in jobs]
    device = jobs[0].device
    with runtime.stop_on_signals() as stop, runtime.deterministic(device):
        turns = [(loop.steps(stop), torch.cuda.Stream(device) if device.type == "cuda" else None) for loop in loops]
        try:
            while turns:
                going_on = []
                for steps, stream in turns:
                    with torch.cuda.stream(stream) if stream is not None else nullcontext():
                        if next(steps, OVER) is not OVER:
                            going_on.append((steps, stream))
                turns = going_on
            return [Run(job.folder, job.task.name, finish(loop, stop)) for job, loop in zip(jobs, loops, strict=True)]
        except Interrupted as signal:
            for loop in loops:
                loop.save()
            raise Interrupted(signal.number, jobs[0].folder.parent) from None


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The last numbers of runs of one task with several seeds, with the values of each run in their order:
    `{"runs": folders, split: {measure: {"each": values, "mean": , "std": }}}`. std is of the sample, None for one run; both are
    None where a value is."""
    found: dict[str, Any] = {"runs": [str(run.folder) for run in runs]}
    for split in ("val", "test", "train"):
        numbers = [tasks.get(run.task).measures(run.result["last"][split]) for run in runs if split in run.result["last"]]
        if len(numbers) == len(runs):
            shared = [name for name in numbers[0] if all(name in one for one in numbers)]
            found[split] = {name: _spread([one[name][0] for one in numbers]) for name in shared}
    return found


def _spread(each: Sequence[float | None]) -> dict[str, Any]:
    values = [value for value in each if value is not None]
    whole = len(values) == len(each)
    return {
        "each": list(each),
        "mean": statistics.mean(values) if whole else None,
        "std": statistics.stdev(values) if whole and len(values) > 1 else None,
    }
