"""Runs an experiment: from its plan to its result, a JSON file and pictures."""

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
from reslearn.reproduce.experiment import Dataset, Experiment, ExperimentOptions, Measured, Plan, Scale
from reslearn.reproduce.runs import LAST, Curve, curve, find, metric, open_data, train
from reslearn.reproduce.verdicts import FAILED, NOT_RUN, UNDECIDED, compare_to_paper, estimate
from reslearn.training import runtime
from reslearn.training.display import Display
from reslearn.training.folder import read_facts
from reslearn.weights.store import read_card

# Options that leave a network the paper's: its initialization, and which of four pixels shortcut A takes.
SAME = (("zero_init_last_gamma", True), ("zero_init_last_gamma", False), ("shortcut", "A-centered"))


def dataset(experiment: Experiment, scale: Scale, asked: str | None) -> Dataset:
    """The data set of an experiment: the given one, or its own; at smaller scales another one where its own is not there."""
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


def make_plan(experiment: Experiment, scale: Scale, source: Dataset) -> Plan:
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

    seeds: runs per training; the plan's own number unless given. data: a name or path. only: labels of the trainings to run; the
    finished runs of others are used. models: model files or run folders to measure instead of trained ones, on `data` or on what
    each was trained on; the result is NAME-models. training: False only reads finished runs. command: as the page shows it.
    order: its place on the page. Raises UserError for what cannot be used; Interrupted after a signal: call it again to resume.
    """
    source = dataset(experiment, scale, data)
    plan = make_plan(experiment, scale, source)
    if wrong := [label for label in only if label not in plan.trainings]:
        known = ", ".join(plan.trainings) or "none: it trains nothing"
        raise UserError(f"{experiment.name} has no training '{wrong[0]}' at scale {scale}; known: {known}")
    if seeds is not None and (models or not (plan.trainings or plan.run)):
        raise UserError(f"{experiment.name} trains nothing{' with --model' if models else ''}: --seeds does not apply")
    if plan.count is not None and (data is not None or not training):
        raise UserError(f"{experiment.name} only counts: --data and --no-train do not apply")
    if models and plan.analyze is None:
        raise UserError(f"{experiment.name} does not measure models: leave --model out")
    if models and (only or not training):
        raise UserError("--only and --no-train do not apply with --model: nothing is trained")
    if plan.analyze is not None and not plan.trainings and not models:
        raise UserError(f"{experiment.name} needs models to measure: give them with --model")
    given = _named(models)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    out.mkdir(parents=True, exist_ok=True)
    shown = "models" if given else "paper" if plan.count else scale  # what is only counted has one scale
    picture, on = out / f"{experiment.name}-{shown}.png", pick_device(device)
    options = ExperimentOptions(data, source.source, seeds or plan.seeds, out, device, Display(quiet).say, training, quiet)
    result: dict[str, Any] = {
        "experiment": experiment.name,
        "order": order,
        "title": experiment.title,
        "source": experiment.source,
        "see": experiment.see,
        "scale": shown,
        "command": command,
        "made_on": [_made_on(runtime.machine(on, pick_precision("auto", on), "auto"), runtime.versions())],
        "deviations": [] if given else list(plan.deviations),
        "rows": [],
        "claims": [],
        "notes": [],
    }
    if plan.count is not None:
        _take(plan.count(), result, picture)
    elif given and plan.analyze is not None:
        result["runs"] = {label: list(map(str, each)) for label, each in given.items()}
        _take(plan.analyze(given, options), result, picture)
    elif plan.run is not None:
        result["seeds"] = options.seeds
        _take(plan.run(options), result, picture)
    else:
        _run_trainings(experiment, plan, options, only, result, picture)
    write_text(picture.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    return result


def _run_trainings(
    experiment: Experiment, plan: Plan, options: ExperimentOptions, only: Sequence[str], result: dict[str, Any], picture: Path
) -> None:
    """Train what is missing, and put all that the finished runs say into the result."""
    opened, seeds = open_data(options.source, experiment.task), options.seeds
    result |= {"data": opened.name, "seeds": seeds}
    runs = find(plan, opened, options.source, options.out)
    if options.training:
        train(runs, only or list(runs), seeds, options.device, options.quiet)
    done = {label: {s: each.run(s) for s in range(seeds) if each.done(s)} for label, each in runs.items()}
    failed = {label: [s for s in range(seeds) if each.failed(s)] for label, each in runs.items()}
    folders = {label: list(by_seed.values()) for label, by_seed in done.items()}
    if not options.training and not any(folders.values()):
        raise UserError(f"none of {experiment.name}'s networks has been trained in {options.out} yet: leave --no-train out")
    facts = [read_facts(folder) for each in folders.values() for folder in each]
    if facts:
        result["made_on"] = list(dict.fromkeys(_made_on(each["machine"], each["versions"]) for each in facts))
    same_data, paper = opened.name == experiment.data, result["scale"] == "paper"
    if paper and not same_data:
        result["deviations"].append(f"the data set is {opened.name}, not {experiment.data}")
    _evaluate(plan, paper and same_data, done, failed, result)
    _draw(plan, folders, result, picture)
    if plan.analyze is not None:
        _take(plan.analyze(_complete(done), options._replace(data=options.source)), result, picture)


def _named(models: Sequence[Path]) -> dict[str, list[Path]]:
    """Given models, each on its own, by network: its name and unusual options; the file too, where networks repeat."""
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
    """The machine and the versions, in words."""
    how = f"{machine['processor']}, {machine['threads']} threads, {machine['precision']}"
    return f"{how}, reslearn {versions['reslearn']}, torch {versions['torch']}"


def _take(measured: Measured, result: dict[str, Any], picture: Path) -> None:
    """Add measurements to a result, and draw them."""
    result["rows"] += measured.rows
    smoke = {"verdict": UNDECIDED} if result["scale"] == "smoke" else {}  # two steps show nothing
    result["claims"] += [{**claim, **smoke} for claim in measured.claims]
    result["deviations"] += measured.deviations
    result |= {"data": measured.data} if measured.data else {}
    if measured.draw is not None:
        second = picture.with_name(f"{picture.stem}-effects.png")
        second.unlink(missing_ok=True)  # of an earlier call
        measured.draw(picture)
        result |= {"picture": picture.name, "caption": measured.caption, "second_caption": measured.second_caption}
        result |= {"effects_picture": second.name} if second.exists() else {}


Done = Mapping[str, Mapping[int, Path]]  # label -> seed -> the folder of a finished run


def _shared(done: Done, labels: Iterable[str]) -> dict[str, dict[int, Path]]:
    """The run folders of the seeds that all of these labels have."""
    labels = list(labels)
    seeds = sorted(set.intersection(*(set(done[label]) for label in labels)))
    return {label: {seed: done[label][seed] for seed in seeds} for label in labels}


def _complete(done: Done) -> dict[str, list[Path]]:
    """The run folders of all trained labels, of the seeds that all of them have. Raises UserError where there are none."""
    there = [label for label, folders in done.items() if folders]
    found = _shared(done, there) if there else {}
    if not any(found.values()):
        raise UserError("none of its networks has been trained yet: leave --no-train out, or give models with --model")
    return {label: list(folders.values()) for label, folders in found.items()}


def _evaluate(plan: Plan, comparable: bool, done: Done, failed: Mapping[str, list[int]], result: dict[str, Any]) -> None:
    for row in plan.rows:
        values = [metric(folder, row.metric) for folder in done[row.run].values()]
        if values:
            result["rows"].append(compare_to_paper(row, values, comparable))
        else:
            verdict = FAILED if failed[row.run] else NOT_RUN
            result["rows"].append({"what": row.what, "published": row.published, "ours": None, "verdict": verdict})
    for label, numbers in failed.items():
        if numbers:
            seeds = f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
            result["notes"].append(f"{label}: its loss became NaN or infinite ({seeds}); its numbers are of the other seeds.")
    for effect in plan.effects:
        found = _shared(done, effect.terms)
        if all(found.values()):
            values = {label: {s: metric(folder, effect.metric) for s, folder in each.items()} for label, each in found.items()}
            result["claims"].append(estimate(effect, values))
        else:
            result["claims"].append({"text": effect.text, "effect": None, "verdict": NOT_RUN})
    for deeper, shallower in plan.crossings if result["scale"] != "smoke" else ():
        found = _shared(done, (deeper, shallower))
        if found[deeper]:
            result["notes"].append(_crossing(deeper, shallower, found))
    result["runs"] = {label: [f"{f.parent.name}/{f.name}" for f in folders.values()] for label, folders in done.items()}


def _crossing(deeper: str, shallower: str, found: Mapping[str, Mapping[int, Path]]) -> str:
    """Says from which step on the deeper net's training error is below the shallower one's."""
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


def _draw(plan: Plan, found: Mapping[str, Sequence[Path]], result: dict[str, Any], path: Path) -> None:
    shown = {label for panel in plan.panels for label in panel.runs}
    drawn = {label: [curve(folder) for folder in folders] for label, folders in found.items() if label in shown}
    if any(drawn.get(label) for panel in plan.panels for label in panel.runs):
        made = f"{result['source']}, scale {result['scale']}: {result['data']}, {result['seeds']} seed"
        plots.curves(plan.panels, drawn, path, made + "s" * (result["seeds"] > 1))
        result["picture"] = path.name
    if claims := [claim for claim in result["claims"] if claim["effect"]]:
        effects = path.with_name(f"{path.stem}-effects.png")
        plots.effects(claims, effects)
        result["effects_picture"] = effects.name
