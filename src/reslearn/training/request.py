"""What is asked of a new run: parsed and checked once, and passed as one value from the command line to the run."""

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


@dataclass(frozen=True)
class TrainRequest:
    """A new run as it was asked for; see `train` for what each argument means.

    base: the named recipe that values come from; None: the task's usual one, or a file or recipe object that is complete.
    values: nested values of a recipe file or object. settings: values by dotted key, on top of those.
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
        """Every value that was asked for, by dotted key, and the named recipe as "base"; what that says is not among them."""
        return ({} if self.base is None else {"base": self.base}) | flatten(self.values) | self.settings

    def get(self, key: str) -> Any:
        """What was asked for under a dotted key, or None."""
        return self.given.get(key)


def parse(
    data: str | Path,
    recipe: str | Path | Recipe | None = None,
    *,
    model: str | None = None,
    settings: Settings = (),
    seed: int | None = None,
    init: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    task: str = "classify",
    quiet: bool = False,
) -> TrainRequest:
    """A request. Raises UserError for unknown tasks, recipes, keys and networks, and for what contradicts itself."""
    kind = tasks.get(task)
    chosen = _settings(settings, kind)
    for option, key, value in (("--model", "net.name", model), ("--seed", "seed", seed), ("--init", "net.init", init)):
        if value is not None:
            if key in chosen:
                raise UserError(f"{option} {value} and --set {key}={shown(chosen[key])}: give one of them")
            chosen[key] = str(value) if isinstance(value, Path) else value
    base, values, name = None, dict[str, Any](), None
    if isinstance(recipe, Recipe):
        if not isinstance(recipe, kind.recipe):
            raise UserError(f"a {type(recipe).__name__} is not a recipe of task '{task}': that takes a {kind.recipe.__name__}")
        name, values = recipe.name, recipe.model_dump(mode="json")
    elif recipe is not None:
        name = str(recipe)
        base, values = (name, {}) if name in kind.named else _file(Path(name), kind)
    folder = None if out is None else Path(out).expanduser()
    request = TrainRequest(kind, data, name, base, values, chosen, folder, device, quiet)
    for key, what in (("net.name", "the network's name"), ("net.init", "the model file or run")):
        if not isinstance(value := request.get(key), str | None):
            where = f"--set {key}={shown(value)}" if key in chosen else name
            raise UserError(f"{where}: {key}: write {what} as text (not {value!r})")
    if (net := request.get("net.name")) is not None:
        spec(net)  # an unknown name is the first thing to hear of
    return request


def _settings(settings: Settings, task: Task[Any, Any, Any]) -> dict[str, Any]:
    """Settings by dotted key. Raises UserError for unknown keys and for two lengths."""
    known = keys(task.recipe)
    chosen: dict[str, Any] = {}
    if isinstance(settings, Mapping):
        pairs = [(str(key), value, f"settings: {key}={value!r}") for key, value in flatten(settings).items()]
    else:
        pairs = []
        for setting in [settings] if isinstance(settings, str) else settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise UserError(f"--set {setting}: write it as key=value, such as --set schedule.epochs=20")
            pairs.append((key.strip(), _value(text), f"--set {setting}"))
    for key, value, where in pairs:
        if key not in known:
            raise UserError(f"{where}: no key '{key}'{did_you_mean(key, known)}")
        chosen[key] = str(value) if isinstance(value, Path) else value
    if len(lengths := [f"--set {key}={shown(chosen[key])}" for key in chosen if key in ("schedule.steps", "schedule.epochs")]) > 1:
        raise UserError(f"{' and '.join(lengths)}: give one of them, the length in steps or in epochs")
    return chosen


def _value(text: str) -> Any:
    """A value as the command line gives it: JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also a number of thousands of digits
        return {"True": True, "False": False, "None": None, "none": "none"}.get(text, text)


def _file(path: Path, task: Task[Any, Any, Any]) -> tuple[str | None, dict[str, Any]]:
    """The base of a recipe file, where it names one, and its other values."""
    path = path.expanduser()
    if not path.exists() and path.suffix not in (".toml", ".json"):
        raise UserError(f"no recipe or recipe file called '{path}'{did_you_mean(str(path), task.named)}")
    values = read_file(path)
    base = values.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in task.named):
        raise UserError(f"{path}: no base recipe '{base}'{did_you_mean(str(base), task.named)}")
    if not isinstance(values.get("net", {}), dict):
        raise UserError(f'{path}: net: write it as a table, such as [net] with name = "resnet20"')
    return base, values
