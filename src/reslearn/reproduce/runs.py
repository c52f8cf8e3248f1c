"""The trainings of experiments: found again by what they are, trained where they are missing, and what is read from them."""

import hashlib
import json
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from reslearn import data as datasets
from reslearn.data.sets import DataSet
from reslearn.detect import task as detection
from reslearn.detect.recipes import DETECTION
from reslearn.detect.task import Annotated
from reslearn.errors import Diverged, Interrupted, UserError
from reslearn.reproduce.experiment import Dataset, Metric, Plan, Training
from reslearn.training import many
from reslearn.training.display import Display
from reslearn.training.folder import locked, read_facts
from reslearn.training.resolve import resolve
from reslearn.training.run import begin, reopen, train_job
from reslearn.weights.deepened import deepen_model

LAST = 0.1  # training errors are means over this last share of a run


class Brief(Display):
    """Progress of one run among many, and nothing else."""

    def __init__(self, title: str, quiet: bool) -> None:
        super().__init__(quiet)
        self.title = title

    def say(self, line: str) -> None:
        """Only the lines of progress, where there is no terminal."""
        if line.startswith(self.title):
            super().say(line)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """With the run's own title before it."""
        super().progress(f"{self.title}: {what}", done, total, note)

    def train(self, line: dict[str, Any], total: int, images_per_s: float) -> None:
        """Nothing."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Cached:
    """A training with its folder, in which each seed has one. recipe: of seed 0."""

    training: Training
    recipe: Any
    folder: Path

    def seed(self, seed: int) -> Path:
        """The run folder of a seed."""
        return self.folder / f"seed-{seed}"

    def done(self, seed: int) -> bool:
        """Whether a seed has been trained to its end."""
        return (self.seed(seed) / "result.json").exists()

    def failed(self, seed: int) -> bool:
        """Whether its loss stopped being a number: it would do so again."""
        return (self.seed(seed) / "nonfinite.json").exists() and not self.done(seed)

    def waits(self, seed: int) -> bool:
        """Whether there is something left to train."""
        return not self.done(seed) and not self.failed(seed)


Data = DataSet | Annotated


@cache
def _fingerprint(data: Data) -> str:
    return data.fingerprint()


@cache
def open_data(source: str, task: str) -> Data:
    """What trainings of a task run on. Raises UserError."""
    if task == "classify":
        return datasets.open(source)
    path = Path(source) if Path(source).exists() else Path(os.environ.get("RESLEARN_DATA", "")) / source
    if not path.exists():
        raise UserError(f"no set with boxes called '{source}': give its folder, or set RESLEARN_DATA to the folder that holds it")
    opened = detection.open_set(path, "train", "drop")
    if "test" not in opened.splits:
        raise UserError(f"{path} has no test split: detectors would be judged by images that they are trained on")
    return opened


def _resolved(training: Training, data: Data) -> Any:
    if isinstance(data, Annotated):
        splits = data.to_train("train")
        return resolve(splits, training.recipe, training.net, training.settings, 0, family=DETECTION)[0]
    return resolve(data, training.recipe, training.net, training.settings, 0)[0]


def find(plan: Plan, data: Data, out: Path) -> dict[str, Cached]:
    """The trainings of a plan by label, each in a folder that is named by the hash of its recipe, its data and its start."""
    found: dict[str, Cached] = {}
    fingerprint = _fingerprint(data)
    for label, training in plan.trainings.items():
        recipe = _resolved(training, data)
        # What a recipe leaves unset is left out, so that a key that comes new to recipes changes no hash.
        facts = {"recipe": recipe.model_dump(mode="json", exclude_none=True), "data": fingerprint}
        if training.start is not None:
            facts["start"] = found[training.start].folder.name
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        found[label] = Cached(training, recipe, out / "runs" / f"{training.net}-{digest[:10]}")
    return found


def train(plan: Plan, source: Dataset, data: Data, seeds: int, out: Path, device: str, quiet: bool, labels: Sequence[str]) -> None:
    """Train what is missing of a plan's labels; runs that have begun go on. After Interrupted it can be called again."""
    found = find(plan, data, out)
    labels = [label for label in found if label in _with_starts(plan, labels)]
    missing = [(label, seed) for label in labels for seed in range(seeds) if found[label].waits(seed)]
    for label in labels:
        cached = found[label]
        waiting = [seed for seed in range(seeds) if cached.waits(seed)]
        if cached.training.start is not None:
            waiting = [seed for seed in waiting if found[cached.training.start].done(seed)]
        for seed in waiting:
            if not (cached.seed(seed) / "recipe.json").exists():
                t, start = cached.training, _start(cached, found, source, seed)
                net = None if start is not None else t.net
                of = source.source if isinstance(data, DataSet) else str(data.path)
                begin(of, net, t.recipe, t.settings, seed, cached.seed(seed), device, True, start, t.task)
        titles = [f"run {missing.index((label, seed)) + 1} of {len(missing)}, {label}, seed {seed}" for seed in waiting]
        while waiting:
            with suppress(Diverged):  # a result too; the others go on
                _go_on([cached.seed(seed) for seed in waiting], titles, device, quiet)
            left = [(seed, title) for seed, title in zip(waiting, titles, strict=True) if cached.waits(seed)]
            waiting, titles = [seed for seed, _ in left], [title for _, title in left]


