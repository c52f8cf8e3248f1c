"""The blocks of a network, and tools to run them in parts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from reslearn.errors import UserError
from reslearn.nets.block import Block
from reslearn.nets.resnet import ResNet


def has_blocks(model: nn.Module) -> bool:
    """Whether a network contains residual, plain or highway blocks of this package."""
    return any(isinstance(module, Block) for module in model.modules())


def blocks(model: nn.Module) -> dict[str, Block]:
    """The blocks of a network by state-dict name, in order. Raises UserError if it has none."""
    named = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    if not named:
        raise UserError("this network has no blocks: use a residual, plain or highway network")
    return named


def residual_blocks(model: nn.Module) -> dict[str, Block]:
    """The blocks of a network with shortcuts, by state-dict name. Raises UserError for a network without shortcuts."""
    named = blocks(model)
    if not all(block.has_shortcut for block in named.values()):
        raise UserError("this network has no shortcuts: use a residual network")
    return named


def has_shortcuts(model: nn.Module) -> bool:
    """Whether a network has blocks, all with shortcuts."""
    return has_blocks(model) and all(block.has_shortcut for block in blocks(model).values())


def depth(model: nn.Module) -> int:
    """Number of weight layers as the paper counts them: convolutions and linear layers, excluding projection shortcuts."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return sum("downsample" not in name for name in layers)


def halves(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of a block's shortcut and branch before they are added, in evaluation mode, both (N, C, H, W)."""
    x = block.before(x)
    return block.shortcut(x), block.branch(x)


class Deleted(nn.Module):
    """A block without its branch (Veit et al., section 4.1); for a plain block, the identity."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if not self.block.has_shortcut:
            return x
        return self.block.after(self.block.shortcut(self.block.before(x)).clone())  # `after` works in place


@contextmanager
def replaced(model: nn.Module, by: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replaces modules of a model by name, temporarily."""
    before = {name: model.get_submodule(name) for name in by}
    try:
        for name, module in by.items():
            _put(model, name, module)
        yield
    finally:
        for name, module in before.items():
            _put(model, name, module)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def stem(model: nn.Module, images: Tensor) -> Tensor:
    """Input of the first block: (N, C, H, W)."""
    assert isinstance(model, ResNet)
    return model.stem(images)


def head(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, classes) from the output of the last block."""
    assert isinstance(model, ResNet)
    return model.head(x)


def through(sequence: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """The input of each block in sequence, followed by the output of the last."""
    states = [x]
    for block in sequence:
        states.append(block(states[-1]))
    return states


def one_way(block: Block, x: Tensor, branch: bool) -> Tensor:
    """block(x), with gradients flowing back through the residual branch only (branch=True) or the shortcut only."""
    shortcut, moved = halves(block, x)
    joined = block.join(moved, shortcut.detach()) if branch else block.join(moved.detach(), shortcut)
    return block.after(joined)


@torch.no_grad()
def convolutions(model: nn.Module, images: Tensor, kernel: tuple[int, int] | None = None) -> dict[str, str | None]:
    """The convolutions (of one kernel size) in execution order, each with the BN applied to its output, or None.

    Runs the model once on images (N, C, H, W): a BN belongs to the convolution whose output tensor is its input.
    """
    pairs: dict[str, str | None] = {}
    last: tuple[str, Tensor] | None = None

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal last
        if isinstance(module, nn.Conv2d):
            pairs[name], last = None, (name, out)
        elif last is not None and inputs[0] is last[1]:
            pairs[last[0]] = name

    handles = [
        module.register_forward_hook(partial(hook, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and not name.endswith(".gate")
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: bn for name, bn in pairs.items() if kernel in (None, model.get_submodule(name).kernel_size)}
