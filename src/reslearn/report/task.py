"""The interface of the task-specific parts of a report."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple

from reslearn.report.elements import Cell, PageSection
from reslearn.report.runs import R, RunRecord
from reslearn.report.text import Interval, Tile


class Measure(NamedTuple):
    """The metric of a task. title: of its learning curves. train, evals: keys of the train and eval lines of metrics.jsonl, with
    their display names. digits: decimals. falls: whether lower is better.
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
    """The value that runs are compared by, in percent. detail: the test protocol, if there are several."""

    value: float | None
    interval: Interval
    detail: str = ""


class TaskPage(ABC, Generic[R]):
    """The task-specific parts of a page. split, numbers: "test" or "validation", and the result's metrics on that split."""

    plural: ClassVar[str]
    subject: ClassVar[str]  # words before the network's name
    measure: ClassVar[Measure]
    by_class: ClassVar[str]  # title of the table of class_values
    note: ClassVar[str]  # below the table that compares runs
    result: type[R]

    def stage(self, run: RunRecord[R]) -> str:
        """The run's training stage, for a task with several."""
        return ""

    @abstractmethod
    def findings(self, result: R, split: str, numbers: Any) -> str:
        """Sentences about the results, each preceded by a space."""

    @abstractmethod
    def score(self, numbers: Any) -> Score: ...

    @abstractmethod
    def seed_measures(self, numbers: Any) -> dict[str, float | None]:
        """The metrics to average over seeds, in percent by name."""

    @abstractmethod
    def class_values(self, numbers: Any) -> dict[str, str]:
        """The formatted metric of each class."""

    @abstractmethod
    def tiles(self, result: R, split: str, numbers: Any) -> list[Tile]: ...

    @abstractmethod
    def cells(self, result: R, numbers: Any) -> dict[str, Cell]:
        """The run's columns in the table that compares runs."""

    def compared(self, runs: Sequence[RunRecord[R]]) -> list[PageSection]:
        """Sections that compare the runs, placed after the learning curves."""
        return []

    @abstractmethod
    def details(self, result: R, split: str, numbers: Any, index: int) -> list[PageSection]:
        """Sections with one run's metrics. index: its page color, also used in the names of its plots."""

    @abstractmethod
    def pictures(self, run: RunRecord[R], result: R) -> list[PageSection]: ...
