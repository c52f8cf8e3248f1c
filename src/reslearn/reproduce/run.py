"""Runs an experiment and writes its result: a JSON file and plots."""

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
from reslearn.reproduce.experiment import METRICS, Dataset, Experiment, ExperimentOptions, Measured, Plan, Scale
from reslearn.reproduce.runs import LAST, Curve, curve, find, metric, open_data, train
from reslearn.reproduce.verdicts import FAILED, NOT_RUN, UNDECIDED, compare_to_paper, estimate, row
from reslearn.training import runtime
from reslearn.training.display import Display
from reslearn.training.folder import read_facts
from reslearn.weights.store import read_card

# Options that a label need not mention: the initialization, and which of four pixels shortcut A takes.
UNNAMED = (("zero_init_last_gamma", True), ("zero_init_last_gamma", False), ("shortcut", "A-centered"))


def dataset(experiment: Experiment, scale: Scale, data: str | None) -> Dataset:
    """The data set of an experiment: `data` if given, else its own or its small one (see Experiment)."""
    if experiment.task == "detect":
        return Dataset(data or experiment.data, False)
    if data is not None:
        opened = datasets.open(data)
        return Dataset(data, opened.resident and opened.sizes == (32, 32) and opened.channels == 3)
    if experiment.small_data and (scale == "smoke" or (scale == "small" and datasets.present(experiment.data) is None)):
        return Dataset(experiment.small_data, False)
    return Dataset(experiment.data, experiment.data.startswith("cifar"))


