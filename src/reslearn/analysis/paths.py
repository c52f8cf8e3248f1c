"""A residual network as many paths: how long they are, and which of them carry the gradient (Veit et al., sections 3 and 5)."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.analysis.parts import head, one_way, residual_blocks, stem, through
from reslearn.analysis.subject import chunks
from reslearn.nets.block import Block
from reslearn.progress import Progress, silent

CARRIED = 0.95


@dataclass(frozen=True)
class Paths:
    """By length (blocks passed through their branch), 0 .. n.

    share: of all 2^n paths. norm: mean gradient norm at the first block's input of one path. carried: share of the gradient
    that all paths of a length carry: share * norm, so that its sum is 1. effective: the shortest range of lengths, by dropping
    the ends, that carries at least 95%; effective_share: of all paths, how many are of these lengths.
    sampled: the norm of each path that was drawn.
    """

    blocks: int
    share: list[float]
    norm: list[float]
    carried: list[float]
    effective: tuple[int, int]
    effective_share: float
    sampled: list[list[float]]


def paths(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    draws: int = 16,
    seed: int = 0,
    progress: Progress = silent,
) -> Paths:
    """Samples paths of each length: all blocks compute as ever, and the gradient of the mean loss comes back through the branches
    of k of them and the shortcuts of the others. images: (N, C, H, W), labels: (N,).

    Raises UserError for a network without shortcuts.
    """
    every = list(residual_blocks(model).values())
    n, draw = len(every), random.Random(seed)
    sampled = [[frozenset(draw.sample(range(n), k)) for _ in range(1 if k in (0, n) else draws)] for k in range(n + 1)]
    squares = [[0.0] * len(each) for each in sampled]
    parts = list(chunks(images, labels))
    total, done = len(parts) * sum(map(len, sampled)), 0
    for few, their in parts:
        backward = _Backward(model, every, few, their, len(images))
        for k, each in enumerate(sampled):
            for i, chosen in enumerate(each):
                squares[k][i] += backward.along(chosen).double().square().sum().item()
                done += 1
                progress("paths", done, total)
    norms = [[square**0.5 for square in each] for each in squares]
    norm = [sum(each) / len(each) for each in norms]
    share = [math.comb(n, k) / 2**n for k in range(n + 1)]
    carried = _weighted(share, norm)
    low, high = _middle(carried)
    return Paths(n, share, norm, carried, (low, high), sum(share[low : high + 1]), norms)


class _Backward:
    """The graphs of each block, by its branch and by its shortcut, so that many paths cost one forward pass.

    Of a mean loss over `of` images, of which these are some.
    """

    def __init__(self, model: nn.Module, every: list[Block], images: Tensor, labels: Tensor, of: int) -> None:
        with torch.no_grad():
            states = through(every, stem(model, images))
        end = states[-1].detach().requires_grad_()
        loss = F.cross_entropy(head(model, end), labels, reduction="sum") / of
        self.first = torch.autograd.grad(loss, end)[0]
        self.inputs = [x.detach().requires_grad_() for x in states[:-1]]
        pairs = list(zip(every, self.inputs, strict=True))
        self.outputs = {way: [one_way(block, x, branch=way) for block, x in pairs] for way in (False, True)}

    def along(self, chosen: frozenset[int]) -> Tensor:
        """The gradient at the first block's input of the path through the branches of these blocks: (N, C, H, W)."""
        grad = self.first
        for i in reversed(range(len(self.inputs))):
            grad = torch.autograd.grad(self.outputs[i in chosen][i], self.inputs[i], grad, retain_graph=True)[0]
        return grad


def _weighted(share: list[float], norm: list[float]) -> list[float]:
    """share * norm, so that its sum is 1; in logarithms, for there are 2^54 paths in a net of 110 layers."""
    logs = [math.log(s) + math.log(x) if x and math.isfinite(x) else -math.inf for s, x in zip(share, norm, strict=True)]
    top = max(logs)
    weights = [math.exp(log - top) if top > -math.inf else 0.0 for log in logs]
    return [weight / (sum(weights) or 1) for weight in weights]


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
