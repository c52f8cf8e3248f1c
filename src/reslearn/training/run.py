"""A run folder, from its start or from its last checkpoint, to its end."""

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reslearn import data as datasets
from reslearn.data.preprocess import Preprocessing
from reslearn.data.resident import Resident
from reslearn.data.sets import DataSet
from reslearn.data.splits import divide
from reslearn.device import pick_device, pick_precision
from reslearn.errors import Interrupted, UserError
from reslearn.files import write_text, writing
from reslearn.nets import spec
from reslearn.nets.zoo import OPTIONS
from reslearn.recipes import Recipe, asked_on_bad, resolve, validate
from reslearn.recipes.recipe import Data
from reslearn.training import checkpoint, ranks, runtime
from reslearn.training.board import check_installed
from reslearn.training.display import Display
from reslearn.training.finish import finish, save_augmented_sheet
from reslearn.training.folder import begun, locked, read_facts
from reslearn.training.loop import Loop
from reslearn.training.schedule import warmup_steps
from reslearn.training.setup import Sources, make_model, make_sources, start_from, starting_view
from reslearn.training.state import State
from reslearn.training.stepper import pick
from reslearn.weights.store import load, read_card

SHOWN_BAD = 5  # files that cannot be read, of each split
START_ONLY = (
    "zero_init_last_gamma",
    "last_survival",
    "per_sample",
    "gate_bias",
)  # weights mean the same


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and its result.json."""

    folder: Path
    result: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A run that is to be trained, from its start or its last checkpoint on. facts: what its recipe.json holds."""

    folder: Path
    facts: dict[str, Any]
    data: DataSet
    recipe: Recipe
    sources: Sources
    device: torch.device
    mode: str
    display: Display


def free_name(data: DataSet, net: str, parent: Path = Path("runs")) -> Path:
    """runs/DATA-NET, with a number behind it where that is taken."""
    stem = f"{Path(data.name).name}-{net}"
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
) -> Run:
    """Train a network and write a run folder.

    data: a data set's name, a folder of class folders, or a .csv/.jsonl list. model: a network's name (see `models`). recipe: a
    recipe's name or file. settings: "key=value". out: the run folder, which must be new. device: auto, cpu, cuda or mps.
    init: a model file or run folder to fine-tune: its network, weights and preprocessing; new classes get a new last layer.
    Raises UserError for whatever of these cannot be used, before anything is written; Interrupted after SIGINT or SIGTERM,
    when the run can be resumed.
    """
    with ranks.joined(device):
        if (again := begun(out)) is not None:
            return resume(again, device, quiet)
        jobs: list[Job] = []

        def start() -> tuple[Path, dict[str, Any]]:
            jobs.append(begin(data, model, recipe, settings, seed, out, device, quiet, init))
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
) -> Job:
    """A new run in its folder, with its recipe, not yet trained. The arguments are train's."""
    display = Display(quiet)  # of rank 0, which alone begins runs
    settings = [settings] if isinstance(settings, str) else settings
    runtime.check_versions()
    on = ranks.own_device(pick_device(device))
    if out is not None:
        _refuse_existing(Path(out))
    opened = datasets.open(data, on_bad=asked_on_bad(recipe, settings))
    start = None if init is None else _start(init, model)
    resolved, chose = resolve(opened, recipe, start["name"] if start else model, settings, seed, start)
    view = None
    if resolved.net.init is not None:
        _same_net(resolved)
        view = starting_view(read_card(resolved.net.init), opened, resolved.data)
        chose.append("normalisation: that of the model it starts from")
    if resolved.log.tensorboard:
        check_installed()
    folder = Path(out) if out is not None else free_name(opened, resolved.net.name)
    _check_held_out(opened, settings, resolved)
    ranks.check(resolved)
    splits, made = divide(opened, val=resolved.data.val, test=resolved.data.test, seed=resolved.seed)
    with display:
        sources = make_sources(opened, splits, resolved, on, display.progress, view)
    total = resolved.schedule.total(len(sources.train), resolved.batch.size)
    if warmup_steps(resolved.schedule, total) >= total > 1:
        raise UserError(f"schedule.warmup={resolved.schedule.warmup:g} is no shorter than the run's {total:,} steps")
    mode, note = pick(resolved.step, on, resolved, resident=isinstance(sources.train, Resident))
    facts = {
        "recipe": resolved.model_dump(mode="json"),
        "command": _command(),
        "source": _absolute(data),
        "data": _describe(opened, sources),
        "preprocessing": sources.preprocessing.model_dump(mode="json"),
        "machine": _machine(on, resolved, mode),
        "versions": runtime.versions(),
        "chose": [*chose, *([note] if note else [])],
    }
    if (name := ranks.job()) is not None:
        facts["job"] = name
    _create(folder, facts, made)
    return Job(folder, facts, opened, resolved, sources, on, mode, display)


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


