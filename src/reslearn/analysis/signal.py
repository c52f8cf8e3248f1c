"""Signals through identity shortcuts, forward and backward (IM, equations 3 to 5)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.analysis.parts import blocks, halves, head, one_way, stem, through
from reslearn.analysis.subject import chunks
from reslearn.nets.block import Block


@dataclass(frozen=True)
class Step:
    """One block. branch: the norm of F relative to the shortcut's output. difference: the norm of out - (shortcut + F) relative to
    F; only rounding if nothing follows the addition."""

    block: str
    branch: float
    difference: float


@dataclass(frozen=True)
class Stretch:
    """The blocks of one stage that keep the shape, from x_l to x_L.

    difference: the norm of (x_L - x_l) - sum of F(x_i) relative to that of x_L - x_l; only rounding if all shortcuts are
    identities and nothing follows the additions.
    The gradient dE/dx_l is the sum of two parts: through the shortcuts alone (dE/dx_L itself, under the same conditions), and
    through branches.
    identity: share of the first part: its inner product with dE/dx_l over the squared norm of dE/dx_l. The branches' share is
    1 - identity. Values above 1 or below 0 mean that the parts oppose each other.
    shortcuts, branches: the norms of the parts relative to dE/dx_l.
    """

    stage: str
    blocks: int
    difference: float
    identity: float
    shortcuts: float
    branches: float


@dataclass(frozen=True)
class Signal:
    """gradients: the norm of dE/dx at the input of each block, in order, and at the end. The rest is empty for a plain network.

    whole: (identity, shortcuts, branches) as in Stretch, from the first block's input to the last block's output.
    """

    gradients: list[tuple[str, float]]
    steps: list[Step]
    stretches: list[Stretch]
    whole: tuple[float, float, float] | None


class _Parts:
    """Accumulates squared norms and the inner product of a gradient and its parts, chunk by chunk."""

    def __init__(self) -> None:
        self.whole = self.product = self.shortcuts = self.branches = 0.0

    def add(self, whole: Tensor, shortcuts: Tensor) -> None:
        whole, shortcuts = whole.double(), shortcuts.double()
        self.whole += whole.square().sum().item()
        self.product += (whole * shortcuts).sum().item()
        self.shortcuts += shortcuts.square().sum().item()
        self.branches += (whole - shortcuts).square().sum().item()

    def shares(self) -> tuple[float, float, float]:
        whole = max(self.whole, 1e-60)
        return self.product / whole, (self.shortcuts / whole) ** 0.5, (self.branches / whole) ** 0.5


def signal(model: nn.Module, images: Tensor, labels: Tensor) -> Signal:
    """Measures a network in evaluation mode. E is the mean cross-entropy of images (N, C, H, W) and labels (N,).

    Raises UserError if the network has no blocks.
    """
    named = blocks(model)
    names, sequence = list(named), list(named.values())
    points = [*names, "end"]
    stages = _stages(names, sequence)
    residual = all(block.has_shortcut for block in sequence)
    adding = [i for i, block in enumerate(sequence) if block.adds]
    squares = dict.fromkeys(points, 0.0)
    sizes = {i: [0.0, 0.0, 0.0] for i in adding}  # squared norms: shortcut, branch, difference
    moved = {stage: [0.0, 0.0] for stage in stages}  # squared norms: x_L - x_l, difference
    parts = {stage: _Parts() for stage in stages}
    whole = _Parts()
    for part, part_labels in chunks(images, labels):
        start = stem(model, part).detach().requires_grad_()
        states = through(sequence, start)
        loss = F.cross_entropy(head(model, states[-1]), part_labels, reduction="sum") / len(images)
        grads = torch.autograd.grad(loss, states)
        for name, grad in zip(points, grads, strict=True):
            squares[name] += grad.double().square().sum().item()
        with torch.no_grad():
            branches = {}
            for i in adding:
                shortcut, branches[i] = halves(sequence[i], states[i])
                difference = states[i + 1].double() - (shortcut.double() + branches[i].double())
                for k, x in enumerate((shortcut, branches[i], difference)):
                    sizes[i][k] += x.double().square().sum().item()
            for stage, chosen in stages.items():
                step = states[chosen[-1] + 1].double() - states[chosen[0]].double()
                total = sum((branches[i].double() for i in chosen), torch.zeros_like(step))
                moved[stage][0] += step.square().sum().item()
                moved[stage][1] += (step - total).square().sum().item()
        for stage, chosen in stages.items():
            parts[stage].add(grads[chosen[0]], _by_shortcuts(sequence, states, grads, chosen[0], chosen[-1] + 1))
        if residual:
            whole.add(grads[0], _by_shortcuts(sequence, states, grads, 0, len(sequence)))
    return Signal(
        [(name, square**0.5) for name, square in squares.items()],
        [Step(names[i], _ratio(sizes[i][1], sizes[i][0]), _ratio(sizes[i][2], sizes[i][1])) for i in adding],
        [Stretch(s, len(chosen), _ratio(moved[s][1], moved[s][0]), *parts[s].shares()) for s, chosen in stages.items()],
        whole.shares() if residual else None,
    )


def _stages(names: list[str], sequence: list[Block]) -> dict[str, list[int]]:
    """Stage -> indices of its blocks that add a branch and keep the shape."""
    stages: dict[str, list[int]] = {}
    for i, (name, block) in enumerate(zip(names, sequence, strict=True)):
        if block.adds and block.keeps_shape():
            stages.setdefault(name.rpartition(".")[0], []).append(i)
    return stages


def _by_shortcuts(sequence: list[Block], states: list[Tensor], grads: tuple[Tensor, ...], start: int, end: int) -> Tensor:
    """The part of the gradient at states[start] that comes from states[end] through shortcuts alone."""
    grad = grads[end]
    for i in reversed(range(start, end)):
        x = states[i].detach().requires_grad_()
        grad = torch.autograd.grad(one_way(sequence[i], x, branch=False), x, grad)[0]
    return grad


def _ratio(a: float, b: float) -> float:
    """The ratio of two norms, from their squares."""
    return (a / max(b, 1e-60)) ** 0.5
