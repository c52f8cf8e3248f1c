"""ResNet: stem, stages of blocks and head, in the ImageNet and CIFAR versions (DRL Table 1 and section 4.2)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from reslearn.html import table
from reslearn.nets.block import Block
from reslearn.nets.options import Spec
from reslearn.nets.shortcuts import conv
from reslearn.nets.variants import ExclusiveGate, expansion, make_block


class Stem(nn.Module):
    """A module that starts with a ResNet's stem."""

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module

    def stem(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) -> input of the first block."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class ResNet(Stem):
    """A residual or plain network: (N, channels, H, W) float -> logits (N, classes).

    Stem "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2 (works for inputs of 32 px or more);
    stem "cifar" is one 3x3 convolution. Every stage but the first halves the size. State-dict names are torchvision's.

    `stages` holds the names of the stages, `channels` their output channels, `strides` their output strides in input pixels.
    """

    def __init__(self, net: Spec, classes: int, channels: int = 3) -> None:
        super().__init__()
        large, normalized = net.stem == "imagenet", net.block != "highway"
        self.recompute = False  # activation checkpointing, see recomputed()
        features = net.widths[0]
        self.conv1 = conv(channels, features, 7, 2) if large else conv(channels, features, 3, bias=not normalized)
        self.bn1 = nn.BatchNorm2d(features) if normalized else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        ceil = net.pool == "ceil"
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if ceil else 1, ceil_mode=ceil) if large else nn.Identity()
        self.stages = tuple(f"layer{i}" for i in range(1, len(net.blocks) + 1))
        self.channels = tuple(width * expansion(net.block) for width in net.widths)
        self.strides = tuple((4 if large else 1) * 2**i for i in range(len(net.blocks)))
        index = 0  # of the block, from 1
        for i, (stage, count, width) in enumerate(zip(self.stages, net.blocks, net.widths, strict=True)):
            blocks = []
            for j in range(count):
                index += 1
                survival = 1 - index / sum(net.blocks) * (1 - net.last_survival)  # SD, equation 4
                stride = 2 if i > 0 and j == 0 else 1
                first = index == 1
                blocks.append(make_block(features, width, stride, block=net.block, options=net, first=first, survival=survival))
                features = self.channels[i]
            self.add_module(stage, nn.Sequential(*blocks))
        # The last addition of a pre-activation net is followed by BN and ReLU (IM, appendix).
        end = [nn.BatchNorm2d(features)] if net.order == "full" else []
        self.end = nn.Sequential(*end, nn.ReLU()) if net.order in ("relu-only", "full") else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, classes)
        initialize(self, zero_init_last_gamma=net.zero_init_last_gamma)

    def _repr_html_(self) -> str:
        card, count = getattr(self, "card", None), sum(parameter.numel() for parameter in self.parameters())
        rows: list[tuple[str, object]] = [("parameters", f"{count:,}"), ("stages", ", ".join(map(str, self.channels)))]
        if card is not None:
            rows += [
                ("classes", ", ".join(card.classes)),
                ("input", "x".join(map(str, (card.preprocessing.channels, *card.preprocessing.size)))),
                ("made by", card.made_by),
            ]
        return table(rows, title=card.net if card is not None else type(self).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    def body(self, x: Tensor) -> Tensor:
        """Applies all stages."""
        for stage in map(self.get_submodule, self.stages):
            if self.recompute and self.training:
                for block in stage.children():
                    x = recomputed(block, x)
            else:
                x = stage(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Feature map of the last stage -> logits (N, classes)."""
        return self.fc(torch.flatten(self.avgpool(self.end(x)), 1))


@torch.no_grad()
def initialize(net: nn.Module, *, zero_init_last_gamma: bool = False) -> None:
    """Initializes every convolution from a normal distribution with variance 2 / fan-out (He et al., Delving Deep into Rectifiers).

    The linear layer keeps PyTorch's default (uniform) initialization. zero_init_last_gamma starts every residual branch at zero
    (Goyal et al., 2017, section 5.1); off by default because the paper does not do it.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, ExclusiveGate) and module.gate.bias is not None:
            nn.init.constant_(module.gate.bias, module.bias)
        if zero_init_last_gamma and isinstance(module, Block):
            _, bn = module.layers()[-1]
            assert isinstance(bn, nn.BatchNorm2d)
            nn.init.zeros_(bn.weight)


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x) with activation checkpointing: only x is stored, and the backward pass runs the block again (Chen et al., 2016).

    The result is bit-exact. Memory holds the activations of one block and the inputs of all; a step takes a third longer.
    """
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block)))


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Keeps BN's running statistics unchanged: the first forward pass has updated them with this batch."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms if norm.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]
