"""Run folders, read and checked: `recipe.json`, `metrics.jsonl`, `result.json` and `images/`, in any state of a run."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reslearn.errors import UserError


class Part(BaseModel):
    """Unknown keys pass: a report of today should open the runs of tomorrow."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True, frozen=True)


File = TypeVar("File", bound=Part)


class Data(Part):
    """What the run was trained on; `sizes` is (height, width) in pixels."""

    name: str = "unnamed data"
    classes: list[str] = []
    fingerprint: str = ""
    channels: int | None = None
    sizes: list[int] = []
    n: dict[str, int] = {}
    left_out: dict[str, Any] = {}
    faults: dict[str, int] = {}


KINDS = {"classify": "tells classes apart", "detect": "finds objects", "localize": "says where one object is"}


class Setup(Part):
    """`recipe.json`, or `localize.json`: all that was known before the first step."""

    recipe: dict[str, Any]
    task: str = ""
    command: str = ""
    data: Data = Data()
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    chose: list[str] = []

    @property
    def kind(self) -> str:
        """What was trained: a key of KINDS."""
        return next((kind for kind in ("detect", "localize") if kind in (self.task, self.recipe.get("task"))), "classify")

    @model_validator(mode="before")
    @classmethod
    def _of_localize(cls, said: Any) -> Any:
        """What `localize.json` calls by other names."""
        if not isinstance(said, dict) or not isinstance(plan := said.get("plan"), dict):
            return said
        card = said["card"] if isinstance(said.get("card"), dict) else {}
        recipe = {"stage": said.get("command", "train"), **plan, "net": card.get("net")}
        return {**said, "task": "localize", "recipe": recipe, "command": said.get("called", "")}


class Outcome(Part):
    """`result.json`, which only a finished run has: the part that runs of all kinds share."""

    step: int
    epochs: float
    seconds: float
    images_per_s: float | None = None
    peak_memory_mb: float | None = None
    parameters: int | None = None


class Bin(Part):
    """One bin of confidence; all but `n` in percent."""

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


class PerClass(Part):
    """Accuracy of one class, percent; None where the set has no image of it."""

    name: str = Field(alias="class")
    n: int
    accuracy: float | None


class Metrics(Part):
    """`evaluation.metrics` as read back; errors and the interval in percent."""

    n: int
    loss: float | None = None
    top1_error: float
    top1_interval: tuple[float, float] | None = None
    top5_error: float | None = None
    calibration_error: float | None = None
    calibration_bins: list[Bin] = []
    per_class: list[PerClass] = []
    confusion: list[list[int]] = []

    @model_validator(mode="after")
    def _square(self) -> Self:
        if any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError("the confusion matrix is not square")
        if self.confusion and len(self.confusion) != len(self.per_class):
            raise ValueError(f"{len(self.confusion)} rows of confusion for {len(self.per_class)} classes")
        return self


class Snapshot(Part):
    """The network at one step, measured."""

    step: int
    val: Metrics | None = None
    test: Metrics | None = None


class WorstImage(Part):
    """An image with a high loss; `probability`, in [0, 1], is that of the true class."""

    image: str
    name: str = ""
    label: str
    predicted: str
    loss: float
    probability: float


class Result(Outcome):
    """`result.json` of a classifier."""

    last: Snapshot
    best: Snapshot | None = None
    worst: list[WorstImage] = []
    worst_split: str = ""


@dataclass(frozen=True)
class Curve:
    """Measurements in the order of their steps: four float64 arrays of one length, NaN where a line has no number.

    step: iterations; error: percent; loss: nats; lr: the learning rate.
    """

    step: np.ndarray
    error: np.ndarray
    loss: np.ndarray
    lr: np.ndarray


@dataclass(frozen=True)
class Folder:
    """A run folder of any kind. `label` tells it from the others of a report."""

    folder: Path
    label: str
    setup: Setup


@dataclass(frozen=True)
class AnyRun(Folder):
    """What runs of all kinds have: `result` is None until the run has finished.

    step, epoch: how far it has come; epoch is NaN where nothing tells.
    """

    step: int
    epoch: float
    result: Outcome | None


