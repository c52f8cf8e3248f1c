"""What the pages of all kinds of runs share: the words for numbers, the rows of a recipe, notices, pictures."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reslearn.report.runs import AnyRun

SPLITS = {"val": "held-out", "test": "test"}


def render(template: str, **values: Any) -> str:
    """A template of this folder, filled in; every string of the user's is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count, "duration": duration, "text": text}
    return environment.get_template(template).render(**values)


def percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}%"


def count(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """`"2 h 13 min"`, `"3 min 20 s"` or `"12.3 s"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def text(value: Any) -> str:
    """A value of a JSON file as a reader wants it: strings bare, numbers and the rest as JSON has them."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        shown = ", ".join(text(item) for item in value[:12])
        return f"{shown}, and {len(value) - 12:,} more" if len(value) > 12 else shown or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipe_rows(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`[{"key": "net.name", "values": [one text a recipe], "differs": bool}]`, None for a key that a recipe lacks."""
    flat = [dict(_flat(recipe)) for recipe in recipes]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [(key, [one.get(key) for one in flat]) for key in keys]
    return [{"key": key, "values": values, "differs": len(set(values)) > 1} for key, values in rows]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", text(value)))
    return rows


def notices(runs: Sequence[AnyRun]) -> list[str]:
    says = []
    for run in runs:
        if run.result is None:
            which = f"{run.label} has" if len(runs) > 1 else "This run has"
            so_far = f"it has logged {run.step:,} iterations so far" if run.step else "nothing was measured yet"
            says.append(f"{which} not finished: {so_far}.")
    if not same_data(runs):
        says.append("These runs do not share their data: their results cannot be compared with one another.")
    return says


def same_data(runs: Sequence[AnyRun]) -> bool:
    return len({(run.setup.data.name, run.setup.data.fingerprint) for run in runs}) == 1


def over_seeds(runs: Sequence[AnyRun], split: str, measured: Mapping[str, Sequence[float | None]], digits: int) -> str:
    """A sentence: the mean and deviation over the runs of what was measured (percent, a value a run) on a split; "" where more
    than seeds differs. What a run could not measure is left out."""
    changed = {row["key"] for row in recipe_rows([run.setup.recipe for run in runs]) if row["differs"]}
    whole = {name: [value for value in values if value is not None] for name, values in measured.items() if None not in values}
    if "seed" not in changed or not changed <= {"seed", "name"} or not same_data(runs) or not whole:
        return ""
    said = ", ".join(f"{name} is {mean(each):.{digits}f} ± {stdev(each):.{digits}f}%" for name, each in whole.items())
    return f" Over {len(runs)} seeds of one recipe the {split} {said} (mean ± standard deviation)."


def net_name(run: AnyRun) -> str:
    net = run.setup.recipe.get("net", {})
    return text(net.get("name", "a network")) if isinstance(net, Mapping) else text(net)


def trained(run: AnyRun, what: str, classes: str) -> str:
    """A sentence: what was trained, on how many images and classes (in words, "" where it is not known), for how long."""
    data, result = run.setup.data, run.result
    parameters = f" ({result.parameters:,} parameters)" if result and result.parameters else ""
    images = f"{data.n['train']:,} images" if "train" in data.n else "images"
    epochs = f" ({run.epoch:,.1f} epochs)" if math.isfinite(run.epoch) else ""
    done = f", for {run.step:,} iterations{epochs}" if run.step else ""
    return f"{what}{net_name(run)}{parameters}, trained on {images}{classes} from {data.name}{done}."


def cost(run: AnyRun) -> str:
    """A sentence: what training took; "" for a run that has not finished."""
    result, machine = run.result, run.setup.machine
    if result is None:
        return ""
    device = f" on {text(machine['device'])}" if "device" in machine else ""
    speed = f", at {result.images_per_s:,.0f} images/s" if result.images_per_s else ""
    memory = f", with at most {result.peak_memory_mb:,.0f} MB of memory" if result.peak_memory_mb else ""
    return f" Training took {duration(result.seconds)}{device}{speed}{memory}."


def picture(folder: Path, name: str) -> dict[str, Any] | None:
    """A picture of the run folder as a data URI; None where it is missing, or is anything but a PNG or JPEG inside."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    # The width tells the page whether to enlarge: the pixels of a 32 x 32 image should look like pixels.
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, width = "png", int.from_bytes(content[16:20], "big")
    elif content.startswith(b"\xff\xd8\xff"):
        kind, width = "jpeg", 1000
    else:
        return None
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(content).decode()}", "width": width}
