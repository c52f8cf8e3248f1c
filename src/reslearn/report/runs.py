"""Reads and validates run folders (`recipe.json`, `metrics.jsonl`, `result.json`) at any stage of a run."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from reslearn.errors import UserError

SPLITS = {"val": "validation", "test": "test"}


class RunSection(BaseModel):
    """A JSON object of a run folder. Unknown keys are ignored, so runs of later versions can be opened."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True, frozen=True)


class DataFacts(RunSection):
    """The training data; `sizes` is (height, width) in pixels."""

    name: str = "unnamed data"
    classes: list[str] = []
    fingerprint: str = ""
    channels: int | None = None
    sizes: list[int] = []
    n: dict[str, int] = {}
    left_out: dict[str, Any] = {}
    faults: dict[str, int] = {}


class RunFacts(RunSection):
    """`recipe.json`: everything known before the first step."""

    recipe: dict[str, Any]
    task: str = "classify"
    command: str = ""
    data: DataFacts = DataFacts()
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    chose: list[str] = []


class SplitNumbers(RunSection):
    """The metrics of one split; n: number of images."""

    n: int


S = TypeVar("S", bound=RunSection)
N = TypeVar("N", bound=SplitNumbers)


class SplitResults(RunSection, Generic[N]):
    """The metrics of the model at one step."""

    step: int
    val: N | None = None
    test: N | None = None

    @property
    def measured(self) -> tuple[str, N] | None:
        """The split's display name and metrics: the test set's if available, else the validation set's."""
        numbers = self.test or self.val
        return (SPLITS["test" if self.test else "val"], numbers) if numbers else None


class RunResult(RunSection, Generic[N]):
    """`result.json`, which only finished runs have."""

    step: int
    epochs: float
    seconds: float
    images_per_s: float | None = None
    peak_memory_mb: float | None = None
    parameters: int | None = None
    last: SplitResults[N]
    best: SplitResults[N] | None = None


R = TypeVar("R", bound=RunResult[Any])


@dataclass(frozen=True)
class RunFolder:
    """A run folder of any task. `label` is unique within a report."""

    folder: Path
    label: str
    facts: RunFacts


@dataclass(frozen=True)
class RunRecord(RunFolder, Generic[R]):
    """The contents of a run folder. train, evals: lines of metrics.jsonl in order of steps. split: the display name of the split
    that `evals` were measured on. result: None until the run has finished. epoch: NaN if unknown.
    """

    result: R | None
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    split: str
    step: int
    epoch: float

    @property
    def measured(self) -> tuple[str, Any] | None:
        """The last evaluation's split and metrics."""
        return self.result.last.measured if self.result else None

    @property
    def loss_terms(self) -> list[str]:
        """The names of the loss terms."""
        return list(dict.fromkeys(term for line in (*self.train, *self.evals) for term in line["losses"]))


def open_folders(folders: Sequence[Path]) -> list[RunFolder]:
    """Returns the run folders in the given order, with unique labels.

    Raises:
        UserError: no folder was given, one is given twice, is missing or is not a run folder, or its recipe.json is broken.
    """
    if not folders:
        raise UserError("a report needs at least one run folder")
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UserError(f"{paths[i]}: run folder given twice")
        if not path.is_dir():
            raise UserError(f"{paths[i]}: no such run folder")
        if not (path / "recipe.json").is_file():
            raise UserError(f"{paths[i]}: not a run folder: it has no recipe.json")
    return [
        RunFolder(path, label, _read_json(path / "recipe.json", RunFacts))
        for path, label in zip(paths, _labels(resolved), strict=True)
    ]


def read_run(opened: RunFolder, result_type: type[R]) -> RunRecord[R]:
    """Read a run's result and metrics. Raises UserError for a broken file."""
    path = opened.folder / "result.json"
    result = _read_json(path, result_type) if path.exists() else None
    lines = _read_lines(opened.folder / "metrics.jsonl")
    evals: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["event"] == "eval" and line.get("split") != "train":
            evals.setdefault(str(line.get("split")), []).append(line)
    # The split evaluated during training, not the one evaluated once at the end.
    split = max(evals, key=lambda name: (len(evals[name]), name == "val"), default="val")
    newest = lines[-1] if lines else {"step": 0}
    return RunRecord(
        **vars(opened),
        result=result,
        train=_by_step(line for line in lines if line["event"] == "train"),
        evals=_by_step(evals.get(split, [])),
        split=SPLITS.get(split, split),
        step=result.step if result else newest["step"],
        epoch=result.epochs if result else _number(newest.get("epoch")),
    )


def column(lines: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Returns the values of a key, float64 (n,); NaN if a line has no number."""
    return np.array([_number(line.get(key)) for line in lines], dtype=np.float64)


def latest(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    """Returns the value of a key in the last line; None if it is not a finite number."""
    value = _number(lines[-1].get(key)) if lines else math.nan
    return value if math.isfinite(value) else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _read_json(path: Path, kind: type[S]) -> S:
    try:
        return kind.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
    except (ValueError, RecursionError) as error:  # broken JSON, or bytes that are not UTF-8
        raise UserError(f"{path}: invalid JSON: {error}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the train and eval lines of a `metrics.jsonl`, which may be missing or end in the middle of a line."""
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # the run was killed or is still writing
                break
            raise UserError(f"{path}, line {number}: invalid JSON: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object")
        if record.get("event") in ("train", "eval"):
            if type(record.get("step")) is not int:
                raise UserError(f"{path}, line {number}: 'step' is not an integer")
            losses = record.get("losses")
            records.append({**record, "losses": losses if isinstance(losses, dict) else {}})
    return records


def _by_step(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorts lines by step. A resumed run repeats the steps since its last checkpoint; the later line counts."""
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Returns the folders' names, preceded by as many parent folders as make them unique."""
    labels = []
    for folder in folders:
        tails = (folder.parts[-depth:] for depth in range(1, 1 + len(folder.parts)))
        unique = next(tail for tail in tails if sum(other.parts[-len(tail) :] == tail for other in folders) == 1)
        labels.append(str(Path(*unique)))
    return labels