@dataclass(frozen=True)
class Run(AnyRun):
    """A run of a classifier."""

    result: Result | None
    train: Curve
    held_out: Curve
    held_out_split: str


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs of classifiers, as `open_folders` and `read_run` have them."""
    return [read_run(folder) for folder in open_folders(folders)]


def open_folders(folders: Sequence[Path]) -> list[Folder]:
    """The run folders in the order given, with labels that differ.

    Raises:
        UserError: no folder was given, one is given twice, is missing or is no run folder, or a file in it is broken.
    """
    if not folders:
        raise UserError("a report needs at least one run folder")
    paths = [Path(folder) for folder in folders]
    real = [path.resolve() for path in paths]
    for i, path in enumerate(real):
        if path in real[:i]:
            raise UserError(f"{paths[i]}: this run folder is given twice")
    setups = [_read_setup(path) for path in paths]
    names = [str(setup.recipe.get("name") or path.name) for setup, path in zip(setups, real, strict=True)]
    labels = _labels(names, real)
    return [Folder(path, label, setup) for path, label, setup in zip(paths, labels, setups, strict=True)]


def most_confused(confusion: Sequence[Sequence[int]], classes: Sequence[str], k: int = 10) -> list[dict[str, Any]]:
    """The k most frequent mistakes, `[{"true", "predicted", "n", "share"}]`, most frequent first; ties by class order.

    confusion: K x K, rows the true class; share: percent of the images of the true class. Fewer than k are returned
    where fewer kinds of mistake were made.
    """
    if len(confusion) != len(classes) or any(len(row) != len(classes) for row in confusion):
        raise ValueError(f"the confusion matrix does not fit {len(classes)} classes")
    mistakes = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n > 0 and i != j]
    mistakes.sort(key=lambda mistake: (-mistake[0], mistake[1], mistake[2]))
    return [{"true": classes[i], "predicted": classes[j], "n": n, "share": 100 * n / sum(confusion[i])} for n, i, j in mistakes[:k]]


def _read_setup(folder: Path) -> Setup:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    name = next((name for name in ("recipe.json", "localize.json") if (folder / name).is_file()), None)
    if name is None:
        raise UserError(f"{folder}: not a run folder: it has no recipe.json, nor localize.json")
    return read_json(folder / name, Setup)


def read_run(opened: Folder) -> Run:
    """A classifier's run. Raises UserError for a broken file."""
    folder = opened.folder
    result = read_json(folder / "result.json", Result) if (folder / "result.json").exists() else None
    lines = read_lines(folder / "metrics.jsonl")
    split, held_out = followed(lines)
    return Run(
        **vars(opened),
        train=_curve((line for line in lines if line["event"] == "train"), "error"),
        held_out=_curve(held_out, "top1_error"),
        held_out_split=split,
        **progress(lines, result),
        result=result,
    )


def followed(lines: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The split that was followed through training, not the one looked at once at the end, and its eval lines."""
    evals: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["event"] == "eval" and line.get("split") != "train":
            evals.setdefault(str(line.get("split")), []).append(line)
    split = max(evals, key=lambda name: (len(evals[name]), name == "val"), default="val")
    return split, evals.get(split, [])


def progress(lines: Sequence[dict[str, Any]], result: Outcome | None) -> dict[str, Any]:
    """How far a run has come: its step and epoch."""
    newest = lines[-1] if lines else {}
    return (
        {"step": result.step, "epoch": result.epochs}
        if result
        else {"step": newest.get("step", 0), "epoch": number(newest, "epoch")}
    )


def read_json(path: Path, kind: type[File]) -> File:
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The train and eval lines of a `metrics.jsonl`, which may be missing or end in the middle of a line."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # the run was killed, or is writing just now
                break
            raise UserError(f"{path}, line {number}: not readable as JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if record.get("event") in ("train", "eval"):
            if type(record.get("step")) is not int:
                raise UserError(f"{path}, line {number}: its 'step' is not a whole number")
            found.append(record)
    return found


def _curve(lines: Iterable[dict[str, Any]], error: str) -> Curve:
    ordered = in_order(lines)
    columns = [[number(line, key) for line in ordered] for key in ("step", error, "loss", "lr")]
    return Curve(*(np.array(column, dtype=np.float64) for column in columns))


def in_order(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By rising step. A resumed run repeats the steps since its last checkpoint: the later line is the one that counts."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def number(line: dict[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _labels(names: list[str], folders: list[Path]) -> list[str]:
    """The names; with as much of the folder's path as tells them apart where a name comes more than once."""
    labels = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        same = [i for i, other in enumerate(names) if other == name]
        for depth in range(1, 1 + max(len(folders[i].parts) for i in same)):
            tails = ["/".join(folders[i].parts[-depth:]) for i in same]
            if len(set(tails)) == len(tails):
                for i, tail in zip(same, tails, strict=True):
                    labels[i] = f"{name} ({tail})"
                break
    return labels
