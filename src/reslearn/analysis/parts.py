"""The blocks of a network, and ways to run them other than whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reslearn.errors import UserError
from reslearn.nets.block import Block
from reslearn.nets.resnet import ResNet


def has_blocks(model: nn.Module) -> bool:
    """Whether a network is made of this package's blocks: residual, plain or highway."""
    return any(isinstance(module, Block) for module in model.modules())


def blocks(model: nn.Module) -> dict[str, Block]:
    """The blocks of a network by their state-dict names, in order. Raises UserError where it has none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    if not found:
        raise UserError("this network has no blocks: take a residual or a plain one")
    return found


def residual_blocks(model: nn.Module) -> dict[str, Block]:
    """The same, where blocks have shortcuts. Raises UserError where they have none."""
    found = blocks(model)
    if not all(block.has_shortcut for block in found.values()):
        raise UserError("this network is plain: it has no shortcuts")
    return found


def has_shortcuts(model: nn.Module) -> bool:
    """Whether a network is made of blocks with shortcuts."""
    return has_blocks(model) and all(block.has_shortcut for block in blocks(model).values())


def depth(model: nn.Module) -> int:
    """Layers with weights, as the paper counts them: convolutions and linear layers, without the shortcuts' projections."""
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return sum("downsample" not in name for name in layers)


def halves(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a block adds up, in evaluation: its shortcut's part and its branch's, both (N, C, H, W)."""
    x = block.before(x)
    return block.shortcut(x), block.branch(x)


class Deleted(nn.Module):
    """A block without its branch (Veit et al., section 4.1); a plain block of one shape, without anything."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if not self.block.has_shortcut:
            return x
        return self.block.after(self.block.shortcut(self.block.before(x)).clone())  # what follows works in place


@contextmanager
def replaced(model: nn.Module, by: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules of a model exchanged by name, for a while."""
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
    """What the first block gets: (N, C, H, W)."""
    assert isinstance(model, ResNet)
    return model.stem(images)


def head(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, classes) from what the last block puts out."""
    assert isinstance(model, ResNet)
    return model.head(x)


def through(every: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What goes into each block, and at the end what the last one puts out."""
    states = [x]
    for block in every:
        states.append(block(states[-1]))
    return states


def one_way(block: Block, x: Tensor, branch: bool) -> Tensor:
    """block(x), as ever; the gradient comes back through the residual branch only (`branch`), or through the shortcut only."""
    shortcut, moved = halves(block, x)
    joined = block.join(moved, shortcut.detach()) if branch else block.join(moved.detach(), shortcut)
    return block.after(joined)


@torch.no_grad()
def convolutions(model: nn.Module, images: Tensor, kernel: tuple[int, int] | None = None) -> dict[str, str | None]:
    """The convolutions (of one kernel size) in the order they run, each with the BN that takes its output, or None.

    Found by running the model once on images (N, C, H, W): a BN takes a convolution's output where it is given that very tensor.
    """
    found: dict[str, str | None] = {}
    last: tuple[str, Tensor] | None = None

    def convolved(name: str) -> Callable[..., None]:
        def hook(*seen: Any) -> None:
            nonlocal last
            found[name], last = None, (name, seen[2])

        return hook

    def normalized(name: str) -> Callable[..., None]:
        def hook(*seen: Any) -> None:
            if last is not None and seen[1][0] is last[1]:
                found[last[0]] = name

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith(".gate"):
            handles.append(module.register_forward_hook(convolved(name)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(normalized(name)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: bn for name, bn in found.items() if kernel in (None, model.get_submodule(name).kernel_size)}
