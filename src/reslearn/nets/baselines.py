"""Baselines: torchvision's networks, and DenseNet for CIFAR."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F


def torchvision_net(name: str, classes: int, channels: int) -> nn.Module:
    """One of torchvision's networks, with its state-dict names and initialization."""
    extra: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    net = getattr(torchvision.models, name)(weights=None, num_classes=classes, **extra)
    if channels != 3:
        _replace_first_convolution(net, channels)
    return net


def _replace_first_convolution(net: nn.Module, channels: int) -> None:
    """Replaces the first convolution by one with another number of input channels."""
    name, first = next((name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    parent, _, attribute = name.rpartition(".")
    replacement = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    setattr(net.get_submodule(parent), attribute, replacement)


class DenseLayer(nn.Module):
    """BN-ReLU-conv whose output is concatenated to its input; variant B has a 1x1 bottleneck of 4 * growth channels before it."""

    def __init__(self, in_channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        inner = 4 * growth if bottleneck else in_channels
        if bottleneck:
            self.norm1, self.conv1 = nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bottleneck = bottleneck
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x))) if self.bottleneck else x
        return torch.cat([x, self.conv2(F.relu(self.norm2(new)))], 1)


class CifarDenseNet(nn.Module):
    """DenseNet for 32 px images (Huang et al., section 3, Implementation Details): (N, channels, H, W) -> logits (N, classes).

    depth: 3n + 4, or 6n + 4 with bc. bc: bottleneck layers, and transitions that halve the channels.
    """

    def __init__(self, depth: int, growth: int, bc: bool, classes: int, channels: int) -> None:
        super().__init__()
        layers = (depth - 4) // (6 if bc else 3)
        features = 2 * growth if bc else 16
        modules: dict[str, nn.Module] = {"conv0": nn.Conv2d(channels, features, 3, padding=1, bias=False)}
        for block in (1, 2, 3):
            for layer in range(1, layers + 1):
                modules[f"block{block}_{layer}"] = DenseLayer(features, growth, bc)
                features += growth
            if block < 3:
                kept = features // 2 if bc else features
                transition = (nn.BatchNorm2d(features), nn.ReLU(), nn.Conv2d(features, kept, 1, bias=False), nn.AvgPool2d(2))
                modules[f"transition{block}"] = nn.Sequential(*transition)
                features = kept
        modules["norm"] = nn.BatchNorm2d(features)
        self.features = nn.Sequential()
        for name, module in modules.items():
            self.features.add_module(name, module)
        self.classifier = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))
