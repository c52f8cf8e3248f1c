"""Experiments as data: the source, the trainings, the published numbers and the effects to test."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")
SEEDS: dict[Scale, int] = {"smoke": 1, "small": 3, "paper": 1}  # per training; plans may differ
Metric = Literal["test_error", "train_error", "train_loss", "minutes", "AP", "AP50", "AP75", "VOC10"]
METRICS: dict[Metric, str] = {
    "test_error": "test error, %",
    "train_error": "training error, %",
    "train_loss": "training loss",
    "minutes": "training time, minutes",
    "AP": "test AP at IoU 0.5 to 0.95, %",
    "AP50": "test AP at IoU 0.5, %",
    "AP75": "test AP at IoU 0.75, %",
    "VOC10": "test AP at IoU 0.5 (VOC 2010), %",
}


class Dataset(NamedTuple):
    """A data set to run on: its name or path, and whether it has color images of 32 x 32 px like CIFAR."""

    source: str
    cifar: bool = True


@dataclass(frozen=True)
class Training:
    """A network and a recipe, trained once per seed. Experiments share runs with the same recipe and data.

    start: label of the training whose result initializes this one, deepened if needed (see weights.deepened).
    """

    net: str
    recipe: str = "cifar10-paper"
    settings: tuple[str, ...] = ()
    start: str | None = None
    task: str = "classify"


@dataclass(frozen=True)
class Comparison:
    """A row of the result: our value next to the published one. run: label of a training.

    tolerance: largest difference, in the metric's unit, at which a run under the paper's protocol reproduces the value.
    """

    what: str
    run: str
    published: float | None = None
    metric: Metric = "test_error"
    tolerance: float = 0.5


@dataclass(frozen=True)
class Effect:
    """A claim that a weighted sum of a metric over trainings is above 0. terms: weights by label."""

    text: str
    terms: Mapping[str, float]
    metric: Metric = "test_error"


def minus(more: str, less: str) -> dict[str, float]:
    """The terms of the claim that a metric is higher for one training than for another."""
    return {more: 1.0, less: -1.0}


@dataclass(frozen=True)
class Panel:
    """One plot of learning curves: its title and the labels of trainings."""

    title: str
    runs: tuple[str, ...]


class ExperimentOptions(NamedTuple):
    """Options of `Plan.analyze` and `Plan.run`.

    data: the data set given by the user, a name or path. default_data: the data set to use otherwise. seeds: runs per training.
    out: the folder that contains `runs`. say: prints a line of progress. training: False to use only finished runs.
    """

    data: str | None
    default_data: str
    seeds: int
    out: Path
    device: str
    say: Callable[[str], None]
    training: bool = True
    quiet: bool = False

    @property
    def source(self) -> str:
        """The data set for models whose training data is unknown."""
        return self.data or self.default_data


Models = Mapping[str, Sequence[Path]]
"""Label -> one model file or run folder per seed."""


class Measured(NamedTuple):
    """Rows and claims, as in the result JSON, that are measured rather than read from runs.

    draw(path) writes a plot and optionally a second one, PATH-effects.png, with captions. data: name of the data set measured on.
    """

    rows: list[dict[str, Any]]
    claims: Sequence[dict[str, Any]] = ()
    draw: Callable[[Path], None] | None = None
    deviations: tuple[str, ...] = ()
    caption: str = ""
    second_caption: str = ""
    data: str = ""


@dataclass(frozen=True)
class Plan:
    """An experiment at one scale. deviations: from the paper's protocol.

    count: measures without training or data. analyze: measures models, trained or given. run: trains and measures by itself.
    minutes: estimated time of a plan without trainings, or of one detector run.
    """

    trainings: Mapping[str, Training] = field(default_factory=dict)
    seeds: int = 1
    rows: tuple[Comparison, ...] = ()
    effects: tuple[Effect, ...] = ()
    panels: tuple[Panel, ...] = ()
    crossings: tuple[tuple[str, str], ...] = ()  # (deeper, shallower): report when the deeper one's training error falls below
    deviations: tuple[str, ...] = ()
    count: Callable[[], Measured] | None = None
    analyze: Callable[[Models, ExperimentOptions], Measured] | None = None
    run: Callable[[ExperimentOptions], Measured] | None = None
    minutes: float = 0.1


@dataclass(frozen=True)
class Experiment:
    """A table or figure. name: on the command line. see: what to look for, for readers who have not read the paper.

    plans: a function of the data set for each supported scale. data: the default data set.
    """

    name: str
    title: str
    source: str
    see: str
    plans: Mapping[Scale, Callable[[Dataset], Plan]] = field(default_factory=dict)
    data: str = "cifar10"
    small_data: str | None = "fashion-sample"  # replaces `data` at smoke scale, and at small scale if `data` is missing
    task: str = "classify"  # "detect": the data set has boxes

    @property
    def of_given_models(self) -> bool:
        """Whether it only measures given models."""
        return [*self.plans] == ["paper"] and not self.trains("paper") and self.plans["paper"](Dataset("")).analyze is not None

    def trains(self, scale: Scale) -> bool:
        """Whether it trains anything at a scale."""
        return bool(self.plans[scale](Dataset(self.data)).trainings)


def scales(plan: Callable[[Dataset, Scale], Plan], *supported: Scale) -> dict[Scale, Callable[[Dataset], Plan]]:
    """The plans for the supported scales, by default all."""
    return {scale: (lambda data, scale=scale: plan(data, scale)) for scale in supported or SCALES}


def on_boxes(name: str, title: str, source: str, see: str, plan: Callable[[Dataset, Scale], Plan]) -> Experiment:
    """An experiment on a small data set with boxes, which has no paper scale."""
    return Experiment(name, title, source, see, scales(plan, "smoke", "small"), data="bccd", small_data=None, task="detect")
