"""Starts, resumes and finishes runs."""

import json
import math
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from reslearn import data as datasets
from reslearn import tasks
from reslearn.data.preprocess import Preprocessing
from reslearn.device import pick_device, pick_precision
from reslearn.errors import Interrupted, UserError
from reslearn.files import write_text, writing
from reslearn.html import table
from reslearn.training import checkpoint, ranks, runtime
from reslearn.training.board import check_installed
from reslearn.training.display import Display
from reslearn.training.finish import conclude
from reslearn.training.folder import begun, locked, read_facts
from reslearn.training.loop import Loop
from reslearn.training.recipe import Recipe, flatten, shown, validate
from reslearn.training.request import TrainRequest
from reslearn.training.resolve import resolve
from reslearn.training.schedule import warmup_steps
from reslearn.training.state import State
from reslearn.training.stepper import make_model, make_stepper, pick
from reslearn.training.task import Job, Phase

SPLITS = {"val": "held-out", "test": "test", "train": "training"}


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run. task: name of the task. result: content of result.json."""

    folder: Path
    task: str
    result: dict[str, Any]

    def numbers(self) -> Iterator[tuple[str, str, str]]:
        """Yields the final numbers as text: name, value, and interval, number of images and checkpoint."""
        measures = tasks.get(self.task).measures
        same = self.result.get("best", {}).get("step") == self.result["last"]["step"]
        for name in ["last"] if same else [name for name in ("last", "best") if name in self.result]:
            step, title = self.result[name]["step"], "last, best" if same else name
            for split in (split for split in SPLITS if split in self.result[name]):
                numbers = self.result[name][split]
                note = " (nothing was held out)" if split == "train" else ""
                for measure, (value, interval) in measures(numbers).items():
                    spread = f"95% interval {interval[0]:.2f} to {interval[1]:.2f}, " if interval else ""
                    shown_value = f"{math.nan if value is None else value:.2f}%"
                    yield f"{SPLITS[split]}{note} {measure}", shown_value, f"{spread}n={numbers['n']:,}; {title}: step {step:,}"

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {value}" for name, value, _ in self.numbers())
        return f"Run({str(self.folder)!r}, {self.task}: {numbers})"

    def _repr_html_(self) -> str:
        return table(self.numbers(), title=f"{self.folder} ({self.task})")


def free_name(data: str, net: str, parent: Path = Path("runs")) -> Path:
    """runs/DATA-NET, or runs/DATA-NET-2, ... if that exists."""
    stem = f"{Path(data).name}-{net}"
    paths = (parent / (stem if i == 1 else f"{stem}-{i}") for i in count(1))
    return next(path for path in paths if not path.exists())


def train(request: TrainRequest) -> Run:
    """Train a network and write a run folder.

    Raises UserError for invalid input, before anything is written; Interrupted after SIGINT or SIGTERM, with the run saved.
    """
    with ranks.joined(request.device):
        if (again := begun(request.out)) is not None:
            return resume(again, request.device, request.quiet)
        jobs: list[Job[Any, Any, Any]] = []

        def start() -> tuple[Path, dict[str, Any]]:
            jobs.append(begin(request))
            return jobs[0].folder, jobs[0].facts

        folder, facts = ranks.by_first(start)
        with locked(folder):
            try:
                return train_job(jobs[0] if jobs else reopen(folder, facts, request.device, request.quiet))
            except KeyboardInterrupt:  # before the loop handles signals
                raise Interrupted(signal.SIGINT, folder) from None


def begin(request: TrainRequest) -> Job[Any, Any, Any]:
    """Create the folder of a new run, without training it."""
    job = prepare(request)
    _create(job.folder, job.facts, job.sources.held_out)
    return job


def prepare(request: TrainRequest) -> Job[Any, Any, Any]:
    """Resolve and check a new run, without creating its folder."""
    task, display = request.task, Display(request.quiet)  # only rank 0 starts runs
    runtime.check_versions()
    device = ranks.own_device(pick_device(request.device))
    if request.out is not None:
        _refuse_existing(request.out)
    data = task.open(request.data, request.given)
    recipe, chose = resolve(request, data)
    ranks.check(recipe)
    if recipe.log.tensorboard:
        check_installed()
    with display:
        sources = task.sources(data, recipe, device, display, None)
    folder = request.out if request.out is not None else free_name(data.name, recipe.net.name)
    _check_warmup(recipe, task.phases(recipe, len(sources.train)))
    execution, note = pick(recipe, device, resident=task.resident(sources))
    facts = {
        "task": task.name,
        "recipe": recipe.model_dump(mode="json"),
        "command": runtime.command("reslearn.train()"),
        "source": _absolute(request.data),
        "data": task.describe(data, sources) | task.identity(data),
        "preprocessing": sources.preprocessing.model_dump(mode="json"),
        "machine": _machine(recipe, device, execution),
        "versions": runtime.versions(),
        "chose": [*chose, *([note] if note else [])],
    }
    if (name := ranks.job()) is not None:
        facts["job"] = name
    return Job(folder, facts, task, recipe, data, sources, device, execution, display)


def resume(folder: str | Path, device: str = "auto", quiet: bool = False) -> Run:
    """Resume a run from its last checkpoint, bit-exact on the same machine with the same versions.

    device: "auto" is the kind that the run began on, if available.
    Raises UserError if the folder is not a run, its data has changed, its checkpoint is damaged, or another process uses it.
    """
    folder = Path(folder).expanduser()
    with ranks.joined(device):
        facts = ranks.by_first(lambda: read_facts(folder))
        with locked(folder):
            if result := ranks.by_first(lambda: _result(folder)):
                Display(quiet or not ranks.first()).say(f"{folder} is complete: nothing to resume")
                return Run(folder, facts["task"], result)
            return train_job(reopen(folder, facts, device, quiet))


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    return json.loads(file.read_text()) if file.exists() else None


def reopen(folder: Path, facts: dict[str, Any], device: str, quiet: bool) -> Job[Any, Any, Any]:
    """Reopen the data of an existing run. Raises UserError if the data has changed."""
    task, display = tasks.get(facts["task"]), Display(quiet or not ranks.first())
    runtime.check_versions()
    on = ranks.own_device(_same_device(facts["machine"].get("device", "auto")) if device == "auto" else pick_device(device))
    recipe = validate(facts["recipe"], task.recipe, str(folder / "recipe.json"))
    ranks.check(recipe)
    data = task.open(facts["source"], flatten(facts["recipe"]))
    if any(facts["data"].get(key, value) != value for key, value in task.identity(data).items()):
        raise UserError(f"the data set {facts['source']} has changed since {folder} began: start a new run")
    with display:
        sources = task.sources(data, recipe, on, display, Preprocessing.model_validate(facts["preprocessing"]))
    execution = _same_execution(facts["machine"].get("execution", "eager"), on, recipe, resident=task.resident(sources))
    now = {"ranks": 1} | _machine(recipe, on, execution) | runtime.versions()
    before = {"ranks": 1} | facts["machine"] | facts["versions"]
    if changed := [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]:
        display.say(f"note     machine or versions have changed, so the last bits may differ: {', '.join(changed)}")
    return Job(folder, facts, task, recipe, data, sources, on, execution, display)


def make_loop(job: Job[Any, Any, Any]) -> Loop:
    """Make the loop of a run, from its last checkpoint if there is one."""
    saved = ranks.by_first(lambda: checkpoint.find(job.folder / "checkpoints"))
    state = make_state(job, fresh=not saved)
    if saved:
        state.from_checkpoint(checkpoint.load(saved[-1]), str(saved[-1]))
    ranks.wait(ranks.PREPARING)
    ranks.by_first(lambda: job.task.begin(job))  # before DDP is set up, which has a short timeout
    loop = Loop(job, state, make_stepper(job, state))
    ranks.wait(ranks.PREPARING)
    _introduce(job, loop)
    return loop


def make_state(job: Job[Any, Any, Any], *, fresh: bool = True) -> State:
    """The state of a run before its first step. fresh: see Task.model."""
    phases = job.task.phases(job.recipe, len(job.sources.train))
    return State(make_model(job, fresh=fresh), job.recipe, phases, job.task)


def train_job(job: Job[Any, Any, Any]) -> Run:
    """Train a run to its end."""
    with job.display:
        loop = make_loop(job)
    with runtime.stop_on_signals() as stop, runtime.deterministic(job.device), job.display:
        try:
            for _ in loop.steps(stop):
                pass
            return Run(job.folder, job.task.name, finish(loop, stop))
        except Interrupted as stopped:
            raise Interrupted(stopped.number, job.folder) from None


def finish(loop: Loop, stop: runtime.Stop) -> dict[str, Any]:
    """Evaluate, write the model files and result.json, and delete all checkpoints but the last."""
    result = conclude(loop, stop)
    if ranks.first():
        checkpoint.prune(loop.job.folder / "checkpoints", 1)
    return result


def _machine(recipe: Recipe, device: torch.device, execution: str) -> dict[str, Any]:
    """The entry "machine" of recipe.json."""
    machine = runtime.machine(device, pick_precision(recipe.precision, device), execution)
    return machine | {"ranks": ranks.count()} if ranks.count() > 1 else machine


def _same_device(began: str) -> torch.device:
    try:
        return pick_device(began)
    except UserError:  # another machine
        return pick_device()


def _same_execution(began: str, device: torch.device, recipe: Recipe, *, resident: bool) -> str:
    """The execution mode that the run began with, if it is available here."""
    try:
        return pick(recipe, device, resident=resident, mode=began)[0]
    except UserError:
        return pick(recipe, device, resident=resident, mode="auto")[0]


def _introduce(job: Job[Any, Any, Any], loop: Loop) -> None:
    machine, recipe, display = job.facts["machine"], job.recipe, job.display
    for line in job.task.introduce(job):
        display.say(line)
    several = f"{machine['ranks']} ranks, " if "ranks" in machine else ""
    details = f"{several}{machine['device']}, {machine['threads']} threads, {machine['precision']}, {machine['execution']}"
    display.say(f"machine  {machine['processor']} ({details})")
    for line in job.facts["chose"]:
        display.say(f"chose    {line}")
    for section, values in recipe.model_dump(mode="json", exclude_none=True).items():
        text = shown(values) if not isinstance(values, dict) else "  ".join(f"{k}={shown(v)}" for k, v in values.items())
        if text != "":
            display.say(f"{section:<11}{text}")
    step = f", from step {s:,}" if (s := loop.state.progress.step) else ""
    display.say(f"run      {job.folder}, {loop.total:,} steps{step}")
    schedule = recipe.schedule
    if schedule.drops and loop.total <= schedule.drops[0]:
        display.say(f"note     lr never drops: the first of schedule.drops, {schedule.drops[0]:,}, is after the end of the run")
    if job.sources.val is None:
        reason = "too few images per class" if recipe.data.val else "data.val=0"
        last = "" if job.sources.test is not None else "; the final numbers are those of the training images"
        display.say(f"note     no validation set: {reason}{last}")


def _check_warmup(recipe: Recipe, phases: Sequence[Phase]) -> None:
    """Raise UserError if a phase would end before its warm-up does."""
    ends = [phase.end for phase in phases]
    shortest = min(end - begin for begin, end in zip([0, *ends], ends, strict=False))
    if warmup_steps(recipe.schedule, shortest) >= shortest > 1:
        whole = "the run" if len(phases) == 1 else "the shortest phase"
        raise UserError(f"schedule.warmup={recipe.schedule.warmup:g} must be shorter than {whole} ({shortest:,} steps)")


def _absolute(data: str | Path) -> str:
    return data if isinstance(data, str) and data in datasets.NAMES else str(Path(data).expanduser().absolute())


def _refuse_existing(folder: Path) -> None:
    if (folder / "recipe.json").exists():
        raise UserError(f"{folder} already contains a run: resume it with --resume {folder}, or choose another --out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another --out")
    with writing(folder), tempfile.TemporaryFile(dir=next(path for path in folder.absolute().parents if path.exists())):
        pass  # fail before the data is read


def _create(folder: Path, facts: dict[str, Any], held_out: dict[str, list[str]]) -> None:
    """Create the run folder atomically, with its recipe."""
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".run-", dir=folder.parent) as temporary:
            fresh = Path(temporary) / "run"
            fresh.mkdir()
            write_text(fresh / "recipe.json", json.dumps(facts, indent=1, ensure_ascii=False))
            if held_out:
                write_text(fresh / "split.json", json.dumps(held_out, indent=1, ensure_ascii=False))
            fresh.rename(folder)