def make_plan(experiment: Experiment, scale: Scale, source: Dataset) -> Plan:
    """The plan at a scale. Raises UserError if the experiment does not support the scale."""
    if scale not in experiment.plans:
        raise UserError(f"{experiment.name} has no scale '{scale}': use {' or '.join(experiment.plans)}")
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
    """Run an experiment and write OUT/NAME-SCALE.json and .png. Returns the contents of the JSON file.

    seeds: runs per training; None: the plan's. data: a name or path. only: labels of the trainings to run; finished runs of the
    others are reused. models: model files or run folders to measure instead of trained ones, on `data` or on each model's training
    data set; the result is NAME-models. training: False reads finished runs only. command, order: shown on the page, and its
    position there. Raises UserError for invalid options; Interrupted after a signal: call it again to resume.
    """
    source = dataset(experiment, scale, data)
    plan = make_plan(experiment, scale, source)
    if unknown := [label for label in only if label not in plan.trainings]:
        known = ", ".join(plan.trainings) or "none: it trains nothing"
        raise UserError(f"{experiment.name} has no training '{unknown[0]}' at scale {scale}; known: {known}")
    if seeds is not None and (models or not (plan.trainings or plan.run)):
        raise UserError(f"{experiment.name} trains nothing{' with --model' if models else ''}: --seeds does not apply")
    if plan.count is not None and (data is not None or not training):
        raise UserError(f"{experiment.name} uses no data and no training: --data and --no-train do not apply")
    if models and plan.analyze is None:
        raise UserError(f"{experiment.name} does not measure models: remove --model")
    if models and (only or not training):
        raise UserError("--only and --no-train do not apply with --model: nothing is trained")
    if plan.analyze is not None and not plan.trainings and not models:
        raise UserError(f"{experiment.name} needs models to measure: pass them with --model")
    given = _labeled(models)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: pass a folder")
    out.mkdir(parents=True, exist_ok=True)
    shown_scale = "models" if given else "paper" if plan.count else scale  # counts are the same at every scale
    picture, torch_device = out / f"{experiment.name}-{shown_scale}.png", pick_device(device)
    machine = runtime.machine(torch_device, pick_precision("auto", torch_device), "auto")
    options = ExperimentOptions(data, source.source, seeds or plan.seeds, out, device, Display(quiet).say, training, quiet)
    result: dict[str, Any] = {
        "experiment": experiment.name,
        "order": order,
        "title": experiment.title,
        "source": experiment.source,
        "see": experiment.see,
        "scale": shown_scale,
        "command": command,
        "made_on": [_made_on(machine, runtime.versions())],
        "deviations": [] if given else list(plan.deviations),
        "rows": [],
        "claims": [],
        "notes": [],
    }
    if plan.count is not None:
        _add(plan.count(), result, picture)
    elif given and plan.analyze is not None:
        result["runs"] = {label: list(map(str, files)) for label, files in given.items()}
        _add(plan.analyze(given, options), result, picture)
    elif plan.run is not None:
        result["seeds"] = options.seeds
        _add(plan.run(options), result, picture)
    else:
        _run_trainings(experiment, plan, options, only, result, picture)
    write_text(picture.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    return result


def _run_trainings(
    experiment: Experiment, plan: Plan, options: ExperimentOptions, only: Sequence[str], result: dict[str, Any], picture: Path
) -> None:
    """Trains what is missing and adds the numbers of all finished runs to the result."""
    opened, seeds = open_data(options.source, experiment.task), options.seeds
    result |= {"data": opened.name, "seeds": seeds}
    trainings = find(plan, opened, options.source, options.out)
    if options.training:
        train(trainings, only or list(trainings), seeds, options.device, options.quiet)
    done = {label: {s: runs.run(s) for s in range(seeds) if runs.done(s)} for label, runs in trainings.items()}
    failed = {label: [s for s in range(seeds) if runs.failed(s)] for label, runs in trainings.items()}
    folders = {label: list(by_seed.values()) for label, by_seed in done.items()}
    if not options.training and not any(folders.values()):
        raise UserError(f"no trained networks of {experiment.name} in {options.out}: run without --no-train")
    if facts := [read_facts(folder) for by_label in folders.values() for folder in by_label]:
        result["made_on"] = list(dict.fromkeys(_made_on(run["machine"], run["versions"]) for run in facts))
    same_data, paper = opened.name == experiment.data, result["scale"] == "paper"
    if paper and not same_data:
        result["deviations"].append(f"{opened.name} instead of {experiment.data}")
    _evaluate(plan, paper and same_data, done, failed, result)
    _draw(plan, folders, result, picture)
    if plan.analyze is not None:
        _add(plan.analyze(_complete(done), options._replace(data=options.source)), result, picture)


def _labeled(models: Sequence[Path]) -> dict[str, list[Path]]:
    """Given models by label: the network's name and unusual options, plus the file for networks given more than once."""
    labeled: list[tuple[str, Path]] = []
    for path in models:
        card = read_card(path)
        unnamed = UNNAMED if spec(card.net).shortcut == "A" else UNNAMED[:2]
        options = [f"{key}={value}" for key, value in sorted(card.options.items()) if (key, value) not in unnamed]
        labeled.append((" ".join([card.net, *options]), path))
    labels = [label for label, _ in labeled]
    short = len({path.name for path in models}) == len(models)
    return {f"{label} ({path.name if short else path})" if labels.count(label) > 1 else label: [path] for label, path in labeled}


def _made_on(machine: Mapping[str, Any], versions: Mapping[str, Any]) -> str:
    """The machine and versions as text."""
    hardware = f"{machine['processor']}, {machine['threads']} threads, {machine['precision']}"
    return f"{hardware}, reslearn {versions['reslearn']}, torch {versions['torch']}"


def _add(measured: Measured, result: dict[str, Any], picture: Path) -> None:
    """Adds measurements to a result and draws them."""
    result["rows"] += measured.rows
    smoke = {"verdict": UNDECIDED} if result["scale"] == "smoke" else {}  # two steps decide nothing
    result["claims"] += [{**claim, **smoke} for claim in measured.claims]
    result["deviations"] += measured.deviations
    result |= {"data": measured.data} if measured.data else {}
    if measured.draw is not None:
        second = picture.with_name(f"{picture.stem}-effects.png")
        second.unlink(missing_ok=True)  # from an earlier call
        measured.draw(picture)
        result |= {"picture": picture.name, "caption": measured.caption, "second_caption": measured.second_caption}
        result |= {"effects_picture": second.name} if second.exists() else {}


Done = Mapping[str, Mapping[int, Path]]  # label -> seed -> the folder of a finished run


def _shared(done: Done, labels: Iterable[str]) -> dict[str, dict[int, Path]]:
    """The run folders of the seeds that all these labels have."""
    labels = list(labels)
    seeds = sorted(set.intersection(*(set(done[label]) for label in labels)))
    return {label: {seed: done[label][seed] for seed in seeds} for label in labels}


def _complete(done: Done) -> dict[str, list[Path]]:
    """The run folders of all trained labels, for the seeds that all of them have. Raises UserError if there are none."""
    trained = [label for label, folders in done.items() if folders]
    shared = _shared(done, trained) if trained else {}
    if not any(shared.values()):
        raise UserError("no trained networks to measure: run without --no-train, or pass models with --model")
    return {label: list(folders.values()) for label, folders in shared.items()}


def _evaluate(plan: Plan, comparable: bool, done: Done, failed: Mapping[str, list[int]], result: dict[str, Any]) -> None:
    """Adds rows, claims and notes to a result."""
    for comparison in plan.rows:
        label, name = comparison.run, comparison.metric
        if values := [metric(folder, name) for folder in done[label].values()]:
            result["rows"].append(compare_to_paper(comparison, values, comparable))
        else:
            verdict = FAILED if failed[label] else NOT_RUN
            result["rows"].append(row(comparison.what, METRICS[name], published=comparison.published, verdict=verdict))
    for label, numbers in failed.items():
        if numbers:
            seeds = f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
            result["notes"].append(f"{label}: the loss became NaN or infinite ({seeds}); the numbers are from the other seeds.")
    for effect in plan.effects:
        shared = _shared(done, effect.terms)
        if all(shared.values()):
            values = {label: {s: metric(run, effect.metric) for s, run in runs.items()} for label, runs in shared.items()}
            result["claims"].append(estimate(effect, values))
        else:
            result["claims"].append({"text": effect.text, "effect": None, "verdict": NOT_RUN})
    for deeper, shallower in plan.crossings if result["scale"] != "smoke" else ():
        shared = _shared(done, (deeper, shallower))
        if shared[deeper]:
            result["notes"].append(_crossing(deeper, shallower, shared))
    result["runs"] = {label: [f"{f.parent.name}/{f.name}" for f in folders.values()] for label, folders in done.items()}


def _crossing(deeper: str, shallower: str, runs: Mapping[str, Mapping[int, Path]]) -> str:
    """A sentence about when the deeper network's training error falls below the shallower one's."""
    steps = {s: crossing(curve(runs[deeper][s]), curve(runs[shallower][s])) for s in runs[deeper]}
    if not any(steps.values()):
        return f"The training error of {deeper} is not below that of {shallower} throughout the last tenth of training in any seed."
    seeds = [f"from iteration {at:,} on (seed {s})" if at is not None else f"not at the end (seed {s})" for s, at in steps.items()]
    return f"The training error of {deeper} stays below that of {shallower}: {', '.join(seeds)}."


def crossing(deeper: Curve, shallower: Curve) -> int | None:
    """Returns the step from which the first curve's training error stays below the second's, or None.

    It must stay below for at least the last tenth of the run.
    """
    other = dict(shallower.train)
    shared = [(step, error - other[step]) for step, error in deeper.train if step in other]
    start = None
    for step, difference in reversed(shared):
        if difference >= 0:
            break
        start = step
    return start if start is not None and start <= (1 - LAST) * shared[-1][0] else None


def _draw(plan: Plan, folders: Mapping[str, Sequence[Path]], result: dict[str, Any], path: Path) -> None:
    """Draws the learning curves and the effects of a result."""
    shown = {label for panel in plan.panels for label in panel.runs}
    curves = {label: [curve(folder) for folder in runs] for label, runs in folders.items() if label in shown}
    if any(curves.values()):
        title = f"{result['source']}, scale {result['scale']}: {result['data']}, {result['seeds']} seed"
        plots.curves(plan.panels, curves, path, title + "s" * (result["seeds"] > 1))
        result["picture"] = path.name
    if claims := [claim for claim in result["claims"] if claim["effect"]]:
        effects = path.with_name(f"{path.stem}-effects.png")
        plots.effects(claims, effects)
        result["effects_picture"] = effects.name
