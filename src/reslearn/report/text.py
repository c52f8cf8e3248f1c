"""Formatted values and sentences shared by all pages."""

import json
import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from reslearn.report.runs import RunRecord

AnyRecord = RunRecord[Any]
Interval = tuple[float, float] | None
Tile = tuple[str, str, str]
"""Name, value, note."""


def number(value: float | None, digits: int = 0, unit: str = "") -> str:
    """Formats as `"43.8"` or `"8,000"`; an en dash for None, NaN and infinity."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}{unit}"


def percent(value: float | None, digits: int = 2) -> str:
    return number(value, digits, "%")


def spread(interval: Interval, digits: int = 2, unit: str = "%") -> str:
    """`"7.45 to 9.92%"`; "" for None."""
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}{unit}" if interval else ""


def detailed(value: str, interval: Interval, digits: int = 2, *more: str) -> str:
    """`"8.67% (95% interval 7.45 to 9.92%; 153 images)"`."""
    details = [f"95% interval {spread(interval, digits)}" if interval else "", *more]
    shown = "; ".join(detail for detail in details if detail)
    return f"{value} ({shown})" if shown else value


def tile(name: str, value: str, interval: Interval, digits: int = 2) -> Tile:
    return name, value, f"{spread(interval, digits)} (95%)" if interval else ""


def speed(images_per_s: float | None) -> str:
    """`"4,321 images/s"`, `"9.6 images/s"`; "" for None."""
    return number(images_per_s, 0 if images_per_s >= 100 else 1, " images/s") if images_per_s else ""


def duration(seconds: float) -> str:
    """`"2 h 13 min"`, `"3 min 20 s"` or `"12.3 s"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def text(value: Any) -> str:
    """Formats a JSON value: strings without quotes, lists of more than 12 items shortened, the rest as in JSON."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        items = ", ".join(text(item) for item in value[:12])
        return f"{items}, and {len(value) - 12:,} more" if len(value) > 12 else items or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_rows(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Returns `{"net.name": [formatted value per recipe]}`, None where a recipe lacks the key."""
    flat = [_flat(recipe) for recipe in recipes]
    return {key: [recipe.get(key) for recipe in flat] for key in dict.fromkeys(key for recipe in flat for key in recipe)}


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    rows = {}
    for key, value in recipe.items():
        nested = isinstance(value, Mapping) and value
        rows |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": text(value)}
    return rows


def net_name(run: AnyRecord) -> str:
    net = run.facts.recipe.get("net", {})
    return text(net.get("name") or "a network") if isinstance(net, Mapping) else text(net)


def notices(runs: Sequence[AnyRecord]) -> list[str]:
    """Warnings at the top of the page: unfinished runs, and runs on different data."""
    sentences = []
    for run in runs:
        if run.result is None:
            progress = f"{run.step:,} iterations so far" if run.step else "no measurements yet"
            sentences.append(f"{run.label if len(runs) > 1 else 'This run'} has not finished: {progress}.")
    if not same_data(runs):
        sentences.append("These runs were trained on different data, so their results cannot be compared.")
    return sentences


def same_data(runs: Sequence[AnyRecord]) -> bool:
    return len({(run.facts.data.name, run.facts.data.fingerprint) for run in runs}) == 1


def over_seeds(runs: Sequence[AnyRecord], split: str, measures: Sequence[Mapping[str, float | None]], digits: int) -> str:
    """A sentence with the mean and standard deviation of each metric over runs that differ only in their seed; otherwise "".

    measures: one mapping per run, in percent. Metrics that a run lacks are omitted.
    """
    changed = {key for key, values in recipe_rows([run.facts.recipe for run in runs]).items() if len(set(values)) > 1}
    columns = {name: [values.get(name) for values in measures] for name in measures[0]}
    complete = {name: values for name in columns if len(values := [v for v in columns[name] if v is not None]) == len(runs)}
    if "seed" not in changed or not changed <= {"seed", "name"} or not complete:
        return ""
    means = ", ".join(f"{name} is {mean(values):.{digits}f} ± {stdev(values):.{digits}f}%" for name, values in complete.items())
    return f" Over {len(runs)} seeds of one recipe, the {split} {means} (mean ± standard deviation)."


def trained(run: AnyRecord, subject: str) -> str:
    """A sentence with the model, its training data and the length of training."""
    data, result = run.facts.data, run.result
    parameters = f" ({result.parameters:,} parameters)" if result and result.parameters else ""
    images = f"{data.n['train']:,} images" if "train" in data.n else "images"
    classes = f" of {n:,} class{'es' * (n != 1)}" if (n := len(data.classes)) else ""
    epochs = f" ({run.epoch:,.1f} epochs)" if math.isfinite(run.epoch) else ""
    length = f", for {run.step:,} iterations{epochs}" if run.step else ""
    init = run.facts.recipe.get("net", {}).get("init")
    start = f" It started from the weights of {text(init)}." if init else ""
    return f"{subject}{net_name(run)}{parameters}, trained on {images}{classes} from {data.name}{length}.{start}"


def cost(run: AnyRecord) -> str:
    """A sentence with the time and memory of training; "" for an unfinished run."""
    result, machine = run.result, run.facts.machine
    if result is None:
        return ""
    device = f" on {text(machine['device']).replace('cpu', 'CPU')}" if "device" in machine else ""
    rate = f", at {speed(result.images_per_s)}" if result.images_per_s else ""
    memory = f", with a peak memory of {result.peak_memory_mb:,.0f} MB" if result.peak_memory_mb else ""
    return f" Training took {duration(result.seconds)}{device}{rate}{memory}."
