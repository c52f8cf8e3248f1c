"""The blocks of a network, and ways to run them other than whole."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reslearn.errors import UserError
from reslearn.nets.blocks import Block
from reslearn.nets.resnet import ResNet


def blocks(model: nn.Module) -> dict[str, Block]:
    """The blocks of a network by their state-dict names, in order. Raises UserError where it has none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Block)}
    if not found:
        raise UserError("this network has no blocks: take a residual or a plain one")
    return found


def residual_blocks(model: nn.Module) -> dict[str, Block]:
    """The same, where blocks have shortcuts. Raises UserError where they have none."""
    found = blocks(model)
    if any(block.merge is None for block in found.values()):
        raise UserError("this network is plain: it has no shortcuts")
    return found


def halves(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a block adds up, in evaluation: its shortcut's part and its branch's, both (N, C, H, W)."""
    x = block.run(block.shared, x)
    shortcut = x if block.downsample is None else block.downsample(x)
    branch = (
        block.run(block.branch, x) if block.gate_depth is None else block.gate_depth(lambda i: block.run(block.branch, i), x, x)
    )
    return shortcut, branch


def keeps_shape(block: Block) -> bool:
    """Whether a block's input and output have one shape, so that it can be left out."""
    return block.downsample is None and not (block.merge is None and _changes(block))


def _changes(block: Block) -> bool:
    first, last = _convolutions(block)[0], _convolutions(block)[-1]
    strided = any(conv.stride != (1, 1) for conv in _convolutions(block))
    return strided or first.in_channels != last.out_channels


def _convolutions(block: Block) -> list[nn.Conv2d]:
    return [module for name, module in block.named_children() if name.startswith("conv") and isinstance(module, nn.Conv2d)]


class Deleted(nn.Module):
    """A block without its branch (Veit et al., section 4.1); a plain block of one shape, without anything."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        if self.block.merge is None:
            return x
        x = self.block.run(self.block.shared, x)
        shortcut = x.clone() if self.block.downsample is None else self.block.downsample(x)  # what follows works in place
        return self.block.run(self.block.end, shortcut)


class OneWay(nn.Module):
    """A block that computes as ever, and lets the gradient back through one way only (Veit et al., section 5).

    branch: through the residual branch, else through the shortcut.
    """

    def __init__(self, block: Block, branch: bool) -> None:
        super().__init__()
        self.block, self.branch = block, branch

    def forward(self, x: Tensor) -> Tensor:
        assert self.block.merge is not None
        shortcut, branch = halves(self.block, x)
        merged = self.block.merge(branch, shortcut.detach()) if self.branch else self.block.merge(branch.detach(), shortcut)
        return self.block.run(self.block.end, merged)


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
    return model.maxpool(model.relu(model.bn1(model.conv1(images))))


def from_stem(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (N, classes) from what the first block gets."""
    assert isinstance(model, ResNet)
    for stage in map(model.get_submodule, model.stages):
        x = stage(x)
    return model.fc(torch.flatten(model.avgpool(model.end(x)), 1))
