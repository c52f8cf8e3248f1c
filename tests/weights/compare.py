"""Comparison of networks with random weights."""

import torch
from torch import nn


def shaken(model: nn.Module) -> nn.Module:
    """Randomizes the BN statistics and parameters of a model and returns it in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.1)  # type: ignore[arg-type]
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.0)  # type: ignore[arg-type]
    return model.eval()


def same_logits(one: nn.Module, other: nn.Module, sizes: tuple[int, ...], channels: int = 3) -> None:
    for size in sizes:
        x = torch.randn(2, channels, size, size)
        with torch.no_grad():
            torch.testing.assert_close(one(x), other(x), rtol=1e-5, atol=1e-5)
