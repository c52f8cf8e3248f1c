"""Signals through identity shortcuts, forward and backward (IM, equations 3 to 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.analysis.parts import blocks, from_stem, halves, keeps_shape, stem
from reslearn.nets.blocks import Block


@dataclass(frozen=True)
class Stretch:
    """The blocks of one stage whose input and output have one shape, from x_l to x_L.

    difference: the norm of (x_L - x_l) - sum of F(x_i), relative to that of x_L - x_l: rounding alone where all shortcuts are
    identities and nothing follows the additions. identity: the part of dE/dx_l that came through the shortcuts alone, which is
    dE/dx_L, as a share: their inner product by the squared norm of dE/dx_l. It can be above 1 or below 0.
    """

    stage: str
    blocks: int
    difference: float
    identity: float


@dataclass(frozen=True)
class Signal:
    """gradients: norm of dE/dx at the input of each block, in order, and at the end. stretches: none of a plain network."""

    gradients: list[tuple[str, float]]
    stretches: list[Stretch]


def signal(model: nn.Module, images: Tensor, labels: Tensor) -> Signal:
    """The signals of a network in evaluation, with the mean loss of images (N, C, H, W) and labels (N,) as E.

    Raises UserError where the network has no blocks.
    """
    every = blocks(model)
    inputs: dict[str, Tensor] = {}
    last: list[Tensor] = []
    handles = []
    for name, block in every.items():
        handles.append(block.register_forward_pre_hook(_keep(inputs, name)))
    handles.append(next(reversed(every.values())).register_forward_hook(lambda *seen: last.append(seen[2])))
    try:
        x = stem(model, images).detach().requires_grad_()
        loss = F.cross_entropy(from_stem(model, x), labels)
    finally:
        for handle in handles:
            handle.remove()
    names, states = [*every, "end"], [*inputs.values(), last[0]]
    grads = torch.autograd.grad(loss, states)
    norms = [(name, grad.norm().item()) for name, grad in zip(names, grads, strict=True)]
    found = []
    for stage in dict.fromkeys(name.rpartition(".")[0] for name in every):
        chosen = [i for i, (name, block) in enumerate(every.items()) if name.rpartition(".")[0] == stage and _adds(block)]
        if chosen:
            found.append(_stretch(stage, list(every.values()), states, grads, chosen))
    return Signal(norms, found)


def _keep(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(*seen: Any) -> None:
        inputs[name] = seen[1][0]

    return hook


def _adds(block: Block) -> bool:
    return block.merge is not None and block.merge.kind == "residual" and keeps_shape(block)


@torch.no_grad()
def _stretch(stage: str, every: list[Block], states: list[Tensor], grads: tuple[Tensor, ...], chosen: list[int]) -> Stretch:
    first, end = chosen[0], chosen[-1] + 1
    total = sum((halves(every[i], states[i])[1].double() for i in chosen), torch.zeros_like(states[first], dtype=torch.double))
    moved = states[end].double() - states[first].double()
    difference = ((moved - total).norm() / moved.norm().clamp(min=1e-30)).item()
    here, there = grads[first].double(), grads[end].double()
    identity = ((here * there).sum() / here.square().sum().clamp(min=1e-30)).item()
    return Stretch(stage, len(chosen), difference, identity)
