"""The request for a new run: parsed and validated once, then passed as one value from the command line to the run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reslearn import tasks
from reslearn.errors import UserError, did_you_mean
from reslearn.nets import spec
from reslearn.training.recipe import Recipe, flatten, keys, read_file, shown
from reslearn.training.task import Task

Settings = Mapping[str, Any] | Sequence[str] | str
SHORTHANDS = {
    "model": "net.name",
    "epochs": "schedule.epochs",
    "size": "data.size",
    "batch": "batch.size",
    "lr": "schedule.lr",
    "seed": "seed",
    "init": "net.init",
}
"""Arguments of `train` for recipe keys, by name."""


@dataclass(frozen=True)
class TrainRequest:
    """The request for a new run; see `train` for the arguments.

    base: the named recipe to start from; None for the task's usual one, or for a complete recipe file or object.
    values: nested values of a recipe file or object. settings: values by dotted key; they override the others.
    """

    task: Task[Any, Any, Any]
    data: str | Path
    recipe: str | None
    base: str | None
    values: dict[str, Any]
    settings: dict[str, Any]
    out: Path | None
    device: str
    quiet: bool

    @property
    def given(self) -> dict[str, Any]:
        """Every requested value by dotted key, and the named recipe as "base". The values of that recipe are not included."""
        return ({} if self.base is None else {"base": self.base}) | flatten(self.values) | self.settings

    def get(self, key: str) -> Any:
        """The requested value of a dotted key, or None."""
        return self.given.get(key)


def parse(
    data: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    model: str | None = None,
    settings: Settings = (),
    epochs: float | None = None,
    size: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    init: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    task: str = "classify",
    quiet: bool = False,
) -> TrainRequest:
    """Returns a request. Raises UserError for unknown tasks, recipes, keys and networks, and for contradictions."""
    kind = tasks.get(task)
    parsed = _settings(settings, kind)
    values_by_option = {"model": model, "epochs": epochs, "size": size, "batch": batch, "lr": lr, "seed": seed, "init": init}
    for option, value in values_by_option.items():
        if value is not None:
            key = SHORTHANDS[option]
            if key not in keys(kind.recipe):
                raise UserError(f"--{option} does not apply to task '{task}', whose recipes have no key '{key}'")
            if key in parsed:
                raise UserError(f"--{option} {value} and --set {key}={shown(parsed[key])}: give only one of them")
            if key == "schedule.epochs" and "schedule.steps" in parsed:
                raise UserError(
                    f"--epochs {value:g} and --set schedule.steps={shown(parsed['schedule.steps'])}: give only one of them"
                )
            parsed[key] = str(value) if isinstance(value, Path) else value
    base, values, name = None, dict[str, Any](), None
    if isinstance(recipe, Recipe):
        if not isinstance(recipe, kind.recipe):
            raise UserError(f"task '{task}' needs a {kind.recipe.__name__}, not a {type(recipe).__name__}")
        name, values = recipe.name, recipe.model_dump(mode="json")
    elif recipe is not None:
        name = str(recipe)
        base, values = (name, {}) if name in kind.named else _file(Path(name), kind)
    folder = None if out is None else Path(out).expanduser()
    request = TrainRequest(kind, data, name, base, values, parsed, folder, device, quiet)
    for key in ("net.name", "net.init"):
        if not isinstance(value := request.get(key), str | None):
            where = f"--set {key}={shown(value)}" if key in parsed else name
            raise UserError(f"{where}: {key}: must be a string (not {value!r})")
    if (net := request.get("net.name")) is not None:
        spec(net)  # report an unknown name before anything else
    return request


def _settings(settings: Settings, task: Task[Any, Any, Any]) -> dict[str, Any]:
    """Parses settings, by dotted key. Raises UserError for unknown keys and for two lengths."""
    known = keys(task.recipe)
    parsed: dict[str, Any] = {}
    if isinstance(settings, Mapping):
        pairs = [(str(key), value, f"settings: {key}={value!r}") for key, value in flatten(settings).items()]
    else:
        pairs = []
        for setting in [settings] if isinstance(settings, str) else settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise UserError(f"--set {setting}: must have the form key=value, such as --set schedule.epochs=20")
            pairs.append((key.strip(), _value(text), f"--set {setting}"))
    for key, value, where in pairs:
        if key not in known:
            raise UserError(f"{where}: no key '{key}'{did_you_mean(key, known)}")
        parsed[key] = str(value) if isinstance(value, Path) else value
    if len(lengths := [f"--set {key}={shown(parsed[key])}" for key in parsed if key in ("schedule.steps", "schedule.epochs")]) > 1:
        raise UserError(f"{' and '.join(lengths)}: give only one of them")
    return parsed


def _value(text: str) -> Any:
    """Parses a command-line value as JSON if it is valid, otherwise as text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError also for integers of thousands of digits
        return {"True": True, "False": False, "None": None}.get(text, text)


def _file(path: Path, task: Task[Any, Any, Any]) -> tuple[str | None, dict[str, Any]]:
    """The base of a recipe file, or None, and its other values."""
    path = path.expanduser()
    if not path.exists() and path.suffix not in (".toml", ".json"):
        raise UserError(f"no recipe or recipe file called '{path}'{did_you_mean(str(path), task.named)}")
    values = read_file(path)
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in task.named):
        raise UserError(f"{path}: no base recipe '{base}'{did_you_mean(str(base), task.named)}")
    if not isinstance(values.get("net", {}), dict):
        raise UserError(f'{path}: net: must be a table, such as [net] with name = "resnet20"')
    return base, values
