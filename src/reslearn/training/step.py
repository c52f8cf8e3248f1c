"""One update of the weights, the same for every task, device and precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reslearn.training import ranks
from reslearn.training.state import State
from reslearn.training.task import Examples, Losses, LossFunction


class NonFinite(ArithmeticError):
    """The loss or its gradient is not finite; the weights have not been touched. step: which (from 0), where not the present."""

    def __init__(self, why: str, step: int | None = None) -> None:
        super().__init__(why)
        self.step = step


class Outcome(NamedTuple):
    """Of a batch, of all ranks together, on the device. names: of the losses. values: float64, the losses, then the number of
    images with a wrong top-1 class (0 where the task has none). grad_norm: 2-norm, 0-dim."""

    names: tuple[str, ...]
    values: Tensor
    grad_norm: Tensor

    @property
    def loss(self) -> Tensor:
        """What is minimized, 0-dim."""
        return self.values[:-1].sum()


class LossModule(nn.Module):
    """A network with its loss: examples -> Losses."""

    def __init__(self, network: nn.Module, loss: LossFunction, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.network, self.loss, self.autocast = network, loss, autocast

    def forward(self, examples: Examples) -> Losses:
        with self.autocast:
            return self.loss(self.network, examples)


def update(model: nn.Module, examples: Examples, state: State, check: Callable[[Outcome], object]) -> None:
    """One step: the gradients of the examples' mean loss, then the update of weights and average.

    model: a LossModule, or one on several ranks. batch.micro examples go through it at once; their gradients and losses count by
    their share of the batch. check: is given the outcome before the weights change, and raises NonFinite or sets the optimizer's
    found_inf.
    """
    state.optimizer.zero_grad(set_to_none=True)
    names, sums, wrong = tuple[str, ...](), Tensor(), Tensor()
    parts = examples.split(state.recipe.batch.micro or len(examples))
    for i, part in enumerate(parts, start=1):
        with ranks.accumulating(model, last=i == len(parts)):
            losses: Losses = model(part)
            share = len(part) / len(examples)
            names, stacked = tuple(losses.parts), torch.stack(list(losses.parts.values()))
            (stacked.sum() * share).backward()
        now, missed = stacked.detach() * share, stacked.new_zeros(()) if losses.wrong is None else losses.wrong
        sums, wrong = (now, missed) if i == 1 else (sums + now, wrong + missed)
    wide = torch.float32 if sums.device.type == "mps" else torch.float64  # which MPS has not
    values = torch.cat([sums.to(wide), wrong.to(wide)[None]])
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if ranks.count() > 1:
        ranks.total(values)
        values[:-1] /= ranks.count()
        if not state.recipe.batch.sync_bn:  # ranks have statistics of their own; their mean is that of all images
            ranks.average([buffer for bn in state.batch_norms() for buffer in bn.buffers() if buffer.is_floating_point()])
    check(Outcome(names, values, norm))
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update()
