"""An experiment from its plan to its result: a JSON file and a picture."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reslearn import data as datasets
from reslearn.device import pick_device, pick_precision
from reslearn.errors import UserError
from reslearn.files import write_text
from reslearn.reproduce import plots
from reslearn.reproduce.experiment import Dataset, Experiment, Measured, Plan, Scale
from reslearn.reproduce.judge import judge_effect, judge_row
from reslearn.reproduce.runs import Cached, Curve, curve, find, metric, train
from reslearn.training import runtime
from reslearn.training.display import Display
from reslearn.weights.store import read_card

NOT_RUN = "not run"


def dataset(experiment: Experiment, scale: Scale, asked: str | None) -> Dataset:
    """What an experiment runs on: what is asked for, else its own data set; at smaller scales another one where that is absent."""
    if asked is not None:
        opened = datasets.open(asked)
        return Dataset(asked, opened.resident and opened.sizes == (32, 32) and opened.channels == 3)
    if scale == "smoke" and experiment.small_data:
        return Dataset(experiment.small_data, False)
    if scale != "paper" and experiment.small_data and datasets.present(experiment.data) is None:
        return Dataset(experiment.small_data, False)
    return Dataset(experiment.data, experiment.data.startswith("cifar"))


def plan(experiment: Experiment, scale: Scale, source: Dataset) -> Plan:
    """The plan at a scale. Raises UserError where there is none."""
    if experiment.absent:
        raise UserError(f"{experiment.name} cannot run: {experiment.absent}")
    if scale not in experiment.plans:
        raise UserError(f"{experiment.name} has no scale '{scale}': take {' or '.join(experiment.plans)}")
    return experiment.plans[scale](source)


def reproduce(
    experiment: Experiment,
    scale: Scale = "small",
    seeds: int | None = None,
    data: str | None = None,
    out: Path = Path("reproduction"),
    device: str = "auto",
    only: Sequence[str] = (),
    models: Sequence[Path] = (),
    training: bool = True,
    quiet: bool = False,
    command: str = "",
    order: int = 0,
) -> dict[str, Any]:
    """Run an experiment and write OUT/NAME-SCALE.json and .png. Returns what the JSON holds.

    seeds: how many of each training; the plan's own number unless given. data: a name or path. only: labels of the trainings
    to run; the others are read where they are there. models: model files or run folders to look into, instead of trainings;
    the result is NAME-models. training: False reads only. Raises UserError for what cannot be used,
    Interrupted after a signal: called again, it goes on. order: where it stands on the page.
    """
    source = dataset(experiment, scale, data)
    planned = plan(experiment, scale, source)
    if wrong := [label for label in only if label not in planned.trainings]:
        known = ", ".join(planned.trainings) or "none: it trains nothing"
        raise UserError(f"{experiment.name} has no training '{wrong[0]}' at scale {scale}; known: {known}")
    if seeds is not None and (models or not planned.trainings):
        raise UserError(f"{experiment.name} trains nothing{' with --model' if models else ''}: --seeds does not apply")
    if models and planned.of_models is None:
        raise UserError(f"{experiment.name} does not look into models: leave --model out")
    if planned.of_models is not None and not planned.trainings and not models:
        raise UserError(f"{experiment.name} needs models to look into: give them with --model")
    given = _named(models)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    shown = "models" if given else "paper" if planned.measure else scale  # what is only counted has one scale
    name, count = f"{experiment.name}-{shown}", seeds or planned.seeds
    on = pick_device(device)
    result: dict[str, Any] = {
        "experiment": experiment.name,
        "order": order,
        "title": experiment.title,
        "source": experiment.source,
        "see": experiment.see,
        "scale": shown,
        "command": command,
        "machine": runtime.machine(on, pick_precision("auto", on), "auto"),
        "versions": runtime.versions(),
        "deviations": list(planned.deviations),
        "rows": [],
        "claims": [],
        "notes": [],
    }
    display = Display(quiet)
    if planned.measure is not None:
        _take(planned.measure(source, scale, display.say), result, out / f"{name}.png")
    elif given and planned.of_models is not None:
        result |= {"data": source.source, "deviations": [], "runs": {label: list(map(str, each)) for label, each in given.items()}}
        _take(planned.of_models(given, source.source, display.say), result, out / f"{name}.png")
    else:
        opened = datasets.open(source.source)
        result |= {"data": opened.name, "seeds": count}
        chosen = [label for label in planned.trainings if not only or label in only]
        if training:
            train(planned, source, opened, count, out, device, quiet, chosen)
        done = {label: _finished(cached, count) for label, cached in find(planned, opened, out).items()}
        found = {label: list(folders.values()) for label, folders in done.items()}
        same_data = opened.name == experiment.data
        if scale == "paper" and not same_data:
            result["deviations"].append(f"the data set is {opened.name}, not {experiment.data}")
        _judge(planned, scale == "paper" and same_data, done, result)
        _draw(planned, found, result, out / f"{name}.png")
        if planned.of_models is not None:
            _take(planned.of_models(_complete(found), source.source, display.say), result, out / f"{name}.png")
    write_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    return result


def _named(models: Sequence[Path]) -> dict[str, list[Path]]:
    """Given models by the names of their networks."""
    found: dict[str, list[Path]] = {}
    for path in models:
        found.setdefault(read_card(path).net, []).append(path)
    return found


def _take(measured: Measured, result: dict[str, Any], picture: Path) -> None:
    """Put what was measured into a result, and draw it."""
    result["rows"] += measured.rows
    result["claims"] += measured.claims
    result["deviations"] += measured.deviations
    if measured.draw is not None:
        measured.draw(picture)
        second = picture.with_name(f"{picture.stem}-effects.png")
        result |= {"picture": picture.name, "caption": measured.caption, "second_caption": measured.second_caption}
        result |= {"effects_picture": second.name} if second.exists() else {}


def _complete(found: Mapping[str, list[Path]]) -> dict[str, list[Path]]:
    """Those that have been trained. Raises UserError where there is none."""
    there = {label: folders for label, folders in found.items() if folders}
    if not there:
        raise UserError("none of its networks has been trained yet: leave --no-train out, or give models with --model")
    return there


def _finished(cached: Cached, seeds: int) -> dict[int, Path]:
    """seed -> run folder, of those that have been trained to their end."""
    return {seed: cached.seed(seed) for seed in range(seeds) if cached.done(seed)}


def _judge(planned: Plan, comparable: bool, done: Mapping[str, Mapping[int, Path]], result: dict[str, Any]) -> None:
    def shared(labels: Iterable[str]) -> dict[str, list[Path]]:
        """Run folders of the seeds that all of these labels have."""
        labels = list(labels)
        seeds = sorted(set.intersection(*(set(done[label]) for label in labels)))
        return {label: [done[label][seed] for seed in seeds] for label in labels}

    for row in planned.rows:
        values = [metric(folder, row.metric) for folder in done[row.run].values()]
        if values:
            result["rows"].append(judge_row(row, values, comparable))
        else:
            result["rows"].append({"what": row.what, "published": row.published, "ours": None, "verdict": NOT_RUN})
    for effect in planned.effects:
        found = shared(effect.terms)
        if all(found.values()):
            values = {label: [metric(folder, effect.metric) for folder in folders] for label, folders in found.items()}
            result["claims"].append(judge_effect(effect, values))
        else:
            result["claims"].append({"text": effect.text, "effect": None, "verdict": NOT_RUN})
    for deeper, shallower in planned.crossings:
        found = shared((deeper, shallower))
        if found[deeper]:
            result["notes"].append(_crossing(deeper, shallower, found))
    result["runs"] = {label: [f"{f.parent.name}/{f.name}" for f in folders.values()] for label, folders in done.items()}


def _crossing(deeper: str, shallower: str, found: Mapping[str, Sequence[Path]]) -> str:
    """When the deeper net's training error fell below the shallower one's for good, in words."""
    words = []
    for seed, (a, b) in enumerate(zip(found[deeper], found[shallower], strict=False)):
        at = crossing(curve(a), curve(b))
        words.append(f"at iteration {at:,} (seed {seed})" if at is not None else f"not by the end (seed {seed})")
    return f"The training error of {deeper} falls below that of {shallower}: {', '.join(words)}."


def crossing(deeper: Curve, shallower: Curve) -> int | None:
    """The step from which on the first curve's training error stays below the second's; None where it does not end below."""
    other = dict(shallower.train)
    shared = [(step, error - other[step]) for step, error in deeper.train if step in other]
    at = None
    for step, difference in reversed(shared):
        if difference >= 0:
            break
        at = step
    return at


def _draw(planned: Plan, found: Mapping[str, Sequence[Path]], result: dict[str, Any], path: Path) -> None:
    drawn = {label: [curve(folder) for folder in folders] for label, folders in found.items()}
    if any(drawn.get(label) for panel in planned.panels for label in panel.runs):
        plots.curves(planned.panels, drawn, path)
        result["picture"] = path.name
    if claims := [claim for claim in result["claims"] if claim["effect"]]:
        effects = path.with_name(f"{path.stem}-effects.png")
        plots.effects(claims, effects)
        result["effects_picture"] = effects.name
