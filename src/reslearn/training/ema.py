"""An average of the weights and BN statistics over the steps, used for evaluation."""

import copy

import torch
from torch import Tensor, nn


def rate(decay: float, step: int) -> float:
    """How much of the average stays at step `step` (from 0): rising as (1 + n) / (10 + n), so that early weights are forgotten."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """module: a network with the averages, in evaluation mode as far as its maker sets it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.averages = [average for average, _ in pairs if average.is_floating_point()]
        self.current = [now for average, now in pairs if average.is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.share = torch.zeros((), device=self.averages[0].device)  # of the present weights; a captured step reads it

    def set_step(self, step: int) -> None:
        """Make ready for the update after step `step`."""
        self.share.fill_(1 - rate(self.decay, step))

    @torch.no_grad()
    def update(self) -> None:
        """average += share x (present - average)."""
        change = torch._foreach_sub(self.current, self.averages)  # type: ignore[attr-defined]
        torch._foreach_mul_(change, self.share)  # type: ignore[attr-defined]
        torch._foreach_add_(self.averages, change)  # type: ignore[attr-defined]
        for average, now in self.counters:
            average.copy_(now)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()
