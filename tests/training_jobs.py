"""Recipes, jobs and steps without a run folder."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from reslearn.classify.task import CLASSIFY
from reslearn.data.images.resident import Resident
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import Split
from reslearn.kernels.fuse import fuse
from reslearn.training.display import Display
from reslearn.training.request import parse
from reslearn.training.resolve import resolve
from reslearn.training.state import State
from reslearn.training.stepper import Stepper
from reslearn.training.task import Job, Sources

CPU = torch.device("cpu")
VIEW = Preprocessing(channels=3, size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)


def resolved(data: Any, recipe: Any = None, model: str | None = None, settings: Any = (), **options: Any) -> tuple[Any, list[str]]:
    """The recipe of a run on an opened data set, and its notes. Options as for parse."""
    return resolve(parse("data", recipe, model=model, settings=settings, **options), data)


def resident(images: int = 100, pad: int = 2) -> Resident:
    """Small in-memory images of four classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (images,), generator=generator)
    pixels[labels == 1] //= 2
    split = Split(labels.numpy(), tuple(map(str, range(images))), pixels=pixels)
    return Resident(split, VIEW, flip=True, pad=pad)


def make_job(recipe: Any, train: Any, task: Any = CLASSIFY, execution: str = "eager", classes: Sequence[str] = "abcd") -> Job:
    """A job without a run folder."""
    data: Any = SimpleNamespace(name="data", classes=tuple(classes))
    return Job(Path("nowhere"), {}, task, recipe, data, Sources(train, None, None, VIEW), CPU, execution, Display(True))


def make_state(job: Job[Any, Any, Any], model: torch.nn.Module) -> State:
    """The state of a job before its first step."""
    model = fuse(model) if job.execution == "fused" else model
    return State(model.train(), job.recipe, job.task.phases(job.recipe, len(job.sources.train)), job.task)


def take_step(stepper: Stepper, state: State) -> None:
    """One step with the current lr."""
    stepper(stepper.prepare(state.progress.step))
    stepper.collect()
    state.progress.step += 1
