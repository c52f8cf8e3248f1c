"""A residual network as an ensemble of paths: their lengths, and which carry the gradient (Veit et al., sections 3 and 5)."""

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
    """Statistics by path length: the number of blocks passed through their branch, 0 to n.

    share: of all 2^n paths. norm: mean gradient norm of one path at the first block's input. carried: share of the gradient
    carried by all paths of a length, share * norm normalized to sum to 1. effective: range of lengths that carries at least 95%,
    found by trimming the smaller end. effective_share: share of all paths with these lengths. sampled: norm of each sampled path.
    """

    blocks: int
    share: list[float]
    norm: list[float]
    carried: list[float]
    effective: tuple[int, int]
    effective_share: float
    sampled: list[list[float]]


def paths(
    model: nn.Module, images: Tensor, labels: Tensor, *, draws: int = 16, seed: int = 0, progress: Progress = silent
) -> Paths:
    """Samples `draws` paths of each length k: the forward pass is unchanged, and the gradient of the mean loss flows back through
    the branches of k blocks and the shortcuts of the others.

    images: (N, C, H, W), labels: (N,). Raises UserError for a network without shortcuts.
    """
    sequence = list(residual_blocks(model).values())
    n, rng = len(sequence), random.Random(seed)
    sampled = [[frozenset(rng.sample(range(n), k)) for _ in range(1 if k in (0, n) else draws)] for k in range(n + 1)]
    squares = [[0.0] * len(of_length) for of_length in sampled]
    parts = list(chunks(images, labels))
    total, done = len(parts) * sum(map(len, sampled)), 0
    for part, part_labels in parts:
        backward = _Backward(model, sequence, part, part_labels, len(images))
        for k, of_length in enumerate(sampled):
            for i, branches in enumerate(of_length):
                squares[k][i] += backward.along(branches).double().square().sum().item()
                done += 1
                progress("paths", done, total)
    norms = [[square**0.5 for square in of_length] for of_length in squares]
    norm = [sum(of_length) / len(of_length) for of_length in norms]
    share = [math.comb(n, k) / 2**n for k in range(n + 1)]
    carried = _weighted(share, norm)
    low, high = _middle(carried)
    return Paths(n, share, norm, carried, (low, high), sum(share[low : high + 1]), norms)


class _Backward:
    """The autograd graphs of each block's branch and shortcut, so that many paths share one forward pass.

    The loss is the mean over `total` images, of which `images` are a part.
    """

    def __init__(self, model: nn.Module, sequence: list[Block], images: Tensor, labels: Tensor, total: int) -> None:
        with torch.no_grad():
            states = through(sequence, stem(model, images))
        end = states[-1].detach().requires_grad_()
        loss = F.cross_entropy(head(model, end), labels, reduction="sum") / total
        self.end_grad = torch.autograd.grad(loss, end)[0]
        self.inputs = [x.detach().requires_grad_() for x in states[:-1]]
        pairs = list(zip(sequence, self.inputs, strict=True))
        self.outputs = {branch: [one_way(block, x, branch) for block, x in pairs] for branch in (False, True)}

    def along(self, branches: frozenset[int]) -> Tensor:
        """The gradient (N, C, H, W) at the first block's input along the path through the branches of these blocks."""
        grad = self.end_grad
        for i in reversed(range(len(self.inputs))):
            grad = torch.autograd.grad(self.outputs[i in branches][i], self.inputs[i], grad, retain_graph=True)[0]
        return grad


def _weighted(share: list[float], norm: list[float]) -> list[float]:
    """share * norm, normalized to sum to 1. In log space: a network with 110 layers has 2^54 paths."""
    logs = [math.log(s) + math.log(x) if x and math.isfinite(x) else -math.inf for s, x in zip(share, norm, strict=True)]
    top = max(logs)
    weights = [math.exp(log - top) if top > -math.inf else 0.0 for log in logs]
    return [weight / (sum(weights) or 1) for weight in weights]


def _middle(carried: list[float]) -> tuple[int, int]:
    """The range left after dropping the smaller end while at least CARRIED remains."""
    low, high = 0, len(carried) - 1
    rest = sum(carried)
    while low < high:
        smaller = min(carried[low], carried[high])
        if rest - smaller < CARRIED:
            break
        rest -= smaller
        low, high = (low + 1, high) if carried[low] <= carried[high] else (low, high - 1)
    return low, high
