"""A residual network as many paths: how long they are, and which of them carry the gradient (Veit et al., sections 3 and 5)."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.analysis.parts import OneWay, from_stem, replaced, residual_blocks, stem

CARRIED = 0.95


@dataclass(frozen=True)
class Paths:
    """By length (blocks passed through their branch), 0 .. n.

    share: of all 2^n paths. norm: mean gradient norm at the first block's input of one path. carried: share of the gradient
    that all paths of a length carry. effective: the shortest range of lengths, by dropping the ends, that carries at least 95%.
    """

    blocks: int
    share: list[float]
    norm: list[float]
    carried: list[float]
    effective: tuple[int, int]
    effective_share: float


def gradient_norm(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Norm of the gradient of the mean loss with respect to what the first block gets."""
    x = x.detach().requires_grad_()
    loss = F.cross_entropy(from_stem(model, x), labels)
    return torch.autograd.grad(loss, x, allow_unused=True, materialize_grads=True)[0].norm().item()


def paths(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    draws: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Paths:
    """Samples paths of each length: all blocks compute as ever, and the gradient comes back through the branches of k of them
    and the shortcuts of the others. Raises UserError for a network without shortcuts.
    """
    every = residual_blocks(model)
    n, draw = len(every), random.Random(seed)
    with torch.no_grad():
        x = stem(model, images)
    norms = []
    for k in range(n + 1):
        found = []
        for _ in range(1 if k in (0, n) else draws):
            through = set(draw.sample(list(every), k))
            with replaced(model, {name: OneWay(block, name in through) for name, block in every.items()}):
                found.append(gradient_norm(model, x, labels))
        norms.append(sum(found) / len(found))
        progress(k + 1, n + 1)
    share = [math.comb(n, k) / 2**n for k in range(n + 1)]
    # In logarithms: there are 2^54 paths in a net of 110 layers.
    logs = [math.log(s) + (math.log(norm) if norm else -math.inf) for s, norm in zip(share, norms, strict=True)]
    top = max(logs)
    weights = [math.exp(log - top) if top > -math.inf else 0.0 for log in logs]
    carried = [weight / (sum(weights) or 1) for weight in weights]
    low, high = _middle(carried)
    return Paths(n, share, norms, carried, (low, high), sum(share[low : high + 1]))


def _middle(carried: list[float]) -> tuple[int, int]:
    """The range that is left when the smaller end is dropped for as long as CARRIED remains."""
    low, high = 0, len(carried) - 1
    rest = sum(carried)
    while low < high:
        smaller = min(carried[low], carried[high])
        if rest - smaller < CARRIED:
            break
        rest -= smaller
        low, high = (low + 1, high) if carried[low] <= carried[high] else (low, high - 1)
    return low, high
