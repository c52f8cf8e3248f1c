"""Classifying images: what a run of it is made of. The functions are those of a Task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reslearn import data as datasets
from reslearn.classify import finish as classifiers
from reslearn.classify.sources import Sources, make_model, make_sources, start_from, starting_view
from reslearn.data.boxes.read import boxes_alone
from reslearn.data.images.resident import Resident
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import DataSet
from reslearn.data.splits import divide
from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.training import ranks, runtime
from reslearn.training.display import Display
from reslearn.training.loop import Loop
from reslearn.training.recipe import Data, Recipe, validate
from reslearn.training.resolve import asked_on_bad, resolve
from reslearn.training.state import State
from reslearn.training.task import Asked, Job, Ready
from reslearn.weights.store import load, read_card

SHOWN_BAD = 5  # files that cannot be read, of each split
START_ONLY = (
    "zero_init_last_gamma",
    "last_survival",
    "per_sample",
    "gate_bias",
)  # weights mean the same


def begin(asked: Asked, device: torch.device, display: Display) -> tuple[Ready, list[str], dict[str, list[str]], dict[str, Any]]:
    if asked.data not in datasets.NAMES and boxes_alone(asked.data):
        raise UserError(f"{asked.data} is a set with boxes: reslearn detect train {asked.data} trains a detector on it")
    opened = datasets.open(asked.data, on_bad=asked_on_bad(asked.recipe, asked.settings))
    start = None if asked.init is None else start_of(asked.init, asked.model)
    net = start["name"] if start else asked.model
    recipe, chose = resolve(opened, asked.recipe, net, asked.settings, asked.seed, start)
    view = None
    if recipe.net.init is not None:
        same_net(recipe)
        view = starting_view(read_card(recipe.net.init), opened, recipe.data)
        chose.append("normalization: that of the model it starts from")
    _check_held_out(opened, asked.settings, recipe)
    ranks.check(recipe)
    splits, made = divide(opened, val=recipe.data.val, test=recipe.data.test, seed=recipe.seed)
    with display:
        sources = make_sources(opened, splits, recipe, device, display.progress, view)
    facts = {"data": _describe(opened, sources), "preprocessing": sources.preprocessing.model_dump(mode="json")}
    return Ready(opened, recipe, sources), chose, made, facts


def reopen(folder: Path, facts: dict[str, Any], device: torch.device, display: Display) -> Ready:
    recipe = validate(facts["recipe"], str(folder / "recipe.json"))
    ranks.check(recipe)
    opened = datasets.open(facts["source"], on_bad=recipe.data.on_bad)
    now = {"fingerprint": opened.fingerprint(), "arrangement": opened.arrangement()}
    if any(facts["data"].get(key, value) != value for key, value in now.items()):
        raise UserError(f"the images of {facts['source']} or their names have changed since {folder} began: start a new run")
    splits, _ = divide(opened, val=recipe.data.val, test=recipe.data.test, seed=recipe.seed)
    with display:
        view = Preprocessing.model_validate(facts["preprocessing"])
        return Ready(opened, recipe, make_sources(opened, splits, recipe, device, display.progress, view))


def resident(ready: Ready) -> bool:
    return isinstance(ready.sources.train, Resident)


def network(job: Job, *, fresh: bool) -> nn.Module:
    data, recipe = job.ready.data, job.ready.recipe
    model = make_model(recipe, len(data.classes), job.ready.sources.preprocessing.channels, job.device)
    if recipe.net.init is not None and fresh:
        source = load(recipe.net.init)
        job.display.say("init     " + start_from(model, read_card(recipe.net.init), source.state_dict(), data.classes))
    return model


def make_state(job: Job, network: nn.Module) -> State:
    return State(network, job.ready.recipe)


def make_loop(job: Job, state: State) -> Loop:
    recipe, sources = job.ready.recipe, job.ready.sources
    if ranks.first() and not (job.folder / "images" / "augmented.png").exists():
        classifiers.save_augmented_sheet(job.folder, recipe, sources.train)
    return Loop(job.folder, recipe, sources, state, job.device, job.mode, job.display)


def introduce(job: Job) -> list[str]:
    described, sources = job.facts["data"], job.ready.sources
    counts = " + ".join(f"{n:,} {name}" for name, n in described["n"].items())
    height, width = described["sizes"]
    color = "gray" if described["channels"] == 1 else "color"
    lines = [f"data     {described['name']}: {len(described['classes'])} classes, {counts} images, {height}x{width} {color}"]
    lines += [f"         left out: {n:,} {reason}" for reason, n in described["left_out"].items()]
    for name, source in sources.named().items():
        bad = list(source.bad.items())[:SHOWN_BAD]
        lines += [f"         left out: {name} image {title}: {reason}" for title, reason in bad]
    grow, size = job.ready.recipe.data.grow, min(sources.preprocessing.size)
    if grow is not None and grow[1] > size:
        lines.append(f"note     training views grow to {grow[1]} px, beyond the {size} px of tests: data.grow sets them")
    return lines


def finish(job: Job, loop: Loop, stop: runtime.Stop) -> dict[str, Any]:
    return classifiers.finish(loop, job.ready.data, stop)


def start_of(init: str | Path, model: str | None) -> dict[str, Any]:
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


def same_net(recipe: Recipe) -> None:
    """Raise UserError where --set or a recipe file names another network than the one that the weights are of."""
    card = read_card(recipe.net.init or "")
    if card.net != recipe.net.name:
        raise UserError(f"net.init is a {card.net}, but net.name is {recipe.net.name}: they must be the same")
    for key, value in recipe.net.options().items():
        if key not in START_ONLY and value != card.options.get(key, getattr(spec(card.net), key)):
            raise UserError(f"net.init is a {card.net} of another {key} than {value!r}: leave net.{key} out")


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
