"""What a run is trained to do: the parts that differ between classifying images and detecting objects."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from reslearn.training import runtime
from reslearn.training.display import Display
from reslearn.training.loop import Loop
from reslearn.training.state import State


@dataclass(frozen=True)
class Asked:
    """What the user has said of a new run; see train."""

    data: str | Path
    model: str | None
    recipe: str | Path | None
    settings: Sequence[str]
    seed: int | None
    init: str | Path | None


@dataclass(frozen=True)
class Ready:
    """A run's recipe, its data set, and the splits of it as the loop reads them (setup.Sources or boxes.Sources)."""

    data: Any
    recipe: Any
    sources: Any


@dataclass(frozen=True)
class Job:
    """A run that is to be trained, from its start or its last checkpoint on. facts: what its recipe.json holds."""

    folder: Path
    facts: dict[str, Any]
    ready: Ready
    device: torch.device
    mode: str
    display: Display


class Task(Protocol):
    """Classification and detection are modules of these functions. They raise UserError for what cannot be used."""

    def begin(
        self, asked: Asked, device: torch.device, display: Display
    ) -> tuple[Ready, list[str], dict[str, list[str]], dict[str, Any]]:
        """A new run: its recipe and data, sentences on what was chosen, the images that were held out here by split, and what
        recipe.json says of the data."""
        ...

    def reopen(self, folder: Path, facts: dict[str, Any], device: torch.device, display: Display) -> Ready:
        """A run that has begun."""
        ...

    def resident(self, ready: Ready) -> bool:
        """Whether the training images lie in memory, as captured steps need them."""
        ...

    def network(self, job: Job, *, fresh: bool) -> nn.Module:
        """The run's network. fresh: with the weights that it begins with; else a checkpoint's will be loaded."""
        ...

    def make_state(self, job: Job, network: nn.Module) -> State:
        """The state of a run before its first step."""
        ...

    def make_loop(self, job: Job, state: State) -> Loop:
        """The loop of a run from its present state on."""
        ...

    def introduce(self, job: Job) -> list[str]:
        """What a person wants to know of the data before it starts."""
        ...

    def finish(self, job: Job, loop: Loop, stop: runtime.Stop) -> dict[str, Any]:
        """Evaluate, write the model files and result.json. Returns the result."""
        ...
