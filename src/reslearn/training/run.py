"""A run folder, from its start or from its last checkpoint, to its end."""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reslearn import data as datasets
from reslearn.classify import task as classification
from reslearn.detect import task as detection
from reslearn.device import pick_device, pick_precision
from reslearn.errors import Interrupted, UserError
from reslearn.files import write_text, writing
from reslearn.training import checkpoint, ranks, runtime
from reslearn.training.board import check_installed
from reslearn.training.display import Display
from reslearn.training.folder import begun, locked, read_facts
from reslearn.training.loop import Loop
from reslearn.training.schedule import warmup_steps
from reslearn.training.stepper import pick
from reslearn.training.task import Asked, Job, Ready, Task

TASKS: dict[str, Task] = {"classify": classification, "detect": detection}


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its result.json."""

    folder: Path
    result: dict[str, Any]


def free_name(data: str, net: str, parent: Path = Path("runs")) -> Path:
    """runs/DATA-NET, with a number behind it where that is taken."""
    stem = f"{Path(data).name}-{net}"
    names = (parent / (stem if i == 1 else f"{stem}-{i}") for i in range(1, sys.maxsize))
    return next(path for path in names if not path.exists())


def train(
    data: str | Path,
    model: str | None = None,
    recipe: str | Path | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    init: str | Path | None = None,
    task: str = "classify",
) -> Run:
    """Train a network and write a run folder.

    data: a data set's name, a folder of class folders, or a .csv/.jsonl list. model: a network's name (see `models`). recipe: a
    recipe's name or file. settings: "key=value". out: the run folder, which must be new. device: auto, cpu, cuda or mps.
    init: a model file or run folder to fine-tune: its network, weights and preprocessing; new classes get a new last layer.
    task: "classify", or "detect" for a detector on a set with boxes.
    Raises UserError for whatever of these cannot be used, before anything is written; Interrupted after SIGINT or SIGTERM,
    when the run can be resumed.
    """
    with ranks.joined(device):
        if (again := begun(out)) is not None:
            return resume(again, device, quiet)
        jobs: list[Job] = []

        def start() -> tuple[Path, dict[str, Any]]:
            jobs.append(begin(data, model, recipe, settings, seed, out, device, quiet, init, task))
            return jobs[0].folder, jobs[0].facts

        folder, facts = ranks.by_first(start)
        with locked(folder):
            return train_job(jobs[0] if jobs else reopen(folder, facts, device, quiet))


def begin(
    data: str | Path,
    model: str | None,
    recipe: str | Path | None,
    settings: Sequence[str],
    seed: int | None,
    out: str | Path | None,
    device: str,
    quiet: bool,
    init: str | Path | None,
    task: str = "classify",
) -> Job:
    """A new run in its folder, with its recipe, not yet trained. The arguments are train's."""
    display = Display(quiet)  # of rank 0, which alone begins runs
    settings = [settings] if isinstance(settings, str) else settings
    if task not in TASKS:
        raise UserError(f"task={task!r}: must be one of {', '.join(map(repr, TASKS))}")
    runtime.check_versions()
    on = ranks.own_device(pick_device(device))
    if out is not None:
        _refuse_existing(Path(out))
    ready, chose, made, about = TASKS[task].begin(Asked(data, model, recipe, settings, seed, init), on, display)
    resolved = ready.recipe
    if resolved.log.tensorboard:
        check_installed()
    folder = Path(out) if out is not None else free_name(ready.data.name, resolved.net.name)
    total = resolved.schedule.total(len(ready.sources.train), resolved.batch.size)
    if warmup_steps(resolved.schedule, total) >= total > 1:
        raise UserError(f"schedule.warmup={resolved.schedule.warmup:g} is no shorter than the run's {total:,} steps")
    mode, note = pick(resolved.step, on, resolved, resident=TASKS[task].resident(ready))
    facts = {
        "task": task,
        "recipe": resolved.model_dump(mode="json"),
        "command": runtime.command("reslearn.train()"),
        "source": _absolute(data),
        **about,
        "machine": _machine(on, ready, mode),
        "versions": runtime.versions(),
        "chose": [*chose, *([note] if note else [])],
    }
    if (name := ranks.job()) is not None:
        facts["job"] = name
    _create(folder, facts, made)
    return Job(folder, facts, ready, on, mode, display)


def resume(folder: str | Path, device: str = "auto", quiet: bool = False) -> Run:
    """Continue a run from its last checkpoint, bit for bit on the same machine with the same versions.

    device: by default the kind that the run began on, where it is there.
    Raises UserError where the folder is no run, its data has changed, its checkpoint is damaged or another process is at it.
    """
    folder = Path(folder)
    with ranks.joined(device):
        facts = ranks.by_first(lambda: read_facts(folder))
        with locked(folder):
            if result := ranks.by_first(lambda: _result(folder)):
                Display(quiet or not ranks.first()).say(f"{folder} is complete: nothing to resume")
                return Run(folder, result)
            return train_job(reopen(folder, facts, device, quiet))


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.exists() else None


def task_of(facts: dict[str, Any]) -> Task:
    """What a run is trained to do."""
    return TASKS[facts.get("task", "classify")]


