"""The same run with several seeds: one after the other, or side by side on a GPU that a small network cannot fill."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from reslearn.errors import Interrupted, UserError
from reslearn.training import ranks, runtime
from reslearn.training.display import Display
from reslearn.training.folder import locked, read_facts
from reslearn.training.run import Run, begin, finish, make_loop, reopen, resume
from reslearn.training.task import Job

OVER = object()


def train_seeds(
    seeds: int,
    data: str | Path,
    model: str | None = None,
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    init: str | Path | None = None,
) -> list[Run]:
    """Runs with the seeds `seed`, `seed` + 1, ..., in the folders OUT/seed-0, ...; the other arguments are those of train.

    Each gives the same as alone. Raises what train raises; Interrupted leaves runs that resume_seeds(OUT) goes on with.
    """
    _alone()
    if seeds < 1:
        raise UserError(f"seeds={seeds}: must be at least 1")
    if out is None:
        raise UserError("several seeds need a folder for their runs: say where with --out")
    if Path(out).exists():
        raise UserError(f"{out} exists: continue its runs with --resume {out}, or choose another --out")
    first = seed or 0
    for number in range(first, first + seeds):
        begin(data, model, recipe, settings, number, Path(out) / f"seed-{number}", device, True, init)
    return resume_seeds(out, device, quiet)


def _alone() -> None:
    if ranks.asked() > 1:
        raise UserError("several seeds are trained one after the other, each by one process: start them without torchrun")


def seed_folders(folder: str | Path) -> list[Path]:
    """The runs of several seeds in a folder, in their order; none where the folder is something else."""
    found = [path for path in Path(folder).glob("seed-*") if (path / "recipe.json").is_file()]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def resume_seeds(folder: str | Path, device: str = "auto", quiet: bool = False) -> list[Run]:
    """Go on with the runs of several seeds to their ends."""
    _alone()
    display, runs = Display(quiet), {}
    waiting = [path for path in seed_folders(folder) if not (path / "result.json").exists()]
    facts = [read_facts(path) for path in waiting]
    if len(waiting) > 1 and all(fact["machine"].get("step") == "captured" for fact in facts) and torch.cuda.is_available():
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
    return [runs[path] for path in seed_folders(folder)]


def side_by_side(jobs: Sequence[Job]) -> list[Run]:
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
        except Interrupted as signal:
            for loop in loops:
                loop.save()
            raise Interrupted(signal.number, jobs[0].folder.parent) from None
        return [Run(job.folder, finish(job, loop, stop)) for job, loop in zip(jobs, loops, strict=True)]


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """The last numbers, in percent, of runs with several seeds: for each split, `errors` of classifiers or `AP` of detectors, one a
    run, and their `mean` and `std` (of the sample)."""
    found: dict[str, Any] = {"runs": [str(run.folder) for run in runs]}
    for split in ("val", "test", "train"):
        numbers = [run.result["last"].get(split, {}) for run in runs]
        key, title = ("top1_error", "errors") if any("top1_error" in each for each in numbers) else ("AP", "AP")
        values = [each.get(key) for each in numbers]
        if values and None not in values:
            spread = statistics.stdev(values) if len(values) > 1 else None
            found[split] = {title: values, "mean": statistics.mean(values), "std": spread}
    return found
