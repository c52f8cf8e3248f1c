"""Exponential moving average of the weights and BN statistics, used for evaluation."""

import copy

import torch
from torch import Tensor, nn


def rate(decay: float, step: int) -> float:
    """The decay at step `step` (from 0). It rises as (1 + n) / (10 + n), so that the initial weights are forgotten quickly."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """module: a copy of the network that holds the averages."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self.averages = [average for average, _ in pairs if average.is_floating_point()]
        self.current = [now for average, now in pairs if average.is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.weight = torch.zeros((), device=self.averages[0].device)  # 1 - decay, a tensor because captured steps read it

    def set_step(self, step: int) -> None:
        """Set the decay for the update after step `step` (from 0)."""
        self.weight.fill_(1 - rate(self.decay, step))

    @torch.no_grad()
    def update(self) -> None:
        """average += (1 - decay) * (current - average)."""
        change = torch._foreach_sub(self.current, self.averages)  # type: ignore[attr-defined]
        torch._foreach_mul_(change, self.weight)  # type: ignore[attr-defined]
        torch._foreach_add_(self.averages, change)  # type: ignore[attr-defined]
        for average, now in self.counters:
            average.copy_(now)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()
