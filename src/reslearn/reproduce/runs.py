"""The trainings of experiments: finding and training their runs, and reading numbers from them."""

import hashlib
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from reslearn import data as datasets
from reslearn.data.boxes.annotated import AnnotatedSet
from reslearn.data.sets import DataSet
from reslearn.detect.sources import open_set
from reslearn.errors import Diverged, UserError
from reslearn.reproduce.experiment import Metric, Plan, Training
from reslearn.training import many
from reslearn.training.display import Display
from reslearn.training.folder import locked, read_facts
from reslearn.training.recipe import Recipe
from reslearn.training.request import TrainRequest, parse
from reslearn.training.resolve import resolve
from reslearn.training.run import begin, reopen, train_job
from reslearn.training.task import Job
from reslearn.weights.deepened import deepen_model

LAST = 0.1  # training errors are means over this final share of a run


class ProgressDisplay(Display):
    """Shows only the progress of a run, prefixed with the run's title."""

    def __init__(self, title: str, quiet: bool) -> None:
        super().__init__(quiet)
        self.title = title

    def say(self, line: str) -> None:
        """Passes on progress lines, which are printed this way without a terminal, and drops other lines."""
        if line.startswith(self.title):
            super().say(line)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        super().progress(f"{self.title}: {what}", done, total, note)


@dataclass(frozen=True)
class SeedRuns:
    """The runs of a training, one per seed. request, recipe: of seed 0. start: the runs that initialize these."""

    training: Training
    request: TrainRequest
    recipe: Recipe
    folder: Path
    start: "SeedRuns | None"

    def run(self, seed: int) -> Path:
        """The run folder of a seed."""
        return self.folder / f"seed-{seed}"

    def done(self, seed: int) -> bool:
        """Whether the run is finished."""
        return (self.run(seed) / "result.json").exists()

    def failed(self, seed: int) -> bool:
        """Whether the loss became NaN or infinite; training again would give the same result."""
        return (self.run(seed) / "nonfinite.json").exists() and not self.done(seed)

    def missing(self, seed: int) -> bool:
        """Whether the run needs to be trained or resumed."""
        return not self.done(seed) and not self.failed(seed)

    def job(self, seed: int, device: str) -> Job[Any, Any, Any]:
        """Starts or reopens the run of a seed."""
        folder = self.run(seed)
        if (folder / "recipe.json").exists():
            return reopen(folder, read_facts(folder), device, True)
        settings = {**self.request.settings, "seed": seed}
        if self.start is not None:
            settings["net.init"] = str(self._initial_model(self.start, seed))
        return begin(replace(self.request, settings=settings, out=folder, device=device))

    def _initial_model(self, start: "SeedRuns", seed: int) -> Path:
        """The model that initializes a run: the result of `start`, deepened if the networks differ."""
        if start.training.net == self.training.net:
            return start.run(seed)
        model = self.folder / f"start-{seed}.safetensors"
        model.parent.mkdir(parents=True, exist_ok=True)
        deepen_model(start.run(seed), self.training.net, model, data=self.request.data)
        return model


@cache
def open_annotated(source: str) -> AnnotatedSet:
    """Opens a data set with boxes by its path or its name in RESLEARN_DATA. Raises UserError if it has no test images."""
    path = Path(source) if Path(source).exists() else Path(os.environ.get("RESLEARN_DATA", "")) / source
    if not path.exists():
        raise UserError(f"no data set with boxes called '{source}': pass its folder, or set RESLEARN_DATA to its parent folder")
    opened = open_set(path, "train", "drop")
    if "test" not in opened.splits:
        raise UserError(f"{path} has no test split: add one, so that detectors are not evaluated on their training images")
    return opened


def open_data(source: str, task: str) -> DataSet | AnnotatedSet:
    """Opens the data set of a task's trainings. Raises UserError."""
    return datasets.open(source) if task == "classify" else open_annotated(source)


