"""An experiment as data: its source, what it trains, the published numbers and the effects that it tests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "paper")
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
    """What an experiment is asked to run on: a name or path for data.open, and whether it is CIFAR's kind."""

    source: str
    cifar: bool = True


@dataclass(frozen=True)
class Training:
    """One line of an experiment: a network under a recipe, for every seed. Runs with the same recipe and data are shared.

    start: the label of a training whose result, made deeper (see weights.deepened), this one starts from. task: see train.
    """

    net: str
    recipe: str = "cifar10-paper"
    settings: tuple[str, ...] = ()
    start: str | None = None
    task: str = "classify"


@dataclass(frozen=True)
class Row:
    """A line of the result: ours beside the published value. run: the label of a training.

    tolerance: how far, in the metric's unit, a run under the paper's protocol may be off and still be the same.
    """

    what: str
    run: str
    published: float | None = None
    metric: Metric = "test_error"
    tolerance: float = 0.5


@dataclass(frozen=True)
class Effect:
    """A claim that a sum of a metric over trainings, each with its weight, is above 0: in each seed, then over seeds."""

    text: str
    terms: Mapping[str, float]
    metric: Metric = "test_error"


@dataclass(frozen=True)
class Panel:
    """Curves that are drawn together: a title, and labels of trainings."""

    title: str
    runs: tuple[str, ...]


class Look(NamedTuple):
    """How models are looked into. data: a name or path; None for the one that each was trained on, where it says which.
    usual: for those that do not.
    """

    data: str | None
    usual: str
    device: str
    say: Say


class Work(NamedTuple):
    """What an experiment that trains in its own way is given. source: a name or path. seeds: how many of each training. out: the
    folder in whose `runs` they are kept. training: False where nothing may be trained.
    """

    source: str
    seeds: int
    out: Path
    device: str
    say: Say
    training: bool


class Measured(NamedTuple):
    """What is measured rather than read from runs: rows and claims as they stand in the result, and a picture's author.

    draw(path) writes the picture, and perhaps a second one, PATH-effects.png; the captions say what to see in them.
    data: the name of what it was measured on.
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

    measure: what is found without a network. of_models: what is found in those trained, or in given ones: label -> a model of
    each seed. work: what is trained and found by the experiment itself.
    """

    trainings: Mapping[str, Training] = field(default_factory=dict)
    seeds: int = 1
    rows: tuple[Row, ...] = ()
    effects: tuple[Effect, ...] = ()
    panels: tuple[Panel, ...] = ()
    crossings: tuple[tuple[str, str], ...] = ()  # (deeper, shallower): when the first one's training error falls below
    deviations: tuple[str, ...] = ()
    measure: Callable[[Dataset, Scale, Say], Measured] | None = None
    of_models: Callable[[Mapping[str, Sequence[Path]], Look], Measured] | None = None
    work: Callable[[Work], Measured] | None = None
    minutes: float = 0.1


@dataclass(frozen=True)
class Experiment:
    """name: as on the command line. see: what to look for, for a reader who has not read the paper.

    plans: for a scale that is there, a function of the data. data: where it runs by default.
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
        """Whether it only looks into models that are given."""
        return [*self.plans] == ["paper"] and not self.trains("paper") and self.plans["paper"](Dataset("")).of_models is not None

    def trains(self, scale: Scale) -> bool:
        """Whether it trains anything at a scale."""
        return bool(self.plans[scale](Dataset(self.data)).trainings)


def scales(plan: Callable[[Dataset, Scale], Plan], *which: Scale) -> dict[Scale, Callable[[Dataset], Plan]]:
    """A plan at some scales, by default at all."""
    return {scale: (lambda data, scale=scale: plan(data, scale)) for scale in which or SCALES}
