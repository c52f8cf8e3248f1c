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
    """One block. branch: the norm of F by that of what the shortcut brings. difference: the norm of out - (shortcut + F), by that
    of F: rounding alone where nothing follows the addition."""

    block: str
    branch: float
    difference: float


@dataclass(frozen=True)
class Stretch:
    """The blocks of one stage whose input and output have one shape, from x_l to x_L.

    difference: the norm of (x_L - x_l) - sum of F(x_i), relative to that of x_L - x_l: rounding alone where all shortcuts are
    identities and nothing follows the additions.
    The gradient dE/dx_l has two parts: what came through the shortcuts alone (dE/dx_L itself, where they are identities and
    nothing follows the additions), and the rest, through branches.
    identity: the first part as a share: its inner product with dE/dx_l by the squared norm of that; the rest's share is 1 less
    this. It can be above 1 or below 0, where the parts work against each other.
    shortcuts, branches: the parts' norms by that of dE/dx_l.
    """

    stage: str
    blocks: int
    difference: float
    identity: float
    shortcuts: float
    branches: float


@dataclass(frozen=True)
class Signal:
    """gradients: norm of dE/dx at the input of each block, in order, and at the end. Of a plain network there is nothing else.

    whole: as of a stretch, from the first block's input to the last one's output, across what changes the shape; its
    `difference` is None, for x_L - x_l is not defined there.
    """

    gradients: list[tuple[str, float]]
    steps: list[Step]
    stretches: list[Stretch]
    whole: tuple[float, float, float] | None  # identity, shortcuts, branches


class _Parts:
    """Of gradients at one place, chunk by chunk: the square, the product with the shortcuts' part, the squares of both parts."""

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
    """The signals of a network in evaluation, with the mean loss of images (N, C, H, W) and labels (N,) as E.

    Raises UserError where the network has no blocks.
    """
    named = blocks(model)
    names, every = list(named), list(named.values())
    ends = [*names, "end"]
    stages = _stages(names, every)
    residual = all(block.has_shortcut for block in every)
    adding = [i for i, block in enumerate(every) if block.adds]
    squares = dict.fromkeys(ends, 0.0)
    sizes = {i: [0.0, 0.0, 0.0] for i in adding}  # squared norms of the shortcut's part, the branch, the difference
    moved = {stage: [0.0, 0.0] for stage in stages}  # squared norms of x_L - x_l and of the difference
    parts = {stage: _Parts() for stage in stages}
    whole = _Parts()
    for few, their in chunks(images, labels):
        start = stem(model, few).detach().requires_grad_()
        states = through(every, start)
        loss = F.cross_entropy(head(model, states[-1]), their, reduction="sum") / len(images)
        grads = torch.autograd.grad(loss, states)
        for name, grad in zip(ends, grads, strict=True):
            squares[name] += grad.double().square().sum().item()
        with torch.no_grad():
            branches = {}
            for i in adding:
                shortcut, branches[i] = halves(every[i], states[i])
                difference = states[i + 1].double() - (shortcut.double() + branches[i].double())
                for k, x in enumerate((shortcut, branches[i], difference)):
                    sizes[i][k] += x.double().square().sum().item()
            for stage, chosen in stages.items():
                step = states[chosen[-1] + 1].double() - states[chosen[0]].double()
                total = sum((branches[i].double() for i in chosen), torch.zeros_like(step))
                moved[stage][0] += step.square().sum().item()
                moved[stage][1] += (step - total).square().sum().item()
        for stage, chosen in stages.items():
            parts[stage].add(grads[chosen[0]], _by_shortcuts(every, states, grads, chosen[0], chosen[-1] + 1))
        if residual:
            whole.add(grads[0], _by_shortcuts(every, states, grads, 0, len(every)))
    return Signal(
        [(name, squares[name] ** 0.5) for name in ends],
        [Step(names[i], _ratio(sizes[i][1], sizes[i][0]), _ratio(sizes[i][2], sizes[i][1])) for i in adding],
        [Stretch(s, len(chosen), _ratio(moved[s][1], moved[s][0]), *parts[s].shares()) for s, chosen in stages.items()],
        whole.shares() if residual else None,
    )


def _stages(names: list[str], every: list[Block]) -> dict[str, list[int]]:
    """stage -> places of its blocks that add to what keeps its shape."""
    found: dict[str, list[int]] = {}
    for i, (name, block) in enumerate(zip(names, every, strict=True)):
        if block.adds and block.keeps_shape():
            found.setdefault(name.rpartition(".")[0], []).append(i)
    return found


def _by_shortcuts(every: list[Block], states: list[Tensor], grads: tuple[Tensor, ...], start: int, end: int) -> Tensor:
    """The part of the gradient at states[start] that comes from states[end] through shortcuts alone."""
    grad = grads[end]
    for i in reversed(range(start, end)):
        x = states[i].detach().requires_grad_()
        grad = torch.autograd.grad(one_way(every[i], x, branch=False), x, grad)[0]
    return grad


def _ratio(a: float, b: float) -> float:
    """Of two norms, given their squares."""
    return (a / max(b, 1e-60)) ** 0.5
