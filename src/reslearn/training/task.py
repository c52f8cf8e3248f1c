"""The interface between the training core and a task: everything that differs between tasks."""

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
from reslearn.weights import Card

Progress = Callable[[int], None]
"""Called with the number of images done so far, equally often on all ranks."""


class Examples(Protocol):
    """Inputs and targets of a step: a batch, or a rank's share of it."""

    def __len__(self) -> int: ...

    def split(self, size: int) -> Sequence[Self]:
        """Splits the examples into micro-batches of `size`; the last one may be smaller."""
        ...


class Source(Protocol):
    """One split of a data set."""

    @property
    def names(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...


class OpenedData(Protocol):
    """A data set as a task opened it. has_val: whether it has its own validation split."""

    @property
    def name(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def has_val(self) -> bool: ...


class Losses(NamedTuple):
    """The losses of a batch.

    parts: 0-dim tensors by name; their sum is minimized. wrong: number of images with a wrong top-1 class, 0-dim; None for tasks
    without top-1 classes.
    """

    parts: dict[str, Tensor]
    wrong: Tensor | None = None


LossFunction = Callable[[nn.Module, Any], Losses]


class Phase(NamedTuple):
    """A phase of a run, with its own learning-rate schedule and momentum buffers. end: its last step (from 1)."""

    end: int
    title: str = ""
    evaluated: bool = True  # whether the network can be evaluated in this phase


class Evaluation(NamedTuple):
    """error: headline error in percent, which selects the best weights. numbers: JSON-compatible. text: log line. details: input of
    the task's pictures."""

    error: float
    numbers: dict[str, Any]
    text: str
    details: Any = None


@dataclass(frozen=True)
class EvaluationOptions:
    """precision: of the forward pass, fp32 or bf16. forward: a faster function with the same outputs as the network.

    full: also compute intervals, all numbers of result.json and the details for pictures; otherwise only those of a log line.
    """

    precision: str
    progress: Progress
    forward: Callable[[Tensor], Tensor] | None = None
    full: bool = False


S = TypeVar("S", bound=Source)
D = TypeVar("D", bound=OpenedData)
R = TypeVar("R", bound=Recipe)


@dataclass(frozen=True)
class Sources(Generic[S]):
    """The splits of a run; val and test may be None. held_out: names of the images that this run held out, by split."""

    train: S
    val: S | None
    test: S | None
    preprocessing: Preprocessing
    held_out: dict[str, list[str]] = field(default_factory=dict)

    def named(self) -> dict[str, S]:
        """The existing splits by name."""
        sources = {"train": self.train, "val": self.val, "test": self.test}
        return {name: source for name, source in sources.items() if source is not None}

    def tested(self) -> dict[str, S]:
        """The splits for the final numbers: val and test, or train if there is neither."""
        return {name: source for name, source in self.named().items() if name != "train"} or {"train": self.train}


@dataclass(frozen=True)
class Job(Generic[R, D, S]):
    """A run, new or resumed. facts: the content of its recipe.json."""

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
    """A task. Methods raise UserError for invalid input.

    described: additional keys of "data" in recipe.json, besides name, classes, n and fingerprint.
    """

    name: ClassVar[str]
    recipe: type[R]
    named: Mapping[str, Callable[..., Chosen]]
    described: ClassVar[tuple[str, ...]] = ()

    # Recipe and data

    @abstractmethod
    def open(self, source: str | Path, given: Mapping[str, Any]) -> D:
        """Opens a data set. given: the requested recipe values, by dotted key."""

    @abstractmethod
    def usual(self, data: D) -> str:
        """The named recipe to use by default."""

    @abstractmethod
    def choose(self, name: str, data: D | None, net: str | None, given: Mapping[str, Any]) -> Chosen:
        """The values of a named recipe. net: the network, if known. given: the requested values, by dotted key.

        Raises UserError if the recipe does not suit the data, or needs data and there is none.
        """

    @abstractmethod
    def check(self, recipe: R, data: D, given: Mapping[str, Any]) -> None:
        """Raises UserError if a key of the recipe does not apply to the data.

        given: settings, and non-default values of a recipe file or object, by dotted key.
        """

    @abstractmethod
    def sources(self, data: D, recipe: R, device: torch.device, display: Display, view: Preprocessing | None) -> Sources[S]:
        """The splits to read. view: the preprocessing of a resumed run; None for a new one."""

    @abstractmethod
    def identity(self, data: D) -> dict[str, str]:
        """Hashes of the data set's content, among them "fingerprint". A run resumes only on identical data."""

    @abstractmethod
    def describe(self, data: D, sources: Sources[S]) -> dict[str, Any]:
        """The description of the data in recipe.json, without its identity."""

    @abstractmethod
    def introduce(self, job: Job[R, D, S]) -> list[str]:
        """Lines to print before the run: the data, and notes."""

    # The network and a step

    @abstractmethod
    def model(self, job: Job[R, D, S], *, fresh: bool) -> nn.Module:
        """The run's network on its device. fresh: with its initial weights; otherwise a checkpoint is loaded into it."""

    @abstractmethod
    def loss(self, job: Job[R, D, S]) -> LossFunction:
        """The function (model, examples) -> Losses that training minimizes."""

    @abstractmethod
    def examples(self, job: Job[R, D, S], draws: Draws) -> Examples:
        """Training examples: a pure function of the draws, called in advance on worker threads."""

    def resident(self, sources: Sources[S]) -> bool:
        """Whether the training images are in device memory, which captured steps require."""
        return False

    def phases(self, recipe: R, images: int) -> tuple[Phase, ...]:
        """The phases of a run with this number of training images."""
        return (Phase(recipe.schedule.total(images, recipe.batch.size)),)

    def enter(self, model: nn.Module, phase: int) -> nn.Module:
        """Prepares a network for a phase (from 1). Returns the module that is trained in it."""
        return model

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that optimizer.backbone_lr does not apply to; by default those of the last layer."""
        return list(model.parameters())[-2:]

    # Evaluation and the end of a run

    @abstractmethod
    def evaluate(self, job: Job[R, D, S], model: nn.Module, source: S, options: EvaluationOptions) -> Evaluation:
        """Evaluates a network on a split; each rank takes its share."""

    @abstractmethod
    def measures(self, numbers: Mapping[str, Any]) -> dict[str, tuple[float | None, Sequence[float] | None]]:
        """The headline measures in the full numbers of a split: percent and 95% interval by name; None if undefined."""

    def card(self, job: Job[R, D, S], model: nn.Module, numbers: dict[str, Any]) -> Card | None:
        """The card of a model file, which makes the checkpoints of an unfinished run usable. numbers: full numbers, by split."""
        return None

    @abstractmethod
    def save(self, job: Job[R, D, S], model: nn.Module, path: Path, numbers: dict[str, Any]) -> object:
        """Writes a model file with its card. numbers: the full numbers by split."""

    @abstractmethod
    def finish(self, job: Job[R, D, S], model: nn.Module, split: str, details: Mapping[str, Any]) -> dict[str, Any]:
        """Writes pictures for the report and returns their entries for result.json.

        split: the one to show. details: Evaluation.details by split.
        """

    def begin(self, job: Job[R, D, S]) -> None:
        """Writes pictures of the training images, before the first step."""
        return

    def settle(self, job: Job[R, D, S], model: nn.Module, check: Callable[[], None]) -> None:
        """Prepares the final weights for testing, for instance with precise BN. check: raises to interrupt."""
        return
