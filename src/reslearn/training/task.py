"""What a run is trained to do. The core asks a task for what differs from task to task, and for nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from reslearn.data.augment import Draws
from reslearn.data.preprocess import Preprocessing
from reslearn.training.display import Display
from reslearn.training.recipe import Chosen, Recipe

Progress = Callable[[int], None]
"""Called with the number of images that are done, by all ranks alike."""


class Examples(Protocol):
    """What a step learns from: inputs and targets of some images, or a rank's share of them."""

    def __len__(self) -> int: ...

    def split(self, size: int) -> Sequence[Self]:
        """The same in micro-batches of `size`, the last of which may be smaller."""
        ...


class Source(Protocol):
    """One split of a data set."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...


class OpenedData(Protocol):
    """A data set as a task opened it."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...


class Losses(NamedTuple):
    """Of a batch: 0-dim tensors by name, whose sum is minimized, and the number of images whose top-1 class is wrong, where the
    task has one."""

    parts: dict[str, Tensor]
    wrong: Tensor | None = None


LossFunction = Callable[[nn.Module, Any], Losses]


class Phase(NamedTuple):
    """A part of a run with a learning-rate schedule and momentum buffers of its own. end: its last step (from 1)."""

    end: int
    title: str = ""
    evaluated: bool = True  # whether there is something to evaluate yet


class Evaluation(NamedTuple):
    """error: the headline, in percent, that selects the best weights. numbers: for JSON. text: the same for a person. details: what
    the task's pictures need."""

    error: float
    numbers: dict[str, Any]
    text: str
    details: Any = None


S = TypeVar("S", bound=Source)
D = TypeVar("D", bound=OpenedData)
R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Sources(Generic[S]):
    """The splits that a run reads; val and test are None where there is none. held_out: names of images that were held out here,
    by split."""

    train: S
    val: S | None
    test: S | None
    preprocessing: Preprocessing
    held_out: dict[str, list[str]] = field(default_factory=dict)

    def named(self) -> dict[str, S]:
        """The splits there are, by name."""
        sources = {"train": self.train, "val": self.val, "test": self.test}
        return {name: source for name, source in sources.items() if source is not None}

    def tested(self) -> dict[str, S]:
        """What the final numbers are taken on: val and test; the training images where nothing is held out."""
        return {name: source for name, source in self.named().items() if name != "train"} or {"train": self.train}


@dataclass(frozen=True)
class Job(Generic[R, D, S]):
    """A run to be trained, from its start or its last checkpoint. facts: what its recipe.json holds."""

    folder: Path
    facts: dict[str, Any]
    task: "Task[R, D, S]"
    recipe: R
    data: D
    sources: Sources[S]
    device: torch.device
    execution: str
    display: Display


class Task(ABC, Generic[R, D, S]):
    """A task. Its methods raise UserError for what cannot be used.

    described: what recipe.json holds under "data", by key, besides name, classes, n and fingerprint.
    """

    name: ClassVar[str]
    recipe: type[R]
    named: Mapping[str, Callable[..., Chosen]]
    described: ClassVar[tuple[str, ...]] = ()

    # Recipe and data

    @abstractmethod
    def open(self, source: str | Path, given: Mapping[str, Any]) -> D:
        """Open a data set. given: what is known of the recipe so far, by dotted key."""

    @abstractmethod
    def usual(self, data: D) -> str:
        """The named recipe of a run that asks for none."""

    @abstractmethod
    def choose(self, name: str, data: D | None, net: str | None, given: Mapping[str, Any]) -> Chosen:
        """The values of a named recipe. net: the network, where it is known. given: what was asked for, by dotted key.

        Raises UserError where the recipe does not suit the data, or needs some and there is none.
        """

    @abstractmethod
    def check(self, recipe: R, data: D, given: Mapping[str, Any]) -> None:
        """Raise UserError where a key of the recipe does not apply to the data. given: the settings, and values of a recipe file or
        object that are not the defaults, by dotted key."""

    @abstractmethod
    def sources(self, data: D, recipe: R, device: torch.device, display: Display, view: Preprocessing | None) -> Sources[S]:
        """The splits to read. view: the preprocessing of a run that has begun; it is the task's to find otherwise."""

    @abstractmethod
    def identity(self, data: D) -> dict[str, str]:
        """Hashes of what the data set holds, "fingerprint" for one: a run resumes on the same data only."""

    @abstractmethod
    def describe(self, data: D, sources: Sources[S]) -> dict[str, Any]:
        """What recipe.json says of the data besides its identity."""

    @abstractmethod
    def introduce(self, job: Job[R, D, S]) -> list[str]:
        """Lines on the data, and on what is peculiar to the run, before it starts."""

    # The network and a step

    @abstractmethod
    def model(self, job: Job[R, D, S], *, fresh: bool) -> nn.Module:
        """The run's network on its device. fresh: with the weights that it begins with; otherwise others will be loaded."""

    @abstractmethod
    def loss(self, job: Job[R, D, S]) -> LossFunction:
        """The function (model, examples) -> Losses that a step minimizes."""

    @abstractmethod
    def examples(self, job: Job[R, D, S], draws: Draws) -> Examples:
        """Training examples: a pure function of the draws, called on threads ahead of time."""

    def resident(self, sources: Sources[S]) -> bool:
        """Whether the training images are in the device's memory, as captured steps need them."""
        return False

    def phases(self, recipe: R, images: int) -> tuple[Phase, ...]:
        """The phases of a run on so many training images."""
        return (Phase(recipe.schedule.total(images, recipe.batch.size)),)

    def enter(self, model: nn.Module, phase: int) -> nn.Module:
        """Prepare a network for a phase (from 1). Returns what is trained in it."""
        return model

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that optimizer.backbone_lr leaves alone: those of the last layer, unless the task says otherwise."""
        return list(model.parameters())[-2:]

    # Evaluation and the end of a run

    @abstractmethod
    def evaluate(
        self,
        job: Job[R, D, S],
        model: nn.Module,
        source: S,
        *,
        precision: str,
        progress: Progress,
        forward: Callable[[Tensor], Tensor] | None = None,
        full: bool = False,
    ) -> Evaluation:
        """Evaluate a network on a split; each rank takes its share. full: with intervals and all else that a result has, and the
        details for pictures; otherwise what a line of the log has. forward: a faster way to run the same network."""

    @abstractmethod
    def measures(self, numbers: Mapping[str, Any]) -> dict[str, tuple[float | None, Sequence[float] | None]]:
        """The headlines of a split's full numbers in percent, by name, with their 95% intervals; None where there is nothing to
        measure."""

    @abstractmethod
    def save(self, job: Job[R, D, S], model: nn.Module, path: Path, numbers: dict[str, Any]) -> object:
        """Write a model file with its card. numbers: full ones, by split."""

    @abstractmethod
    def finish(self, job: Job[R, D, S], model: nn.Module, split: str, details: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures for the report. split: the one to show; details: of each split. Returns what result.json says of them."""

    def begin(self, job: Job[R, D, S]) -> None:
        """Pictures of the training images, before the first step."""
        return

    def settle(self, job: Job[R, D, S], model: nn.Module, check: Callable[[], None]) -> None:
        """Make the final weights ready for their test, for instance with precise BN statistics. check: raises to interrupt."""
        return
