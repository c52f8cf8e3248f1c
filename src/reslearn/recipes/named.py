"""From what the user asks for to one resolved recipe."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from reslearn.data.sets import DataSet
from reslearn.errors import UserError, did_you_mean
from reslearn.nets import create, spec
from reslearn.recipes.cifar import cifar10_paper
from reslearn.recipes.cifar_fast import cifar10_fast
from reslearn.recipes.default import default
from reslearn.recipes.fashion import fashion
from reslearn.recipes.imagenet import imagenet_classic, imagenet_fast, imagenet_paper
from reslearn.recipes.recipe import Recipe, change, read_file, validate

# name -> (data, net or None) -> (values, what it chose and why)
NAMED: dict[str, Callable[[DataSet, str | None], tuple[dict[str, Any], list[str]]]] = {
    "cifar10-fast": cifar10_fast,
    "cifar10-paper": cifar10_paper,
    "default": default,
    "fashion": fashion,
    "imagenet-classic": imagenet_classic,
    "imagenet-fast": imagenet_fast,
    "imagenet-paper": imagenet_paper,
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
    if recipe is None:
        recipe = "fashion" if data.name.startswith("fashion-") else "default"
    file = {} if str(recipe) in NAMED else _read(Path(recipe))
    net = net or _set_net(settings) or file.get("net", {}).get("name")  # what a recipe chooses is chosen for this network
    if net is not None:
        spec(net)  # an unknown name is the first thing to hear of
    base = file.pop("base", None) if file else str(recipe)
    values: dict[str, Any] = {}
    chose: list[str] = []
    if base is not None:
        values, chose = NAMED[base](data, net)
    where = f"recipe {recipe}"
    if file:
        where = str(recipe)
        values = _merged(values, file) | ({"name": Path(recipe).stem} if base is not None else {})
        if net is not None:
            values["net"] = {**values.get("net", {}), "name": net}
    if start is not None:  # the network is the one that the weights are of
        values = {**values, "net": {**file.get("net", {}), **start}}
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


def _set_net(settings: Sequence[str]) -> str | None:
    """The network that --set net.name=... names, the last of them."""
    names = [setting.removeprefix("net.name=") for setting in settings if setting.startswith("net.name=")]
    return names[-1] if names else None


def _read(path: Path) -> dict[str, Any]:
    """A recipe file's values, with a known `base` or none."""
    if not path.exists() and path.suffix not in (".toml", ".json"):
        raise UserError(f"no recipe or recipe file called '{path}'{did_you_mean(str(path), NAMED)}")
    values = read_file(path)
    base = values.get("base")
    if base is not None and (not isinstance(base, str) or base not in NAMED):
        raise UserError(f"{path}: no base recipe '{base}'{did_you_mean(str(base), NAMED)}")
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
    elif key := next((key for key in ("crop_scale", "jitter", "colour") if getattr(d, key) is not None), None) or (
        "cache" if d.cache == "on" else None
    ):
        raise UserError(f"data.{key} applies to photos; '{data.name}' has small images, which stay in memory: use data.pad")
    if d.colour is not None and data.channels != 3:
        raise UserError(f"data.colour applies to colour photos; those of '{data.name}' are grey")
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