def _with_starts(plan: Plan, labels: Sequence[str]) -> set[str]:
    starts = {plan.trainings[label].start for label in labels}
    return {*labels, *(start for start in starts if start is not None)}


def _start(cached: Cached, found: dict[str, Cached], source: Dataset, seed: int) -> Path | None:
    """What a run starts from: its start's result, made deeper where this network is another."""
    if cached.training.start is None:
        return None
    if found[cached.training.start].training.net == cached.training.net:
        return found[cached.training.start].seed(seed)
    model = cached.folder / f"start-{seed}.safetensors"
    model.parent.mkdir(parents=True, exist_ok=True)
    deepen_model(found[cached.training.start].seed(seed), cached.training.net, model, data=source.source)
    return model


def _go_on(folders: Sequence[Path], titles: Sequence[str], device: str, quiet: bool) -> None:
    """Runs that have begun to their ends: side by side where a GPU captures their steps, else one after the other."""
    facts = [read_facts(folder) for folder in folders]
    together = len(folders) > 1 and torch.cuda.is_available() and all(f["machine"].get("step") == "captured" for f in facts)
    groups = [range(len(folders))] if together else [[i] for i in range(len(folders))]
    for group in groups:
        with ExitStack() as locks:
            jobs = []
            for i in group:
                locks.enter_context(locked(folders[i]))
                display = Brief(titles[i], quiet or i != group[0])
                jobs.append(replace(reopen(folders[i], facts[i], device, True), display=display))
            try:
                if together:
                    many.side_by_side(jobs)
                else:
                    train_job(jobs[0])
            except Interrupted as signal:
                raise Interrupted(signal.number) from None


def steps(recipe: Any, data: DataSet | None = None) -> int:
    """How many steps a recipe takes (on 45,000 images where no data is at hand)."""
    images = len(data.splits["train"]) if data is not None and "train" in data.splits else 45_000
    return recipe.schedule.total(images, recipe.batch.size)


@dataclass(frozen=True)
class Curve:
    """Of one run: training error by step, as logged on the way, and the held-out error where it was measured."""

    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


def curve(folder: Path) -> Curve:
    """The errors of a run, in percent."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Curve(
        [(line["step"], line["error"]) for line in lines if line["event"] == "train"],
        [(line["step"], line["top1_error"]) for line in lines if line["event"] == "eval"],
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: remove it, and the same command trains on from the last checkpoint") from None


def metric(folder: Path, name: Metric) -> float:
    """A finished run's number. Test errors are those of the last weights; where there is no test set, held-out ones."""
    result = _read(folder / "result.json")
    if name == "minutes":
        return result["seconds"] / 60
    if name in ("AP", "AP50", "AP75", "VOC10"):
        return result["last"]["test"][name]
    if name == "test_error":
        last = result["last"]
        return next(last[split]["top1_error"] for split in ("test", "val", "train") if split in last)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["event"] == "train"]
    ending = [line for line in events if line["step"] > (1 - LAST) * result["step"]] or events[-1:]
    return statistics.fmean(line["error" if name == "train_error" else "loss"] for line in ending)