@cache
def _fingerprint(data: DataSet | AnnotatedSet) -> str:
    return data.fingerprint()


def find(plan: Plan, data: DataSet | AnnotatedSet, source: str, out: Path) -> dict[str, SeedRuns]:
    """Returns the runs of a plan by label. Each folder is named by the hash of its recipe, data and initialization."""
    runs: dict[str, SeedRuns] = {}
    path = source if isinstance(data, DataSet) else data.path
    for label, training in plan.trainings.items():
        start = runs[training.start] if training.start is not None else None
        request = parse(
            path, training.recipe, model=training.net, settings=training.settings, seed=0, task=training.task, quiet=True
        )
        recipe = resolve(request, data)[0]
        # Without unset keys, so that new recipe keys do not change the hash.
        facts = {"recipe": recipe.model_dump(mode="json", exclude_none=True), "data": _fingerprint(data)}
        if start is not None:
            facts["start"] = start.folder.name
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        runs[label] = SeedRuns(training, request, recipe, out / "runs" / f"{training.net}-{digest[:10]}", start)
    return runs


def train(trainings: Mapping[str, SeedRuns], labels: Sequence[str], seeds: int, device: str, quiet: bool) -> None:
    """Trains the missing runs of these labels and of those that initialize them. Can be called again after an interruption."""
    starts = {trainings[label].training.start for label in labels}
    chosen = {label: runs for label, runs in trainings.items() if label in labels or label in starts}
    missing = [(label, seed) for label, runs in chosen.items() for seed in range(seeds) if runs.missing(seed)]
    titles = {pair: f"run {i} of {len(missing)}, {pair[0]}, seed {pair[1]}" for i, pair in enumerate(missing, 1)}
    for label, runs in chosen.items():
        while left := [seed for seed in range(seeds) if runs.missing(seed) and (runs.start is None or runs.start.done(seed))]:
            with suppress(Diverged):  # recorded as a result; the other runs continue
                _train(runs, {seed: titles[label, seed] for seed in left}, device, quiet)


def _train(runs: SeedRuns, titles: Mapping[int, str], device: str, quiet: bool) -> None:
    """Trains the first of these seeds, or all of them concurrently if their steps are captured on a GPU."""
    with ExitStack() as stack:
        jobs: list[Job[Any, Any, Any]] = []
        for seed, title in titles.items():
            job = runs.job(seed, device)
            stack.enter_context(locked(job.folder))
            jobs.append(replace(job, display=ProgressDisplay(title, quiet or len(jobs) > 0)))
            if job.execution != "captured":
                break
        many.side_by_side(jobs) if len(jobs) > 1 else train_job(jobs[0])


@dataclass(frozen=True)
class Curve:
    """(step, error in percent) of a run: as logged in training, and as evaluated on held-out images."""

    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


def curve(folder: Path) -> Curve:
    """Reads the errors of a run."""
    lines = _metrics(folder)
    return Curve(
        [(line["step"], line["error"]) for line in lines if line["event"] == "train"],
        [(line["step"], line["top1_error"]) for line in lines if line["event"] == "eval"],
    )


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _result(folder: Path) -> dict[str, Any]:
    path = folder / "result.json"
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is damaged: delete it and repeat the command to resume from the last checkpoint") from None


def metric(folder: Path, name: Metric) -> float:
    """Reads a metric of a finished run. Test errors are of the last weights; without a test set, they are validation errors."""
    result = _result(folder)
    if name == "minutes":
        return result["seconds"] / 60
    if name in ("AP", "AP50", "AP75", "VOC10"):
        return result["last"]["test"][name]
    if name == "test_error":
        last = result["last"]
        return next(last[split]["top1_error"] for split in ("test", "val", "train") if split in last)
    lines = [line for line in _metrics(folder) if line["event"] == "train"]
    ending = [line for line in lines if line["step"] > (1 - LAST) * result["step"]] or lines[-1:]
    return statistics.fmean(line["error" if name == "train_error" else "loss"] for line in ending)
