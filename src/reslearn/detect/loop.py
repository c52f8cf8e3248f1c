"""The loop of a detector's training."""

from typing import Any

from reslearn.detect.detector import Detector
from reslearn.detect.step import DetectStepper, headline, judge
from reslearn.evaluation.average_precision import coco
from reslearn.evaluation.matching import Matches
from reslearn.kernels.fuse import fuse
from reslearn.training import runtime
from reslearn.training.loop import Loop


class DetectLoop(Loop):
    """The loop, with a detector's steps and numbers."""

    def make_stepper(self, mode: str) -> DetectStepper:  # type: ignore[override]
        if mode == "fused":
            fuse(self.state.model)
            fuse(self.state.evaluated)
        return DetectStepper(self.recipe, self.sources.train, self.state, self.precision, self.state.model)

    def trained(self) -> dict[str, Any]:
        p = self.state.progress
        return {"losses": {name: total / p.seen for name, total in p.losses.items()}}

    def judge(self, stop: runtime.Stop) -> tuple[float, dict[str, Any]]:
        model = self.state.evaluated
        assert self.sources.val is not None and isinstance(model, Detector)
        seen = judge(model, self.sources.val, self.precision, self.recipe.seed, lambda done: stop.check())
        self.state.model.train()
        numbers = _three(seen.boxes)
        line = {"loss": sum(seen.losses.values()), "losses": seen.losses, **numbers}
        return headline(numbers), line if seen.masks is None else line | {"masks": _three(seen.masks)}


def _three(matches: Matches) -> dict[str, float | None]:
    return {name: value for name, value in coco(matches).items() if name in ("AP", "AP50", "AP75")}
