"""Stem, stages of blocks, head: the ImageNet shape and the CIFAR shape (DRL Table 1 and section 4.2)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from reslearn.kernels import fuse as fused
from reslearn.nets.blocks import PRE_ACTIVATION, Block, Body, Order, expansion, initialize
from reslearn.nets.shortcuts import conv

Stem = Literal["imagenet", "cifar"]
Pool = Literal["padded", "ceil"]


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


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which only x is kept for the backward pass, where the block is run again (Chen et al., 2016).

    The result is the same, bit for bit. It takes the memory of one block and of the inputs of all, and a third more time.
    """
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(block)))


class ResNet(nn.Module):
    """A residual or plain network: (N, channels, H, W) float -> logits (N, classes).

    Stem "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2 (any input of 32 px or more works);
    stem "cifar" is one 3x3 convolution. Every stage but the first halves the size. pool "ceil" is the Caffe release's: no
    padding, sizes rounded up. last_survival: stochastic depth, linear from 1 to this at the last block (SD, equation 4).
    State-dict names are torchvision's. `stages` names the stages; `channels` and `strides` (input pixels from one output to the
    next) tell what each puts out.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        stem: Stem,
        body: Body,
        order: Order = "original",
        pool: Pool = "padded",
        last_survival: float = 1.0,
        zero_init_last_gamma: bool = False,
        classes: int,
        channels: int = 3,
        **block: Any,
    ) -> None:
        super().__init__()
        large, normalized = stem == "imagenet", order != "no-bn"
        self.recompute = False  # see recomputed
        self.conv1 = conv(channels, widths[0], 7, 2) if large else conv(channels, widths[0], 3, bias=not normalized)
        self.bn1 = nn.BatchNorm2d(widths[0]) if normalized else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        ceil = pool == "ceil"
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if ceil else 1, ceil_mode=ceil) if large else nn.Identity()
        self.stages = tuple(f"layer{i}" for i in range(1, len(blocks) + 1))
        self.channels = tuple(width * expansion(body) for width in widths[: len(blocks)])
        self.strides = tuple((4 if large else 1) * 2**i for i in range(len(blocks)))
        features, done = widths[0], 0
        for i, (stage, n, width) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            stage_blocks = []
            for j in range(n):
                done += 1
                survival = 1 - done / sum(blocks) * (1 - last_survival)
                stride = 2 if i > 0 and j == 0 else 1
                stage_blocks.append(
                    Block(features, width, stride, body=body, order=order, first=done == 1, survival=survival, **block)
                )
                features = width * expansion(body)
            self.add_module(stage, nn.Sequential(*stage_blocks))
        # After the last addition a pre-activation net has yet to normalize and activate (IM, appendix).
        end = [nn.BatchNorm2d(features)] if order == "full" else []
        self.end = nn.Sequential(*end, nn.ReLU()) if order in PRE_ACTIVATION else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, classes)
        initialize(self, zero_init_last_gamma=zero_init_last_gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(fused.bn_relu(self.bn1, self.conv1(x), self.relu))
        for stage in map(self.get_submodule, self.stages):
            if self.recompute and self.training:
                for block in stage.children():
                    x = recomputed(block, x)
            else:
                x = stage(x)
        return self.fc(torch.flatten(self.avgpool(self.end(x)), 1))
