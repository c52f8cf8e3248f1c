"""Blocks of the follow-up papers: other orders of conv, BN and ReLU, other merges, stochastic depth, and Highway's block.

Each order of IM Figure 4 is a class that overrides the steps of Block. Every order works with every merge and both bodies, so
the convolutions come from `layers()` instead of being written out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.nets.block import BasicBlock, Block, Bottleneck, PlainBlock
from reslearn.nets.options import BlockKind, Merge, NetOptions, Order
from reslearn.nets.shortcuts import conv, make_shortcut

# block -> its convolutions as (kernel size, output channels as a multiple of the block's width)
BODIES: dict[BlockKind, tuple[tuple[int, int], ...]] = {
    "basic": ((3, 1), (3, 1)),
    "bottleneck": ((1, 1), (3, 1), (1, 4)),
    "plain": ((3, 1), (3, 1)),
    "highway": ((3, 1),),
}


def expansion(block: BlockKind) -> int:
    """Output channels of a block as a multiple of its width: 4 for the bottleneck, else 1."""
    return BODIES[block][-1][1]


def make_block(
    in_channels: int,
    width: int,
    stride: int = 1,
    *,
    block: BlockKind = "basic",
    options: NetOptions,
    first: bool = False,
    survival: float = 1.0,
) -> Block:
    """Returns a new block. first: whether it is the network's first block, whose input is activated by the stem already."""
    if block != "highway" and options.order == "original" and options.merge == "residual" and survival == 1:
        if block == "plain":
            return PlainBlock(in_channels, width, stride)
        if block == "basic":
            return BasicBlock(in_channels, width, stride, shortcut=options.shortcut)
        return Bottleneck(in_channels, width, stride, shortcut=options.shortcut, stride_in=options.stride_in)
    kind = Highway if block == "highway" else ORDERS[options.order]
    return kind(in_channels, width, stride, block, options, first, survival)