def reopen(folder: Path, facts: dict[str, Any], device: str, quiet: bool) -> Job:
    """A run that has begun, with its data."""
    display = Display(quiet or not ranks.first())
    runtime.check_versions()
    on = ranks.own_device(_same_device(facts["machine"].get("device", "auto")) if device == "auto" else pick_device(device))
    recipe = validate(facts["recipe"], str(folder / "recipe.json"))
    ranks.check(recipe)
    opened = datasets.open(facts["source"], on_bad=recipe.data.on_bad)
    now = {"fingerprint": opened.fingerprint(), "arrangement": opened.arrangement()}
    if any(facts["data"].get(key, value) != value for key, value in now.items()):
        raise UserError(f"the images of {facts['source']} or their names have changed since {folder} began: start a new run")
    splits, _ = divide(opened, val=recipe.data.val, test=recipe.data.test, seed=recipe.seed)
    preprocessing = Preprocessing.model_validate(facts["preprocessing"])
    with display:
        sources = make_sources(opened, splits, recipe, on, display.progress, preprocessing)
    mode = _same_step(facts["machine"].get("step", "eager"), on, recipe, sources)
    here = {"ranks": 1} | _machine(on, recipe, mode) | runtime.versions()
    before = {"ranks": 1} | facts["machine"] | facts["versions"]
    if changed := [f"{key} {before.get(key)} -> {value}" for key, value in here.items() if before.get(key) != value]:
        display.say(f"note     not the machine or versions it began with, so the last bits may differ: {', '.join(changed)}")
    return Job(folder, facts, opened, recipe, sources, on, mode, display)


def make_loop(job: Job) -> Loop:
    """The loop of a run: a fresh network, one that starts from another's weights, or the last checkpoint's."""
    recipe, display = job.recipe, job.display
    model = make_model(recipe, len(job.data.classes), job.sources.preprocessing.channels, job.device)
    saved = ranks.by_first(lambda: checkpoint.found(job.folder / "checkpoints"))
    if recipe.net.init is not None and not saved:  # else the checkpoint has it all
        source = load(recipe.net.init)
        display.say("init     " + start_from(model, read_card(recipe.net.init), source.state_dict(), job.data.classes))
    state = State(model, recipe)
    if saved:
        state.from_checkpoint(checkpoint.load(saved[-1]), str(saved[-1]))
    ranks.wait(ranks.PREPARING)
    loop = Loop(job.folder, recipe, job.sources, state, job.device, job.mode, display)
    _introduce(job.facts, job.folder, loop, display)
    if ranks.first() and not (job.folder / "images" / "augmented.png").exists():
        save_augmented_sheet(job.folder, recipe, job.sources.train)
    ranks.wait(ranks.PREPARING)  # for the sheet: drawing the first picture ever takes a while
    return loop


def train_job(job: Job) -> Run:
    """A run to its end."""
    loop = make_loop(job)
    with runtime.stop_on_signals() as stop, runtime.deterministic(job.device), job.display:
        try:
            for _ in loop.steps(stop):
                pass
            return Run(job.folder, finish(loop, job.data, stop))
        except Interrupted as signal:
            raise Interrupted(signal.number, job.folder) from None


def _machine(device: torch.device, recipe: Recipe, mode: str) -> dict[str, Any]:
    """What trains, and how many of them where it is more than one."""
    machine = runtime.machine(device, pick_precision(recipe.precision, device), mode)
    return machine | {"ranks": ranks.count()} if ranks.count() > 1 else machine


def _same_device(began: str) -> torch.device:
    try:
        return pick_device(began)
    except UserError:  # another machine
        return pick_device()


def _same_step(began: str, device: torch.device, recipe: Recipe, sources: Sources) -> str:
    """How the run's steps go on: as they began, where that can be."""
    resident = isinstance(sources.train, Resident)
    try:
        return pick(began, device, recipe, resident=resident)[0]
    except UserError:
        return pick("auto", device, recipe, resident=resident)[0]


