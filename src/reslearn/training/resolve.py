"""Resolves a request and its data to a complete recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.training.recipe import Chosen, Recipe, change, fields, flatten, merge, validate
from reslearn.training.request import TrainRequest
from reslearn.training.task import OpenedData
from reslearn.weights.store import read_card

START_ONLY = ("zero_init_last_gamma", "last_survival", "per_sample", "gate_bias")  # may differ from those of net.init


def resolve(request: TrainRequest, data: Any) -> tuple[Any, list[str]]:
    """Returns the recipe of a run, and notes on the values that were chosen from the data.

    Raises UserError naming the invalid or inapplicable key.
    """
    task, given = request.task, request.given
    usual = task.usual(data)
    recipe = request.recipe or usual
    base = usual if request.recipe is None else request.base
    start = starting_net(request)
    net = start["name"] if start else given.get("net.name")
    chosen = Chosen({}, {}) if base is None else task.choose(base, data, net, given)
    values = merge(chosen.plain(), request.values)
    if request.values and "name" not in request.values and base is not None:
        values["name"] = Path(recipe).stem
    if start is not None:
        values["net"] = {**request.values.get("net", {}), **start}
    elif net is not None:
        values["net"] = {**values.get("net", {}), "name": net}
    where = str(recipe) if request.values else f"recipe {recipe}"
    settings = {key: value for key, value in request.settings.items() if start is None or key not in ("net.name", "net.init")}
    resolved = change(validate(values, task.recipe, where, usual), settings)
    reasons = chosen.reasons
    if resolved.net.init is not None:
        check_same_net(resolved)
        reasons = reasons | {"preprocessing": f"normalization: that of {resolved.net.init}"}
    defaults = {key: field.default for key, field in fields(task.recipe)}  # complete recipes spell them out
    explicit = {key: value for key, value in flatten(request.values).items() if value != defaults.get(key)} | request.settings
    _check_validation(resolved, data, explicit)
    task.check(resolved, data, explicit)
    overridden = {*given, *(["schedule.epochs"] if "schedule.steps" in given else [])}
    return resolved, [line for key, line in reasons.items() if key not in overridden]


def _check_validation(recipe: Recipe, data: OpenedData, explicit: Mapping[str, Any]) -> None:
    """Raise UserError where data.val does not apply, or schedule.shape=plateau has no validation set."""
    if data.has_val and "data.val" in explicit:
        raise UserError(f"data.val does not apply: '{data.name}' has its own val images; leave it out")
    if recipe.schedule.shape == "plateau" and not recipe.data.val and not data.has_val:
        raise UserError("schedule.shape=plateau needs a validation set: set data.val")


def starting_net(request: TrainRequest) -> dict[str, Any] | None:
    """The net section of a recipe that starts from a model, or None without net.init."""
    init, model = request.get("net.init"), request.get("net.name")
    if init is None:
        return None
    path = Path(init).expanduser()
    card = read_card(path)
    if model is not None and model != card.net:
        raise UserError(
            f"--init {init} is a {card.net}, not a {model}: leave out the network name, or use reslearn deepen for a deeper one"
        )
    options = {key: value for key, value in card.options.items() if key != "zero_init_last_gamma"}
    return {"name": card.net, **options, "init": str(path.absolute())}


def check_same_net(recipe: Recipe) -> None:
    """Raise UserError where network options differ from those of the model in net.init."""
    card = read_card(recipe.net.init or "")
    for key, value in recipe.net.options().items():
        if key not in START_ONLY and value != (expected := card.options.get(key, getattr(spec(card.net), key))):
            raise UserError(f"net.{key}={value} does not apply: the {card.net} in net.init has {expected}; leave it out")
