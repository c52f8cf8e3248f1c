"""Faster R-CNN's four-step alternating training (Ren et al., 2015, section 3.2) as the four phases of one run.

1. Train the proposal network on a first backbone. 2. Train the region head on a second backbone, with the proposals of phase 1.
Both backbones start from the run's initial weights. 3. Train the detector's proposal network on the second backbone, which is
fixed from here on. 4. Continue training the region head on that backbone, with the proposals of phase 3.

The detector on the second backbone is kept; the first is dropped after phase 2. Phase 3 restarts the proposal layers from their
initial weights, as in the authors' released code. Each phase runs the whole learning-rate schedule and starts with zero momentum
buffers. The phase is a function of (recipe, step).
"""

import copy
from itertools import accumulate

from torch import Tensor, nn

from reslearn.data.boxes.source import Target
from reslearn.detect.detector import Detector
from reslearn.detect.recipes import DetectRecipe
from reslearn.errors import UserError
from reslearn.training.task import Phase

TITLES = (
    "proposals, on a first backbone",
    "regions, on a second backbone, with the proposals of phase 1",
    "proposals, on the second backbone (fixed)",
    "regions, on the second backbone (fixed), with the proposals of phase 3",
)


def phases(recipe: DetectRecipe, images: int) -> tuple[Phase, ...]:
    """The four phases of a run; only the last two can be evaluated. Raises UserError if a phase has no step."""
    assert recipe.alternate is not None
    total, shares = recipe.schedule.total(images, recipe.batch.size), recipe.alternate
    ends = tuple(round(total * up_to / sum(shares)) for up_to in accumulate(shares))
    shortest = min(end - begin for begin, end in zip((0, *ends), ends, strict=False))
    if shortest < 1:
        shown = ", ".join(f"{share:g}" for share in shares)
        raise UserError(f"alternate=[{shown}]: one of the four phases gets none of the run's {total:,} steps: train for more steps")
    return tuple(Phase(end, title, evaluated=i >= 2) for i, (end, title) in enumerate(zip(ends, TITLES, strict=True)))


class Alternating(nn.Module):
    """A detector in training and, in phases 1 and 2, a second one without region heads, which phase 1 trains."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector, self.phase = detector, 1
        self.proposer: Detector | None = copy.deepcopy(detector, {id(detector.roi_heads): None})

    def enter(self, phase: int) -> nn.Module:
        """Freezes what the phase keeps fixed. Returns the modules it trains."""
        self.phase, detector, proposer = phase, self.detector, self.proposer
        if phase > 2:
            self.proposer = None
            detector.freeze(detector.backbone)
            return detector.rpn if phase == 3 else detector.roi_heads
        assert proposer is not None
        if phase == 1:
            return nn.ModuleList([proposer.backbone, proposer.rpn])
        proposer.freeze(proposer.backbone)
        return nn.ModuleList([detector.backbone, detector.roi_heads])

    def forward(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """The losses of the current phase, by name."""
        if self.phase % 2:
            return (self.proposer or self.detector).proposal_losses(images, targets)
        return self.detector.region_losses(images, targets, self.proposer)
