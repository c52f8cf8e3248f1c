"""From what the user asks for to one resolved recipe."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from reslearn.classify.recipes.cifar import cifar10_paper
from reslearn.classify.recipes.cifar_fast import cifar10_fast
from reslearn.classify.recipes.default import default
from reslearn.classify.recipes.fashion import fashion
from reslearn.classify.recipes.imagenet import imagenet_classic, imagenet_fast, imagenet_paper
from reslearn.data.sets import DataSet
from reslearn.errors import UserError, did_you_mean
from reslearn.nets import create, spec
from reslearn.training.recipe import Chosen, Common, Recipe, change, read_file, validate

# name -> (data, net or None) -> values, and what it chose
NAMED: dict[str, Callable[[DataSet, str | None], Chosen]] = {
    "cifar10-fast": cifar10_fast,
    "cifar10-paper": cifar10_paper,
    "default": default,
    "fashion": fashion,
    "imagenet-classic": imagenet_classic,
    "imagenet-fast": imagenet_fast,
    "imagenet-paper": imagenet_paper,
}


@dataclass(frozen=True)
class Family:
    """The recipes of a task. choose: the values of a named one for (name, data, net, start's net section, what is asked for by
    dotted key). check: raises UserError where a recipe does not go with the data."""

    kind: type[Common]
    names: Collection[str]
    usual: Callable[[Any], str]
    choose: Callable[[str, Any, str | None, dict[str, Any] | None, dict[str, Any]], Chosen]
    check: Callable[[Any, Any], None]


def resolve(
    data: Any,
    recipe: str | Path | None = None,
    net: str | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    start: dict[str, Any] | None = None,
    family: Family | None = None,
) -> tuple[Any, list[str]]:
    """The recipe of a run, and sentences that say what was chosen from the data.

    recipe: a name, or a .toml or .json file, whose `base` (a name) gives what the file leaves out; None takes the family's usual
    one. settings: `key=value`. start: the net section of a run that begins with given weights. family: classification unless
    given. Raises UserError naming what is wrong.
    """
    family = family or CLASSIFICATION
    if recipe is None:
        recipe = family.usual(data)
    file = {} if str(recipe) in family.names else _read(Path(recipe), family.names)
    asked = _flat(file) | {key: value for key, _, value in (setting.partition("=") for setting in settings)}
    net = net or asked.get("net.name")  # what a recipe chooses is chosen for this network
    if net is not None:
        spec(net)  # an unknown name is the first thing to hear of
    base = file.pop("base", None) if file else str(recipe)
    values: dict[str, Any] = {}
    chose: dict[str, str] = {}
    if base is not None:
        values, chose = family.choose(base, data, net, start, asked)
    where = f"recipe {recipe}"
    if file:
        where = str(recipe)
        values = _merged(values, file) | ({"name": Path(recipe).stem} if base is not None else {})
        if net is not None:
            values["net"] = {**values.get("net", {}), "name": net}
    if start is not None:  # the network is the one that the weights are of
        values = {**values, "net": {**file.get("net", {}), **start}}
    resolved = change(validate(values, where, family.kind, family.usual(data)), settings)
    if seed is not None:
        resolved = validate(resolved.model_dump() | {"seed": seed}, "--seed", family.kind)
    family.check(resolved, data)
    overruled = {*asked, *(["schedule.epochs"] if "schedule.steps" in asked else [])}
    return resolved, [line for key, line in chose.items() if key not in overruled]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def asked_on_bad(recipe: str | Path | None, settings: Sequence[str]) -> Literal["error", "skip"]:
    """data.on_bad as it is asked for: it decides how the data set is opened, which comes before the rest of the recipe."""
    return "skip" if asked_for("data.on_bad", recipe, settings) == "skip" else "error"


def asked_for(key: str, recipe: str | Path | None, settings: Sequence[str]) -> Any:
    """What --set or a recipe file says of a key, None where they say nothing: for what must be known before a recipe is made."""
    values = {} if recipe is None or not Path(recipe).is_file() else read_file(Path(recipe))
    asked = _flat(values).get(key)
    for setting in settings:
        name, _, value = setting.partition("=")
        asked = value if name == key else asked
    return asked


def _read(path: Path, names: Collection[str]) -> dict[str, Any]:
    """A recipe file's values, with a known `base` or none."""
    if not path.exists() and path.suffix not in (".toml", ".json"):
        raise UserError(f"no recipe or recipe file called '{path}'{did_you_mean(str(path), names)}")
    values = read_file(path)
    base = values.get("base")
    if base is not None and (not isinstance(base, str) or base not in names):
        raise UserError(f"{path}: no base recipe '{base}'{did_you_mean(str(base), names)}")
    if not isinstance(values.get("net", {}), dict):
        raise UserError(f'{path}: net: write it as a table, such as [net] with name = "resnet20"')
    return values


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested values of `over` on top of those of `base`; schedule.steps and schedule.epochs replace each other."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
        if both and key == "schedule" and len({"steps", "epochs"} & set(value)) == 1:
            merged[key].pop("epochs" if "steps" in value else "steps", None)
    return merged


def _check_applies(recipe: Recipe, data: DataSet) -> None:
    """An option that does not apply to the data is an error, never ignored."""
    d, row = recipe.data, spec(recipe.net.name)
    small_only = "applies to small images of one size, which stay in memory; these are photos: use data.crop_scale"
    if not data.resident:
        if d.pad:
            raise UserError(f"data.pad={d.pad} {small_only}")
        if d.size is None:
            raise UserError("data.size is needed for photos: the side, in px, of what the network sees, such as data.size=128")
    elif key := next((key for key in ("crop_scale", "jitter", "color") if getattr(d, key) is not None), None) or (
        "cache" if d.cache == "on" else None
    ):
        raise UserError(f"data.{key} applies to photos; '{data.name}' has small images, which stay in memory: use data.pad")
    if d.color is not None and data.channels != 3:
        raise UserError(f"data.color applies to color photos; those of '{data.name}' are gray")
    if recipe.schedule.shape == "plateau" and not d.val and "val" not in data.splits:
        raise UserError("schedule.shape=plateau watches the error on held-out images: give some with data.val")
    if row.build is not None:
        _check_takes(recipe, data)
    size = d.size or min(data.sizes)
    if row.stem == "imagenet" and size < 32:
        raise UserError(
            f"{row.name} shrinks its input 32 times: {size} px are too few; use a CIFAR net such as resnet20, or data.size"
        )


def _check_takes(recipe: Recipe, data: DataSet) -> None:
    """Raise UserError where a baseline's layers shrink the images to nothing."""
    height, width = (recipe.data.size,) * 2 if recipe.data.size else data.sizes
    with torch.device("meta"):
        net = create(recipe.net.name, len(data.classes), data.channels).eval()
        try:
            net(torch.zeros(1, data.channels, height, width))
        except RuntimeError as error:
            raise UserError(
                f"{recipe.net.name} cannot take images of {height}x{width} px: use larger ones, or data.size"
            ) from error


CLASSIFICATION = Family(
    Recipe,
    NAMED,
    usual=lambda data: "fashion" if data.name.startswith("fashion-") else "default",
    choose=lambda name, data, net, start, asked: NAMED[name](data, net),
    check=_check_applies,
)
