"""From a request and its data to one resolved recipe."""

from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.training.recipe import Chosen, Recipe, change, fields, flatten, merge, validate
from reslearn.training.request import TrainRequest
from reslearn.weights.store import read_card

START_ONLY = ("zero_init_last_gamma", "last_survival", "per_sample", "gate_bias")  # the weights mean the same under others


def resolve(request: TrainRequest, data: Any) -> tuple[Any, list[str]]:
    """The recipe of a run, and sentences on what was chosen from the data. Raises UserError naming what is wrong."""
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
        reasons = reasons | {"preprocessing": "normalization: that of the model it starts from"}
    defaults = {key: field.default for key, field in fields(task.recipe)}  # a complete recipe states them: nothing is asked for
    stated = {key: value for key, value in flatten(request.values).items() if value != defaults.get(key)}
    task.check(resolved, data, stated | request.settings)
    overruled = {*given, *(["schedule.epochs"] if "schedule.steps" in given else [])}
    return resolved, [line for key, line in reasons.items() if key not in overruled]


def starting_net(request: TrainRequest) -> dict[str, Any] | None:
    """The net section of a recipe that starts from a model, or None where it starts at random."""
    init, model = request.get("net.init"), request.get("net.name")
    if init is None:
        return None
    path = Path(init).expanduser()
    card = read_card(path)
    if model is not None and model != card.net:
        raise UserError(
            f"--init {init} is a {card.net}, not a {model}: leave the network's name out, or make it deeper with reslearn deepen"
        )
    options = {key: value for key, value in card.options.items() if key != "zero_init_last_gamma"}
    return {"name": card.net, **options, "init": str(path.absolute())}


def check_same_net(recipe: Recipe) -> None:
    """Raise UserError where options of the recipe's network are not those of the model that net.init holds."""
    card = read_card(recipe.net.init or "")
    for key, value in recipe.net.options().items():
        if key not in START_ONLY and value != card.options.get(key, getattr(spec(card.net), key)):
            raise UserError(f"net.init is a {card.net} of another {key} than {value!r}: leave net.{key} out")
