"""Stem, stages of blocks, head: the ImageNet shape and the CIFAR shape (DRL Table 1 and section 4.2)."""

from typing import Literal

import torch
from torch import Tensor, nn

from reslearn.nets.blocks import Block, Body, Merge, Shortcut, StrideIn, conv, expansion, initialise

Stem = Literal["imagenet", "cifar"]


class ResNet(nn.Module):
    """A residual or plain network: (N, channels, H, W) float -> logits (N, classes).

    Stem "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max pool of stride 2 (any input of 32 px or more works);
    stem "cifar" is one 3x3 convolution. Every stage but the first halves the size. State-dict names are torchvision's.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        stem: Stem,
        body: Body,
        merge: Merge = "residual",
        shortcut: Shortcut = "B",
        stride_in: StrideIn = "1x1",
        zero_init_last_gamma: bool = False,
        classes: int,
        channels: int = 3,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = conv(channels, widths[0], 7, 2) if large else conv(channels, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        self.stages = tuple(f"layer{i}" for i in range(1, len(blocks) + 1))
        features = widths[0]
        for i, (stage, n, width) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            stage_blocks = []
            for j in range(n):
                stride = 2 if i > 0 and j == 0 else 1
                stage_blocks.append(Block(features, width, stride, body=body, merge=merge, shortcut=shortcut, stride_in=stride_in))
                features = width * expansion(body)
            self.add_module(stage, nn.Sequential(*stage_blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, classes)
        initialise(self, zero_init_last_gamma=zero_init_last_gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))
