"""Stem, stages of blocks, head: the ImageNet shape and the CIFAR shape (DRL Table 1 and section 4.2)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from reslearn.nets.block import Block
from reslearn.nets.options import Spec
from reslearn.nets.shortcuts import conv
from reslearn.nets.variants import ExclusiveGate, expansion, make_block


class Stem(nn.Module):
    """What begins with the stem of a ResNet, under its names."""

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module

    def stem(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> what the first block is given."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class ResNet(Stem):
    """A residual or plain network: (N, channels, H, W) float -> logits (N, classes).

    Stem "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2 (any input of 32 px or more works);
    stem "cifar" is one 3x3 convolution. Every stage but the first halves the size. State-dict names are torchvision's.
    `stages` names the stages; `channels` and `strides` (input pixels from one output to the next) tell what each puts out.
    """

    def __init__(self, net: Spec, classes: int, channels: int = 3) -> None:
        super().__init__()
        large, normalized = net.stem == "imagenet", net.block != "highway"
        self.recompute = False  # see recomputed
        features = net.widths[0]
        self.conv1 = conv(channels, features, 7, 2) if large else conv(channels, features, 3, bias=not normalized)
        self.bn1 = nn.BatchNorm2d(features) if normalized else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        ceil = net.pool == "ceil"
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if ceil else 1, ceil_mode=ceil) if large else nn.Identity()
        self.stages = tuple(f"layer{i}" for i in range(1, len(net.blocks) + 1))
        self.channels = tuple(width * expansion(net.block) for width in net.widths)
        self.strides = tuple((4 if large else 1) * 2**i for i in range(len(net.blocks)))
        done = 0
        for i, (stage, count, width) in enumerate(zip(self.stages, net.blocks, net.widths, strict=True)):
            blocks = []
            for j in range(count):
                done += 1
                survival = 1 - done / sum(net.blocks) * (1 - net.last_survival)
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(make_block(features, width, stride, block=net.block, options=net, first=done == 1, survival=survival))
                features = self.channels[i]
            self.add_module(stage, nn.Sequential(*blocks))
        # After the last addition a pre-activation net has yet to normalize and activate (IM, appendix).
        end = [nn.BatchNorm2d(features)] if net.order == "full" else []
        self.end = nn.Sequential(*end, nn.ReLU()) if net.order in ("relu-only", "full") else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, classes)
        initialize(self, zero_init_last_gamma=net.zero_init_last_gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))

    def body(self, x: Tensor) -> Tensor:
        """x through all stages."""
        for stage in map(self.get_submodule, self.stages):
            if self.recompute and self.training:
                for block in stage.children():
                    x = recomputed(block, x)
            else:
                x = stage(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """What the last block puts out -> logits (N, classes)."""
        return self.fc(torch.flatten(self.avgpool(self.end(x)), 1))


@torch.no_grad()
def initialize(net: nn.Module, *, zero_init_last_gamma: bool = False) -> None:
    """He initialization of every convolution: normal with variance 2 / fan-out (He et al., Delving Deep into Rectifiers).

    The last linear layer keeps PyTorch's own uniform initialization. zero_init_last_gamma starts every residual branch at zero
    (Goyal et al., 2017, section 5.1); it is not in the paper, so it is off unless a recipe asks for it.
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
    """block(x), of which only x is kept for the backward pass, where the block is run again (Chen et al., 2016).

    The result is the same, bit for bit. It takes the memory of one block and of the inputs of all, and a third more time.
    """
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(block)))


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """BN normalizes by its batch without counting it: it has been counted."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms if norm.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(counted)  # type: ignore[union-attr]
