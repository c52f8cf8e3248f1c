"""An experiment as data: its source, what it trains, the published numbers and the effects that it tests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")
SEEDS: dict[Scale, int] = {"smoke": 1, "small": 3, "paper": 1}  # unless a plan has another number
Metric = Literal["test_error", "train_error", "train_loss", "minutes", "AP", "AP50", "AP75", "VOC10"]
METRICS: dict[Metric, str] = {
    "test_error": "test error, %",
    "train_error": "training error, %",
    "train_loss": "training loss",
    "minutes": "training time, minutes",
    "AP": "test AP at IoU .5 to .95, %",
    "AP50": "test AP at IoU .5, %",
    "AP75": "test AP at IoU .75, %",
    "VOC10": "test AP at IoU .5 by VOC's rule, %",
}
Say = Callable[[str], None]


class Dataset(NamedTuple):
    """A data set to run on: its name or path, and whether its images are color of 32 x 32 px, as CIFAR's are."""

    source: str
    cifar: bool = True


@dataclass(frozen=True)
class Training:
    """A network under a recipe, trained with every seed. Runs with the same recipe and data are shared.

    start: the label of a training whose result, made deeper (see weights.deepened), this one starts from. task: see train.
    """

    net: str
    recipe: str = "cifar10-paper"
    settings: tuple[str, ...] = ()
    start: str | None = None
    task: str = "classify"


@dataclass(frozen=True)
class Comparison:
    """A row of the result: our value beside the published one. run: the label of a training.

    tolerance: the largest difference, in the metric's unit, at which a run under the paper's protocol reproduces the value.
    """

    what: str
    run: str
    published: float | None = None
    metric: Metric = "test_error"
    tolerance: float = 0.5


@dataclass(frozen=True)
class Effect:
    """A claim that a weighted sum of a metric over trainings is above 0. terms: the weight of each label."""

    text: str
    terms: Mapping[str, float]
    metric: Metric = "test_error"


def minus(more: str, less: str) -> dict[str, float]:
    """The terms of the claim that one training has more of a metric than another."""
    return {more: 1.0, less: -1.0}


@dataclass(frozen=True)
class Panel:
    """Curves in one plot: a title, and labels of trainings."""

    title: str
    runs: tuple[str, ...]


class ExperimentOptions(NamedTuple):
    """How an experiment that is more than its trainings is to run.

    data: a name or path, where one was given. default_data: the one to use otherwise. seeds: runs per training. out: the folder
    whose `runs` hold them. training: False allows only finished runs.
    """

    data: str | None
    default_data: str
    seeds: int
    out: Path
    device: str
    say: Say
    training: bool = True
    quiet: bool = False

    @property
    def source(self) -> str:
        """The data set to use where models do not say which one they were trained on."""
        return self.data or self.default_data


Models = Mapping[str, Sequence[Path]]
"""Label -> a model file or run folder of each seed."""


class Measured(NamedTuple):
    """Results that are measured rather than read from runs: rows and claims as they stand in the result JSON.

    draw(path) writes a picture, and optionally a second one, PATH-effects.png; the captions say what they show.
    data: the name of the data set that was measured on.
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
    """An experiment at one scale. deviations: from the paper's protocol, in words. minutes: of a plan that trains nothing, or of a
    detector's run.

    count: measures without a network. analyze: measures trained models, or given ones. run: trains and measures in the
    experiment's own way.
    """

    trainings: Mapping[str, Training] = field(default_factory=dict)
    seeds: int = 1
    rows: tuple[Comparison, ...] = ()
    effects: tuple[Effect, ...] = ()
    panels: tuple[Panel, ...] = ()
    crossings: tuple[tuple[str, str], ...] = ()  # (deeper, shallower): when the first one's training error falls below
    deviations: tuple[str, ...] = ()
    count: Callable[[], Measured] | None = None
    analyze: Callable[[Models, ExperimentOptions], Measured] | None = None
    run: Callable[[ExperimentOptions], Measured] | None = None
    minutes: float = 0.1


@dataclass(frozen=True)
class Experiment:
    """A table or figure. name: as on the command line. see: what to look for, for a reader who has not read the paper.

    plans: for each scale that it has, a function of the data set. data: the default data set.
    """

    name: str
    title: str
    source: str
    see: str
    plans: Mapping[Scale, Callable[[Dataset], Plan]] = field(default_factory=dict)
    data: str = "cifar10"
    small_data: str | None = "fashion-sample"  # at small and smoke scale, where `data` is not there
    task: str = "classify"  # of its trainings; "detect": its data is a set with boxes

    @property
    def of_given_models(self) -> bool:
        """Whether it only measures models that are given."""
        return [*self.plans] == ["paper"] and not self.trains("paper") and self.plans["paper"](Dataset("")).analyze is not None

    def trains(self, scale: Scale) -> bool:
        """Whether it trains anything at a scale."""
        return bool(self.plans[scale](Dataset(self.data)).trainings)


def scales(plan: Callable[[Dataset, Scale], Plan], *which: Scale) -> dict[Scale, Callable[[Dataset], Plan]]:
    """A plan at some scales, by default at all of them."""
    return {scale: (lambda data, scale=scale: plan(data, scale)) for scale in which or SCALES}