def _start(init: str | Path, model: str | None) -> dict[str, Any]:
    """The net section of a recipe that starts from a model."""
    card = read_card(init)
    if model is not None and model != card.net:
        raise UserError(f"--init {init} is a {card.net}, not a {model}: leave --model out, or make it deeper with reslearn deepen")
    options = {key: value for key, value in card.options.items() if key != "zero_init_last_gamma"}
    return {"name": card.net, **options, "init": str(Path(init).absolute())}


def _check_held_out(data: DataSet, settings: Sequence[str], recipe: Recipe) -> None:
    """Raise UserError where a share is asked for that the data set has decided itself."""
    for name in ("val", "test"):
        decided = name in data.splits or (name == "test" and "all" not in data.splits)
        changed = getattr(recipe.data, name) != Data.model_fields[name].default  # in a recipe file
        if decided and (changed or any(setting.startswith(f"data.{name}=") for setting in settings)):
            has = f"has its own {name} images" if name in data.splits else "is divided already, without test images"
            raise UserError(f"data.{name} does not apply: '{data.name}' {has}; leave it out")


def _same_net(recipe: Recipe) -> None:
    """Raise UserError where --set or a recipe file names another network than the one that the weights are of."""
    card = read_card(recipe.net.init or "")
    if card.net != recipe.net.name:
        raise UserError(f"net.init is a {card.net}, but net.name is {recipe.net.name}: they must be the same")
    for key, value in recipe.net.options().items():
        if key not in START_ONLY and value != card.options.get(key, getattr(spec(card.net), key, OPTIONS[key][0])):
            raise UserError(f"net.init is a {card.net} of another {key} than {value!r}: leave net.{key} out")


def _introduce(facts: dict[str, Any], folder: Path, loop: Loop, display: Display) -> None:
    described, machine, recipe = facts["data"], facts["machine"], loop.recipe
    counts = " + ".join(f"{n:,} {name}" for name, n in described["n"].items())
    height, width = described["sizes"]
    colour = "grey" if described["channels"] == 1 else "colour"
    display.say(f"data     {described['name']}: {len(described['classes'])} classes, {counts} images, {height}x{width} {colour}")
    for reason, n in described["left_out"].items():
        display.say(f"         left out: {n:,} {reason}")
    for name, source in loop.sources.named().items():
        for title, reason in list(source.bad.items())[:SHOWN_BAD]:
            display.say(f"         left out: {name} image {title}: {reason}")
    several = f"{machine['ranks']} ranks, " if "ranks" in machine else ""
    how = f"{several}{machine['device']}, {machine['threads']} threads, {machine['precision']}, {machine['step']} steps"
    display.say(f"machine  {machine['processor']} ({how})")
    for line in facts["chose"]:
        display.say(f"chose    {line}")
    for section, values in recipe.model_dump(mode="json", exclude_none=True).items():
        shown = _plain(values) if not isinstance(values, dict) else "  ".join(f"{k}={_plain(v)}" for k, v in values.items())
        if shown != "":
            display.say(f"{section:<11}{shown}")
    display.say(f"run      {folder}, {loop.total:,} steps" + (f", from step {s:,}" if (s := loop.state.progress.step) else ""))
    schedule = recipe.schedule
    if schedule.drops and loop.total <= schedule.drops[0]:
        display.say(f"note     the lr never drops: schedule.drops begins at step {schedule.drops[0]:,}, after the run's end")
    grow, size = recipe.data.grow, min(loop.sources.preprocessing.size)
    if grow is not None and grow[1] > size:
        display.say(f"note     training views grow to {grow[1]} px, beyond the {size} px of tests: data.grow sets them")
    if loop.sources.val is None:
        display.say("note     no image could be held out: too few a class; the final numbers are of the training images")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _describe(data: DataSet, sources: Sources) -> dict[str, Any]:
    return {
        "name": data.name,
        "classes": list(data.classes),
        "channels": data.channels,
        "sizes": list(data.sizes),
        "n": {name: len(source) for name, source in sources.named().items()},
        "left_out": data.left_out,
        "fingerprint": data.fingerprint(),
        "arrangement": data.arrangement(),
    }


def _command() -> str:
    """The command line that began the run, or that it was Python."""
    from_shell = Path(sys.argv[0]).parent.name == "reslearn" or Path(sys.argv[0]).name == "reslearn"
    return shlex.join(["reslearn", *sys.argv[1:]]) if from_shell else "reslearn.train() in Python"


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
