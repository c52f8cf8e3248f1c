"""What the report shows for one task, besides what it shows for all of them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple

from reslearn.report.elements import Cell, PageSection
from reslearn.report.runs import R, RunRecord
from reslearn.report.text import Interval, Tile


class Measure(NamedTuple):
    """What a task is measured by. train, evals: keys of the train and eval lines of metrics.jsonl, with their names.

    title: of the learning curves. digits: decimals. falls: whether lower is better.
    """

    title: str
    train: dict[str, str]
    evals: dict[str, str]
    digits: int
    falls: bool

    @property
    def name(self) -> str:
        return next(iter(self.evals.values()))


class Score(NamedTuple):
    """The number that runs are compared by, percent. detail: how it was measured, if there are several ways."""

    value: float | None
    interval: Interval
    detail: str = ""


class TaskPage(ABC, Generic[R]):
    """The parts of the page that depend on the task. numbers: the result's metrics on one split, "test" or "validation"."""

    plural: ClassVar[str]
    subject: ClassVar[str]  # what was trained, before the network's name
    measure: ClassVar[Measure]
    by_class: ClassVar[str]  # the title of the table of class_values
    note: ClassVar[str]  # below the table that compares runs
    result: type[R]

    def stage(self, run: RunRecord[R]) -> str:
        """A note after the network's name where runs are compared."""
        return ""

    @abstractmethod
    def findings(self, result: R, split: str, numbers: Any) -> str:
        """Sentences, each after a space: how good the model is."""

    @abstractmethod
    def score(self, numbers: Any) -> Score: ...

    @abstractmethod
    def seed_measures(self, numbers: Any) -> dict[str, float | None]:
        """What is averaged over seeds, percent by name."""

    @abstractmethod
    def class_values(self, numbers: Any) -> dict[str, str]:
        """A number, as text, by class."""

    @abstractmethod
    def tiles(self, result: R, split: str, numbers: Any) -> list[Tile]: ...

    @abstractmethod
    def cells(self, result: R, numbers: Any) -> dict[str, Cell]:
        """The columns of a run in the table that compares runs."""

    def compared(self, runs: Sequence[RunRecord[R]]) -> list[PageSection]:
        """Sections that compare runs, after the learning curves."""
        return []

    @abstractmethod
    def details(self, result: R, split: str, numbers: Any, index: int) -> list[PageSection]:
        """Sections of one run's numbers. index: its color, and part of the names of its plots."""

    @abstractmethod
    def pictures(self, run: RunRecord[R], result: R) -> list[PageSection]: ...
