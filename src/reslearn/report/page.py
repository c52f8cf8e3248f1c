"""Run folders to one HTML page that stands alone: no script, nothing loaded, readable light, dark and printed."""

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reslearn.errors import UserError
from reslearn.report import analyses, plots
from reslearn.report.runs import Metrics, Run, Snapshot, most_confused, read

GRID_CLASSES = 60  # more rows of a confusion matrix than this cannot be told apart on a screen
SPLITS = {"val": "held-out", "test": "test"}


def write(runs: Sequence[Path], target: Path) -> Path:
    """Writes the report of one run, or the comparison of several, and returns `target`.

    runs: run folders, finished or not; their order is that of the tables and colours.
    target: the HTML file; its folder is made, and a reader sees the old page or the new one, never a half.

    Raises:
        UserError: a run folder is missing, given twice or broken, or the page cannot be written.
    """
    target = Path(target)
    page = _page(read(runs))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target}: the report cannot be written: {error.strerror}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return target


def _page(runs: list[Run]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count, "duration": duration, "text": text}
    several = len(runs) > 1
    return environment.get_template("page.html.j2").render(
        title=f"{len(runs)} runs compared" if several else runs[0].label,
        summary=_compared(runs) if several else _summary(runs[0]),
        notices=_notices(runs),
        runs=[_view(run, i) for i, run in enumerate(runs)],
        curves=Markup(plots.curves(runs)),
        splits=sorted({SPLITS.get(run.held_out_split, run.held_out_split) for run in runs}),
        recipe=recipe_rows([run.setup.recipe for run in runs]),
        colours=plots.COLOURS,
    )


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


def _notices(runs: list[Run]) -> list[str]:
    notices = []
    for run in runs:
        if run.result is None:
            which = f"{run.label} has" if len(runs) > 1 else "This run has"
            so_far = f"it has logged {run.step:,} iterations so far" if run.step else "nothing was measured yet"
            notices.append(f"{which} not finished: {so_far}.")
    if not _same_data(runs):
        notices.append("These runs do not share their data: their errors cannot be compared with one another.")
    return notices


def _same_data(runs: Sequence[Run]) -> bool:
    return len({(run.setup.data.name, run.setup.data.fingerprint) for run in runs}) == 1


def _measured(snapshot: Snapshot | None) -> tuple[str, Metrics] | None:
    """The split to judge by, in words, and its numbers: the test set where there is one."""
    if snapshot and snapshot.test:
        return "test", snapshot.test
    if snapshot and snapshot.val:
        return "held-out", snapshot.val
    return None


def _spread(metrics: Metrics) -> str:
    return "" if metrics.top1_interval is None else "{:.2f} to {:.2f}%".format(*metrics.top1_interval)


def _summary(run: Run) -> str:
    """One paragraph: what was trained, on what, how well it does, at what cost."""
    data, result = run.setup.data, run.result
    parameters = f" ({result.parameters:,} parameters)" if result and result.parameters else ""
    images = f"{data.n['train']:,} images" if "train" in data.n else "images"
    classes = f" of {len(data.classes):,} classes" if data.classes else ""
    epochs = f" ({run.epoch:,.1f} epochs)" if math.isfinite(run.epoch) else ""
    done = f", for {run.step:,} iterations{epochs}" if run.step else ""
    says = f"{_net(run)}{parameters}, trained on {images}{classes} from {data.name}{done}."
    if result is None:
        return says
    if last := _measured(result.last):
        split, metrics = last
        interval = f" (95% interval {_spread(metrics)})" if _spread(metrics) else ""
        says += f" After the last iteration it errs on {percent(metrics.top1_error)} of the {metrics.n:,}"
        says += f" {split} images{interval}."
    if result.best and (best := _measured(result.best)):
        says += f" At iteration {result.best.step:,}, where the held-out error was lowest, it errs on"
        says += f" {percent(best[1].top1_error)} of the {best[0]} images."
    device = f" on {text(run.setup.machine['device'])}" if "device" in run.setup.machine else ""
    speed = f", at {result.images_per_s:,.0f} images/s" if result.images_per_s else ""
    memory = f", with at most {result.peak_memory_mb:,.0f} MB of memory" if result.peak_memory_mb else ""
    return says + f" Training took {duration(result.seconds)}{device}{speed}{memory}."


