"""From what the user asks for to one resolved recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from reslearn.data.sets import DataSet
from reslearn.errors import UserError, did_you_mean
from reslearn.nets import spec
from reslearn.recipes.cifar import cifar10_paper
from reslearn.recipes.default import default
from reslearn.recipes.fashion import fashion
from reslearn.recipes.recipe import Recipe, change, read_file, validate

# name -> (data, net or None) -> (values, what it chose and why)
NAMED: dict[str, Callable[[DataSet, str | None], tuple[dict[str, Any], list[str]]]] = {
    "cifar10-paper": cifar10_paper,
    "default": default,
    "fashion": fashion,
}


def resolve(
    data: DataSet,
    recipe: str | Path | None = None,
    net: str | None = None,
    settings: Sequence[str] = (),
    seed: int | None = None,
    start: dict[str, Any] | None = None,
) -> tuple[Recipe, list[str]]:
    """The recipe of a run, and sentences that say what was chosen from the data.

    recipe: a name, or a .toml or .json file, whose `base` (a name) gives what the file leaves out; None takes "fashion" for the
    Fashion-MNIST sets and "default" for all others. settings: `key=value`. start: the net section of a run that
    begins with given weights. Raises UserError naming what is wrong.
    """
    if net is not None:
        spec(net)  # an unknown name is the first thing to hear of
    if recipe is None:
        recipe = "fashion" if data.name.startswith("fashion-") else "default"
    if str(recipe) in NAMED:
        values, chose = NAMED[str(recipe)](data, net)
        where = f"recipe {recipe}"
    else:
        values, chose = _from_file(data, Path(recipe), net)
        where = str(recipe)
    if start is not None:  # the network is the one that the weights are of
        values = {**values, "net": start}
    resolved = change(validate(values, where), settings)
    if seed is not None:
        resolved = validate(resolved.model_dump() | {"seed": seed}, "--seed")
    _check_applies(resolved, data)
    return resolved, chose


def asked_on_bad(recipe: str | Path | None, settings: Sequence[str]) -> Literal["error", "skip"]:
    """data.on_bad as it is asked for: it decides how the data set is opened, which comes before the rest of the recipe."""
    values = {} if recipe is None or str(recipe) in NAMED or not Path(recipe).is_file() else read_file(Path(recipe))
    section = values.get("data")
    asked = section.get("on_bad") if isinstance(section, dict) else None
    for setting in settings:
        key, _, value = setting.partition("=")
        asked = value if key == "data.on_bad" else asked
    return "skip" if asked == "skip" else "error"


def _from_file(data: DataSet, path: Path, net: str | None) -> tuple[dict[str, Any], list[str]]:
    if not path.exists() and path.suffix not in (".toml", ".json"):
        raise UserError(f"no recipe or recipe file called '{path}'{did_you_mean(str(path), NAMED)}")
    values = read_file(path)
    base = values.pop("base", None)
    chose: list[str] = []
    if base is not None:
        if base not in NAMED:
            raise UserError(f"{path}: no base recipe '{base}'{did_you_mean(str(base), NAMED)}")
        given, chose = NAMED[base](data, net)
        values = _merged(given, values)
        values["name"] = path.stem
    if net is not None:
        values["net"] = {**(values.get("net") or {}), "name": net}
    return values, chose


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
        if d.normalise == "pixel-mean":
            raise UserError("data.normalise=pixel-mean applies to small images of one size; use channel")
        if d.size is None:
            raise UserError("data.size is needed for photos: the side, in px, of what the network sees, such as data.size=128")
    elif d.crop_scale is not None or d.cache == "on":
        key = "crop_scale" if d.crop_scale is not None else "cache"
        raise UserError(f"data.{key} applies to photos; '{data.name}' has small images, which stay in memory: use data.pad")
    size = d.size or min(data.sizes)
    if row.stem == "imagenet" and size < 32:
        raise UserError(
            f"{row.name} shrinks its input 32 times: {size} px are too few; use a CIFAR net such as resnet20, or data.size"
        )
