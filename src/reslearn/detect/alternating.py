"""Faster R-CNN's four-step alternating training (Ren et al., 2015, section 3.2): the four phases of one run.

1. Train the proposal network on a backbone of its own. 2. Train the region head on a second backbone, from the proposals of
phase 1. Both backbones start from the run's initial weights. 3. Train the detector's own proposal network on the second
backbone, which is fixed from here on. 4. Continue training the region head on that backbone, from the proposals of phase 3.

The detector on the second backbone is kept; phase 1's is dropped after phase 2. The proposal layers of phase 3 start anew from
phase 1's initial weights, as in the authors' released code. Each phase runs the whole learning-rate schedule and starts with zero
momentum buffers. The phase is a function of (recipe, step).
"""

import copy
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import Any

from torch import Tensor, nn

from reslearn.data.boxes.source import Target
from reslearn.detect.detector import Detector
from reslearn.detect.loop import DetectLoop
from reslearn.detect.recipes import DetectRecipe
from reslearn.detect.step import BoxBatch, DetectStepper
from reslearn.errors import UserError
from reslearn.kernels.fuse import fuse
from reslearn.training.checkpoint import Checkpoint
from reslearn.training.schedule import warmup_steps
from reslearn.training.state import State
from reslearn.training.step import make_optimizer

Ends = tuple[int, ...]


def phase_ends(recipe: DetectRecipe, images: int) -> Ends:
    """How many steps are over when each of the four phases is.

    Raises UserError where a phase has no step, or none after the warm-up.
    """
    assert recipe.alternate is not None
    total, shares = recipe.schedule.total(images, recipe.batch.size), recipe.alternate
    ends = tuple(round(total * up_to / sum(shares)) for up_to in accumulate(shares))
    shortest = min(end - begin for begin, end in zip((0, *ends), ends, strict=False))
    if shortest < 1:
        shown = ", ".join(f"{share:g}" for share in shares)
        raise UserError(f"alternate=[{shown}]: one of the four phases has none of the run's {total:,} steps: train for longer")
    if (rise := warmup_steps(recipe.schedule, shortest)) >= shortest > 1:
        raise UserError(
            f"schedule.warmup={recipe.schedule.warmup:g}: each phase of alternate has its own, "
            f"and the shortest phase of {shortest:,} steps is no longer than {rise:,}"
        )
    return ends


def phase_at(ends: Ends, step: int) -> int:
    """The phase, 1 to 4, of a step (from 0)."""
    return 1 + bisect_right(ends[:-1], step)


def describe(ends: Ends) -> list[str]:
    """Sentences on what is trained when."""
    what = (
        "proposals, on a backbone for them alone",
        "regions, on a second backbone, from the proposals of phase 1",
        "proposals, on the second backbone, which stays fixed",
        "regions, on the same, from the proposals of phase 3",
    )
    lines = [f"phase {i}  to step {end:,}: {each}" for i, (end, each) in enumerate(zip(ends, what, strict=True), start=1)]
    return [*lines, f"         held-out images are judged in phases 3 and 4, after step {ends[1]:,}"]


class AlternatingState(State):
    """A run's state, with its phase and, in phases 1 and 2, phase 1's detector, which has no heads."""

    model: Detector

    def __init__(self, model: Detector, recipe: DetectRecipe, ends: Ends) -> None:
        super().__init__(model, recipe)
        self.recipe, self.ends = recipe, ends
        self.proposer: Detector | None = copy.deepcopy(model, {id(model.roi_heads): None})
        self.enter(1)

    def enter(self, phase: int) -> None:
        """What is trained from now on, with velocities of zero, and what is fixed."""
        model, first, self.phase = self.model, self.proposer, phase
        if phase == 1:
            assert first is not None
            trained = [first.backbone, first.rpn]
        elif phase == 2:
            assert first is not None
            first.freeze(first.backbone)
            trained = [model.backbone, model.roi_heads]
        else:
            self.proposer = None
            model.freeze(model.backbone)
            trained = [model.rpn if phase == 3 else model.roi_heads]
        self.trained = nn.ModuleList(trained)
        self.optimizer = make_optimizer(self.trained, self.recipe.optimizer, self.recipe.schedule.lr)

    def losses(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """Those that the phase trains, by name."""
        if self.phase % 2:
            return (self.proposer or self.model).proposal_losses(images, targets)
        return self.model.region_losses(images, targets, self.proposer)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        first = () if self.proposer is None else self.proposer.named_parameters("proposer")
        return chain(super().parameters(), first)

    def to_checkpoint(self) -> Checkpoint:
        saved = super().to_checkpoint()
        first = {} if self.proposer is None else self.proposer.state_dict(prefix="proposer.")
        return saved._replace(state=saved.state | first)

    def from_checkpoint(self, saved: Checkpoint, where: str) -> None:
        self.enter(phase_at(self.ends, self._progress(saved.facts, where).step))
        if self.proposer is not None:
            first = {name.removeprefix("proposer."): t for name, t in saved.state.items() if name.startswith("proposer.")}
            self._fits(self.proposer.state_dict(), first, where)
            self.proposer.load_state_dict(first)
        super().from_checkpoint(saved, where)


class AlternatingLoop(DetectLoop):
    """The loop through the four phases. A line of the log is of one phase; there is a detector to judge from phase 3 on."""

    state: AlternatingState

    def make_stepper(self, mode: str) -> DetectStepper:
        if mode == "fused":
            fuse(self.state.model)
            fuse(self.state.evaluated)
            if self.state.proposer is not None:
                fuse(self.state.proposer)
        return DetectStepper(self.recipe, self.sources.train, self.state, self.precision, self.state.losses)

    def stretch(self) -> tuple[int, int]:
        begin, end = ((0, *self.state.ends)[self.state.phase - i] for i in (1, 0))
        return self.state.progress.step - begin, end - begin

    def _step(self, batch: BoxBatch) -> None:  # type: ignore[override]
        super()._step(batch)  # type: ignore[arg-type]
        if self.state.progress.step in self.state.ends[:-1]:  # before a checkpoint of this step, which is the next phase's first
            self.state.enter(self.state.phase + 1)

    def _log_due(self) -> bool:
        return super()._log_due() or self.state.progress.step in self.state.ends

    def trained(self) -> dict[str, Any]:
        return {"phase": phase_at(self.state.ends, self.state.progress.step - 1)} | super().trained()

    def _evaluation_due(self) -> bool:
        return self.state.progress.step > self.state.ends[1] and super()._evaluation_due()
