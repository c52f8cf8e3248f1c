"""One update of the weights, for any task, device and precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reslearn.training import ranks
from reslearn.training.state import State
from reslearn.training.task import Examples, Losses, LossFunction


class NonFinite(ArithmeticError):
    """The loss or its gradient is not finite; the weights were not updated. step: from 0; None for the current one."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class Outcome(NamedTuple):
    """The outcome of a step over all ranks, on the device.

    names: of the losses. values: float64, the losses, then the number of images with a wrong top-1 class. counted: whether the
    task counts these; otherwise the number is 0. grad_norm: 2-norm of the gradient, 0-dim.
    """

    names: tuple[str, ...]
    values: Tensor
    counted: bool
    grad_norm: Tensor

    @property
    def loss(self) -> Tensor:
        """The sum of the losses, 0-dim."""
        return self.values[:-1].sum()


class LossModule(nn.Module):
    """A network with its loss function: examples -> Losses."""

    def __init__(self, network: nn.Module, loss: LossFunction, autocast: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.network, self.loss, self.autocast = network, loss, autocast

    def forward(self, examples: Examples) -> Losses:
        with self.autocast:
            return self.loss(self.network, examples)


def update(model: nn.Module, examples: Examples, state: State, check: Callable[[Outcome], object]) -> None:
    """One step: gradients of the mean loss of the examples, then the update of the weights and their average.

    model: a LossModule, or DDP around one. Micro-batches of batch.micro examples are weighted by their size. check: called with
    the outcome before the update; raises NonFinite, or sets the optimizer's found_inf.
    """
    state.optimizer.zero_grad(set_to_none=True)
    names, sums, wrong, counted = tuple[str, ...](), Tensor(), Tensor(), False
    batches = examples.split(state.recipe.batch.micro or len(examples))
    for i, batch in enumerate(batches, start=1):
        with ranks.accumulating(model, last=i == len(batches)):
            losses: Losses = model(batch)
            weight = len(batch) / len(examples)
            names, stacked = tuple(losses.parts), torch.stack(list(losses.parts.values()))
            (stacked.sum() * weight).backward()
        counted = losses.wrong is not None
        loss, errors = stacked.detach() * weight, stacked.new_zeros(()) if losses.wrong is None else losses.wrong
        sums, wrong = (loss, errors) if i == 1 else (sums + loss, wrong + errors)
    wide = torch.float32 if sums.device.type == "mps" else torch.float64  # MPS has no float64
    values = torch.cat([sums.to(wide), wrong.to(wide)[None]])
    trained = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
    if ranks.count() > 1:
        ranks.total(values)
        values[:-1] /= ranks.count()
        if not state.recipe.batch.sync_bn:  # each rank has its own BN statistics: average them
            ranks.average([buffer for bn in state.batch_norms() for buffer in bn.buffers() if buffer.is_floating_point()])
    check(Outcome(names, values, counted, norm))
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update()
