"""An experiment from its plan to its result: a JSON file and a picture."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reslearn import data as datasets
from reslearn.device import pick_device, pick_precision
from reslearn.errors import UserError
from reslearn.files import write_text
from reslearn.nets import spec
from reslearn.reproduce import plots
from reslearn.reproduce.experiment import Dataset, Experiment, Look, Measured, Plan, Scale, Work
from reslearn.reproduce.judge import FAILED, NOT_RUN, UNDECIDED, judge_effect, judge_row
from reslearn.reproduce.runs import LAST, Curve, curve, find, metric, open_data, train
from reslearn.training import runtime
from reslearn.training.display import Display
from reslearn.training.folder import read_facts
from reslearn.weights.store import read_card

# Options of a net that is the paper's all the same: how it began, and which of four pixels shortcut A takes.
SAME = (("zero_init_last_gamma", True), ("zero_init_last_gamma", False), ("shortcut", "A-centered"))


def dataset(experiment: Experiment, scale: Scale, asked: str | None) -> Dataset:
    """What an experiment runs on: what is asked for, else its own data set; at smaller scales another one where that is absent."""
    if experiment.task == "detect":
        return Dataset(asked or experiment.data, False)
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
    if scale not in experiment.plans:
        raise UserError(f"{experiment.name} has no scale '{scale}': take {' or '.join(experiment.plans)}")
    return experiment.plans[scale](source)


def reproduce(
    experiment: Experiment,
    scale: Scale = "small",
    *,
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
    to run; the others are read where they are there. models: model files or run folders to look into, instead of trainings, on
    `data` or on what each was trained on; the result is NAME-models. training: False reads only. command: as the page shows it.
    order: where it stands there. Raises UserError for what cannot be used, Interrupted after a signal: called again, it goes on.
    """
    source = dataset(experiment, scale, data)
    planned = plan(experiment, scale, source)
    if wrong := [label for label in only if label not in planned.trainings]:
        known = ", ".join(planned.trainings) or "none: it trains nothing"
        raise UserError(f"{experiment.name} has no training '{wrong[0]}' at scale {scale}; known: {known}")
    if seeds is not None and (models or not (planned.trainings or planned.work)):
        raise UserError(f"{experiment.name} trains nothing{' with --model' if models else ''}: --seeds does not apply")
    if planned.measure is not None and (data is not None or not training):
        raise UserError(f"{experiment.name} only counts: --data and --no-train do not apply")
    if models and planned.of_models is None:
        raise UserError(f"{experiment.name} does not look into models: leave --model out")
    if models and (only or not training):
        raise UserError("--only and --no-train do not apply with --model: nothing is trained")
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
        "made_on": [_made_on(runtime.machine(on, pick_precision("auto", on), "auto"), runtime.versions())],
        "deviations": list(planned.deviations),
        "rows": [],
        "claims": [],
        "notes": [],
    }
    display = Display(quiet)
    if planned.measure is not None:
        _take(planned.measure(source, scale, display.say), result, out / f"{name}.png")
    elif given and planned.of_models is not None:
        result |= {"deviations": [], "runs": {label: list(map(str, each)) for label, each in given.items()}}
        _take(planned.of_models(given, Look(data, source.source, device, display.say)), result, out / f"{name}.png")
    elif planned.work is not None:
        result |= {"seeds": count}
        work = Work(source.source, count, out, device, display.say, training)
        _take(planned.work(work), result, out / f"{name}.png")
    else:
        opened = open_data(source.source, experiment.task)
        result |= {"data": opened.name, "seeds": count}
        chosen = [label for label in planned.trainings if not only or label in only]
        if training:
            train(planned, source, opened, count, out, device, quiet, chosen)
        cached = find(planned, opened, out)
        done = {label: {s: each.seed(s) for s in range(count) if each.done(s)} for label, each in cached.items()}
        failed = {label: [s for s in range(count) if each.failed(s)] for label, each in cached.items()}
        found = {label: list(folders.values()) for label, folders in done.items()}
        if not training and not any(found.values()):
            raise UserError(f"none of {experiment.name}'s networks has been trained in {out} yet: leave --no-train out")
        facts = [read_facts(folder) for folders in found.values() for folder in folders]
        if facts:
            result["made_on"] = _distinct(_made_on(each["machine"], each["versions"]) for each in facts)
        same_data = opened.name == experiment.data
        if scale == "paper" and not same_data:
            result["deviations"].append(f"the data set is {opened.name}, not {experiment.data}")
        _judge(planned, scale == "paper" and same_data, done, failed, result)
        _draw(planned, found, result, out / f"{name}.png")
        if planned.of_models is not None:
            _take(
                planned.of_models(_complete(done), Look(source.source, source.source, device, display.say)),
                result,
                out / f"{name}.png",
            )
    write_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    return result


def _named(models: Sequence[Path]) -> dict[str, list[Path]]:
    """Given models by their networks: the name, and the options that make it another one; of several, also the file.

    Each stands for itself: they need not be seeds of one training.
    """
    named: list[tuple[str, Path]] = []
    for path in models:
        card = read_card(path)
        same = SAME if spec(card.net).shortcut == "A" else SAME[:2]
        options = [f"{key}={value}" for key, value in sorted(card.options.items()) if (key, value) not in same]
        named.append((" ".join([card.net, *options]), path))
    names = [name for name, _ in named]
    short = len({path.name for path in models}) == len(models)
    return {f"{name} ({path.name if short else path})" if names.count(name) > 1 else name: [path] for name, path in named}