class Variant(Block):
    """A block of any order, merge and body. Arguments: see make_block."""

    inplace = True  # ReLU
    normalize_shortcut = True  # BN after a projection

    def __init__(
        self, in_channels: int, width: int, stride: int, block: BlockKind, options: NetOptions, first: bool, survival: float
    ) -> None:
        channels = [in_channels, *(width * multiple for _, multiple in BODIES[block])]
        super().__init__(in_channels, channels[-1], stride)
        self.first, self.has_shortcut = first, block != "plain"
        strided = 2 if block == "bottleneck" and options.stride_in == "3x3" else 1
        for i, (kernel, _) in enumerate(BODIES[block], start=1):
            self.add_layer(i, channels[i - 1], channels[i], kernel, stride if i == strided else 1)
        self.relu = nn.ReLU(inplace=self.inplace)
        self.downsample = self.merge = None
        if self.has_shortcut:
            self.downsample = make_shortcut(options.shortcut, in_channels, channels[-1], stride, normalize=self.normalize_shortcut)
            self.merge = make_merge(options, channels[-1], gate_kernel=3 if block == "highway" else 1)
        self.adds = self.has_shortcut and self.merge is None
        self.stochastic_depth = StochasticDepth(survival, options.per_sample) if survival < 1 else None

    def add_layer(self, i: int, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        """Adds conv<i> and its BN, in the order of the state dict."""
        self.add_module(f"conv{i}", conv(in_channels, out_channels, kernel, stride))
        self.add_module(f"bn{i}", nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if not self.has_shortcut:
            return self.after(self.branch(x))
        shortcut = self.shortcut(x)
        return self.after(self.join(self.branch(x), shortcut))

    def branch(self, x: Tensor) -> Tensor:
        return self.body(x) if self.stochastic_depth is None else self.stochastic_depth(self.body, x)

    def body(self, x: Tensor) -> Tensor:
        """The branch without stochastic depth."""
        raise NotImplementedError

    def join(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut if self.merge is None else self.merge(branch, shortcut)

    def hidden(self, x: Tensor) -> Tensor:
        """Applies the layers of the branch up to the last convolution, without its BN."""
        *layers, (last, _) = self.layers()
        for convolution, bn in layers:
            x = self.bn_relu(bn, convolution(x))
        return last(x)

    def last_bn(self) -> nn.Module:
        return self.layers()[-1][1]

    def bn_relu(self, bn: nn.Module, x: Tensor) -> Tensor:
        return self.relu(bn(x))

    def after(self, x: Tensor) -> Tensor:
        return x


class Original(Variant):
    """IM Figure 4 (a): the order of DRL, here combined with another merge or stochastic depth."""

    def body(self, x: Tensor) -> Tensor:
        return self.last_bn()(self.hidden(x))

    def after(self, x: Tensor) -> Tensor:
        return self.relu(x)


class BnAfterAddition(Variant):
    """IM Figure 4 (b)."""

    def body(self, x: Tensor) -> Tensor:
        return self.hidden(x)

    def after(self, x: Tensor) -> Tensor:
        return self.bn_relu(self.last_bn(), x)


class ReluBeforeAddition(Variant):
    """IM Figure 4 (c)."""

    def body(self, x: Tensor) -> Tensor:
        return self.bn_relu(self.last_bn(), self.hidden(x))


class PreActivation(Variant):
    """Base class of the orders that activate the input of each convolution instead of the sum.

    A block that changes the shape shares the activated input between branch and shortcut. The first block does not activate
    its input: the stem has done so (IM, appendix).
    """

    normalize_shortcut = False  # IM, appendix

    def activate(self, x: Tensor) -> Tensor:
        """Activates the block's input."""
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        return self.activate(x) if self.changes_shape and not self.first else x

    def body(self, x: Tensor) -> Tensor:
        return self.activated(x if self.changes_shape or self.first else self.activate(x))

    def activated(self, x: Tensor) -> Tensor:
        """The branch for an activated input."""
        raise NotImplementedError


class ReluOnlyPreActivation(PreActivation):
    """IM Figure 4 (d)."""

    inplace = False  # the input of the block is its shortcut too

    def activate(self, x: Tensor) -> Tensor:
        return self.relu(x)

    def activated(self, x: Tensor) -> Tensor:
        return self.last_bn()(self.hidden(x))


class FullPreActivation(PreActivation):
    """IM Figure 4 (e): BN and ReLU before each convolution."""

    def add_layer(self, i: int, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        if i > 1 or not self.first:
            self.add_module(f"bn{i}", nn.BatchNorm2d(in_channels))
        self.add_module(f"conv{i}", conv(in_channels, out_channels, kernel, stride))

    def activate(self, x: Tensor) -> Tensor:
        return self.bn_relu(self.layers()[0][1], x)

    def activated(self, x: Tensor) -> Tensor:
        (first, _), *layers = self.layers()
        x = first(x)
        for convolution, bn in layers:
            x = convolution(self.bn_relu(bn, x))
        return x


class Highway(Variant):
    """A Highway block: one convolution with bias and ReLU, without BN, with a gate (Srivastava et al., 2015)."""

    def add_layer(self, i: int, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        self.add_module(f"conv{i}", conv(in_channels, out_channels, kernel, stride, bias=True))

    def body(self, x: Tensor) -> Tensor:
        for convolution, _ in self.layers():
            x = self.relu(convolution(x))
        return x


ORDERS: dict[Order, type[Variant]] = {
    "original": Original,
    "bn-after-addition": BnAfterAddition,
    "relu-before-addition": ReluBeforeAddition,
    "relu-only": ReluOnlyPreActivation,
    "full": FullPreActivation,
}


def make_merge(options: NetOptions, channels: int, gate_kernel: int) -> nn.Module | None:
    """Returns a module (branch, shortcut) -> merged (IM Table 1), or None for the sum."""
    if options.merge in GATES:
        return GATES[options.merge](channels, gate_kernel, options.gate_bias)
    return {"residual": None, "constant": Halves(), "dropout": ShortcutDropout()}[options.merge]


class Halves(nn.Module):
    """The mean of branch and shortcut: constant scaling by 0.5 (IM 3.1, Figure 2b)."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return 0.5 * shortcut + 0.5 * branch


class ExclusiveGate(nn.Module):
    """(1 - g) x + g F, where g is the sigmoid of a convolution of x (IM Figure 2c; also Highway's merge).

    bias: initial bias of the gate's convolution; initialize() applies it.
    """

    def __init__(self, channels: int, kernel: int, bias: float) -> None:
        super().__init__()
        self.gate, self.bias = conv(channels, channels, kernel, bias=True), bias

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(shortcut))
        return (1 - gate) * shortcut + gate * branch


class ShortcutGate(ExclusiveGate):
    """(1 - g) x + F (IM Figure 2d)."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return (1 - torch.sigmoid(self.gate(shortcut))) * shortcut + branch


class ShortcutDropout(nn.Module):
    """F + x with half of x dropped (IM Figure 2f)."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + F.dropout(shortcut, 0.5, self.training)


GATES: dict[Merge, type[ExclusiveGate]] = {"exclusive-gate": ExclusiveGate, "shortcut-gate": ShortcutGate}


class StochasticDepth(nn.Module):
    """Keeps a branch with probability `survival` in training and scales it by `survival` in evaluation (SD, equations 2 and 5).

    per_sample: sample a gate per image instead of one per mini-batch (as published).
    """

    def __init__(self, survival: float, per_sample: bool = False) -> None:
        super().__init__()
        self.survival, self.per_sample = survival, per_sample

    def forward(self, body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Returns the gated body(x), or a scalar 0, without running body, when the branch of the mini-batch is dropped."""
        if not self.training:
            return self.survival * body(x)
        if self.per_sample:
            gates = torch.rand(len(x), 1, 1, 1, device=x.device) < self.survival
            return gates * body(x)
        return body(x) if torch.rand(()).item() < self.survival else x.new_zeros(())

    def extra_repr(self) -> str:
        return f"survival={self.survival:g}"