def _compared(runs: list[Run]) -> str:
    """One paragraph: which of the runs did best, and how far seeds alone move it where only they differ."""
    done = [(run, *found) for run in runs if run.result and (found := _measured(run.result.last))]
    says = f"{len(runs)} runs, {sum(run.result is not None for run in runs)} of them finished."
    if not done or len({split for _, split, _ in done}) > 1:
        return says
    run, split, metrics = min(done, key=lambda one: one[2].top1_error)
    interval = f" (95% interval {_spread(metrics)})" if _spread(metrics) else ""
    says += f" After the last iteration the lowest {split} error, {percent(metrics.top1_error)}{interval},"
    says += f" is that of {run.label}."
    changed = {row["key"] for row in recipe_rows([run.setup.recipe for run, _, _ in done]) if row["differs"]}
    if len(done) > 1 and "seed" in changed and changed <= {"seed", "name"} and _same_data([run for run, _, _ in done]):
        errors = [metrics.top1_error for _, _, metrics in done]
        says += f" Over {len(done)} seeds of one recipe the {split} error is {mean(errors):.2f} ± {stdev(errors):.2f}%"
        says += " (mean ± standard deviation)."
    return says


def _net(run: Run) -> str:
    net = run.setup.recipe.get("net", {})
    return text(net.get("name", "a network")) if isinstance(net, Mapping) else text(net)


def _view(run: Run, index: int) -> dict[str, Any]:
    """What the template shows of one run; every string in it is still to be escaped."""
    result = run.result
    measured = _measured(result.last) if result else None
    metrics = measured[1] if measured else None
    worst = [(image, _picture(run.folder, image.image)) for image in result.worst] if result else []
    return {
        "label": run.label,
        "colour": index % plots.COLOURS,
        "net": _net(run),
        "summary": _summary(run),
        "setup": run.setup,
        "result": result,
        "step": run.step,
        "epoch": run.epoch,
        "latest": [
            ("training error", _latest(run.train.error)),
            (f"{SPLITS.get(run.held_out_split, run.held_out_split)} error", _latest(run.held_out.error)),
        ],
        "split": measured[0] if measured else "",
        "worst_split": SPLITS.get(result.worst_split, result.worst_split) if result else "",
        "spread": _spread,
        "metrics": metrics,
        "classes": sorted(metrics.per_class, key=lambda one: math.inf if one.accuracy is None else one.accuracy) if metrics else [],
        "grid": _grid(metrics) if metrics and len(metrics.confusion) <= GRID_CLASSES else [],
        "confused": most_confused(metrics.confusion, [one.name for one in metrics.per_class])
        if metrics and metrics.confusion
        else [],
        "reliability": Markup(plots.reliability(metrics.calibration_bins, f"reliability{index}")) if metrics else "",
        "too_sure": _too_sure(metrics) if metrics else 0.0,
        "worst": worst,
        "analyses": analyses.read(run.folder / "analysis"),
        "augmented": _picture(run.folder, "images/augmented.png"),
    }


def _latest(values: Any) -> float | None:
    return float(values[-1]) if len(values) else None


def _grid(metrics: Metrics) -> list[list[dict[str, Any]]]:
    """Cells of the confusion matrix; `shade` in [0, 1] is the cube root of the row's share: rare mistakes show."""
    return [
        [{"n": n, "shade": round((n / total) ** (1 / 3), 2), "right": i == j} for j, n in enumerate(row)]
        for i, row in enumerate(metrics.confusion)
        for total in [max(1, sum(row))]
    ]


def _too_sure(metrics: Metrics) -> float:
    """Mean confidence less accuracy, in percent points: above 0 the network promises more than it keeps."""
    filled = [bin for bin in metrics.calibration_bins if bin.confidence is not None and bin.accuracy is not None]
    return sum(bin.n * ((bin.confidence or 0) - (bin.accuracy or 0)) for bin in filled) / max(1, metrics.n)


def _picture(folder: Path, name: str) -> dict[str, Any] | None:
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