def _made_on(machine: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    """Where and with what, in words."""
    how = f"{machine['processor']}, {machine['threads']} threads, {machine['precision']}"
    return f"{how}, reslearn {versions['reslearn']}, torch {versions['torch']}"


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _take(measured: Measured, result: dict[str, Any], picture: Path) -> None:
    """Put what was measured into a result, and draw it."""
    result["rows"] += measured.rows
    smoke = {"verdict": UNDECIDED} if result["scale"] == "smoke" else {}  # two steps decide nothing
    result["claims"] += [{**claim, **smoke} for claim in measured.claims]
    result["deviations"] += measured.deviations
    result |= {"data": measured.data} if measured.data else {}
    if measured.draw is not None:
        second = picture.with_name(f"{picture.stem}-effects.png")
        second.unlink(missing_ok=True)  # of an earlier time
        measured.draw(picture)
        result |= {"picture": picture.name, "caption": measured.caption, "second_caption": measured.second_caption}
        result |= {"effects_picture": second.name} if second.exists() else {}


Done = Mapping[str, Mapping[int, Path]]  # label -> seed -> the folder of a run that has come to its end


def _shared(done: Done, labels: Iterable[str]) -> dict[str, dict[int, Path]]:
    """Run folders by seed, of the seeds that all of these labels have."""
    labels = list(labels)
    seeds = sorted(set.intersection(*(set(done[label]) for label in labels)))
    return {label: {seed: done[label][seed] for seed in seeds} for label in labels}


def _complete(done: Done) -> dict[str, list[Path]]:
    """What has been trained, with the seeds that all of it has. Raises UserError where there is none."""
    there = [label for label, folders in done.items() if folders]
    found = _shared(done, there) if there else {}
    if not any(found.values()):
        raise UserError("none of its networks has been trained yet: leave --no-train out, or give models with --model")
    return {label: list(folders.values()) for label, folders in found.items()}


def _judge(planned: Plan, comparable: bool, done: Done, failed: Mapping[str, list[int]], result: dict[str, Any]) -> None:
    for row in planned.rows:
        values = [metric(folder, row.metric) for folder in done[row.run].values()]
        if values:
            result["rows"].append(judge_row(row, values, comparable))
        else:
            verdict = FAILED if failed[row.run] else NOT_RUN
            result["rows"].append({"what": row.what, "published": row.published, "ours": None, "verdict": verdict})
    for label, numbers in failed.items():
        if numbers:
            seeds = f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
            result["notes"].append(f"{label}: its loss stopped being a number ({seeds}); what is said of it is of the others.")
    for effect in planned.effects:
        found = _shared(done, effect.terms)
        if all(found.values()):
            values = {label: {s: metric(folder, effect.metric) for s, folder in each.items()} for label, each in found.items()}
            result["claims"].append(judge_effect(effect, values))
        else:
            result["claims"].append({"text": effect.text, "effect": None, "verdict": NOT_RUN})
    for deeper, shallower in planned.crossings if result["scale"] != "smoke" else ():
        found = _shared(done, (deeper, shallower))
        if found[deeper]:
            result["notes"].append(_crossing(deeper, shallower, found))
    result["runs"] = {label: [f"{f.parent.name}/{f.name}" for f in folders.values()] for label, folders in done.items()}


def _crossing(deeper: str, shallower: str, found: Mapping[str, Mapping[int, Path]]) -> str:
    """When the deeper net's training error fell below the shallower one's for good, in words."""
    steps = {s: crossing(curve(found[deeper][s]), curve(found[shallower][s])) for s in found[deeper]}
    if not any(steps.values()):
        return f"The training error of {deeper} does not stay below that of {shallower} for the last tenth, in any seed."
    words = [f"from iteration {at:,} on (seed {s})" if at is not None else f"not at the end (seed {s})" for s, at in steps.items()]
    return f"The training error of {deeper} stays below that of {shallower}: {', '.join(words)}."


def crossing(deeper: Curve, shallower: Curve) -> int | None:
    """The step from which on the first curve's training error stays below the second's, for at least the last tenth of the run;
    None where it does not.
    """
    other = dict(shallower.train)
    shared = [(step, error - other[step]) for step, error in deeper.train if step in other]
    at = None
    for step, difference in reversed(shared):
        if difference >= 0:
            break
        at = step
    return at if at is not None and at <= (1 - LAST) * shared[-1][0] else None


def _draw(planned: Plan, found: Mapping[str, Sequence[Path]], result: dict[str, Any], path: Path) -> None:
    shown = {label for panel in planned.panels for label in panel.runs}
    drawn = {label: [curve(folder) for folder in folders] for label, folders in found.items() if label in shown}
    if any(drawn.get(label) for panel in planned.panels for label in panel.runs):
        made = f"{result['source']}, scale {result['scale']}: {result['data']}, {result['seeds']} seed"
        plots.curves(planned.panels, drawn, path, made + "s" * (result["seeds"] > 1))
        result["picture"] = path.name
    if claims := [claim for claim in result["claims"] if claim["effect"]]:
        effects = path.with_name(f"{path.stem}-effects.png")
        plots.effects(claims, effects)
        result["effects_picture"] = effects.name