def reopen(folder: Path, facts: dict[str, Any], device: str, quiet: bool) -> Job:
    """A run that has begun, with its data."""
    display = Display(quiet or not ranks.first())
    runtime.check_versions()
    on = ranks.own_device(_same_device(facts["machine"].get("device", "auto")) if device == "auto" else pick_device(device))
    ready = task_of(facts).reopen(folder, facts, on, display)
    mode = _same_step(facts["machine"].get("step", "eager"), on, ready, resident=task_of(facts).resident(ready))
    here = {"ranks": 1} | _machine(on, ready, mode) | runtime.versions()
    before = {"ranks": 1} | facts["machine"] | facts["versions"]
    if changed := [f"{key} {before.get(key)} -> {value}" for key, value in here.items() if before.get(key) != value]:
        display.say(f"note     not the machine or versions it began with, so the last bits may differ: {', '.join(changed)}")
    return Job(folder, facts, ready, on, mode, display)


def make_loop(job: Job) -> Loop:
    """The loop of a run: a fresh network, one that starts from another's weights, or the last checkpoint's."""
    task = task_of(job.facts)
    saved = ranks.by_first(lambda: checkpoint.found(job.folder / "checkpoints"))
    state = task.make_state(job, task.network(job, fresh=not saved))
    if saved:
        state.from_checkpoint(checkpoint.load(saved[-1]), str(saved[-1]))
    ranks.wait(ranks.PREPARING)
    loop = task.make_loop(job, state)
    ranks.wait(ranks.PREPARING)  # drawing the first picture ever takes rank 0 a while
    _introduce(job, loop)
    return loop


def train_job(job: Job) -> Run:
    """A run to its end."""
    loop = make_loop(job)
    with runtime.stop_on_signals() as stop, runtime.deterministic(job.device), job.display:
        try:
            for _ in loop.steps(stop):
                pass
            return Run(job.folder, finish(job, loop, stop))
        except Interrupted as signal:
            raise Interrupted(signal.number, job.folder) from None


def finish(job: Job, loop: Loop, stop: runtime.Stop) -> dict[str, Any]:
    """The end of a run; see its task. With the model files written, its last checkpoint is all that it still needs."""
    result = task_of(job.facts).finish(job, loop, stop)
    if ranks.first():
        checkpoint.prune(job.folder / "checkpoints", 1)
    return result


def _machine(device: torch.device, ready: Ready, mode: str) -> dict[str, Any]:
    """What trains, and how many of them where it is more than one."""
    machine = runtime.machine(device, pick_precision(ready.recipe.precision, device), mode)
    return machine | {"ranks": ranks.count()} if ranks.count() > 1 else machine


def _same_device(began: str) -> torch.device:
    try:
        return pick_device(began)
    except UserError:  # another machine
        return pick_device()


def _same_step(began: str, device: torch.device, ready: Ready, *, resident: bool) -> str:
    """How the run's steps go on: as they began, where that can be."""
    try:
        return pick(began, device, ready.recipe, resident=resident)[0]
    except UserError:
        return pick("auto", device, ready.recipe, resident=resident)[0]


def _introduce(job: Job, loop: Loop) -> None:
    machine, recipe, display = job.facts["machine"], loop.recipe, job.display
    for line in task_of(job.facts).introduce(job):
        display.say(line)
    several = f"{machine['ranks']} ranks, " if "ranks" in machine else ""
    how = f"{several}{machine['device']}, {machine['threads']} threads, {machine['precision']}, {machine['step']} steps"
    display.say(f"machine  {machine['processor']} ({how})")
    for line in job.facts["chose"]:
        display.say(f"chose    {line}")
    for section, values in recipe.model_dump(mode="json", exclude_none=True).items():
        shown = _plain(values) if not isinstance(values, dict) else "  ".join(f"{k}={_plain(v)}" for k, v in values.items())
        if shown != "":
            display.say(f"{section:<11}{shown}")
    step = f", from step {s:,}" if (s := loop.state.progress.step) else ""
    display.say(f"run      {job.folder}, {loop.total:,} steps{step}")
    schedule = recipe.schedule
    if schedule.drops and loop.total <= schedule.drops[0]:
        display.say(f"note     the lr never drops: schedule.drops begins at step {schedule.drops[0]:,}, after the run's end")
    if loop.sources.val is None:
        why = "could be held out: too few a class" if recipe.data.val else "is held out (data.val=0)"
        last = "" if loop.sources.test is not None else "; the final numbers are of the training images"
        display.say(f"note     no image {why}{last}")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _absolute(data: str | Path) -> str:
    return data if isinstance(data, str) and data in datasets.NAMES else str(Path(data).expanduser().absolute())


def _refuse_existing(folder: Path) -> None:
    if (folder / "recipe.json").exists():
        raise UserError(f"{folder} holds a run already: continue it with --resume {folder}, or choose another --out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another --out")


def _create(folder: Path, facts: dict[str, Any], made: dict[str, list[str]]) -> None:
    """The run folder appears whole, with its recipe, or not at all."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".run-", dir=folder.parent) as temporary:
            fresh = Path(temporary) / "run"
            fresh.mkdir()
            write_text(fresh / "recipe.json", json.dumps(facts, indent=1, ensure_ascii=False))
            if made:
                write_text(fresh / "split.json", json.dumps(made, indent=1, ensure_ascii=False))
            fresh.rename(folder)
