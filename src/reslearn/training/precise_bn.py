"""Precise BN: statistics averaged over training images instead of a moving average. Used after training (DRL 3.4), and for a
backbone before a detector freezes it (DRL appendix A)."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable[Tensor], keep: Collection[nn.Module] = ()) -> None:
    """Replace the running means and variances of a network by averages over batches of normalized input, float32 (N, C, H, W).

    All other layers are in evaluation mode meanwhile. keep: BN layers to leave unchanged.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module not in keep]
    momenta, modes = [layer.momentum for layer in layers], {module: module.training for module in model.modules()}
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    try:
        for i, batch in enumerate(batches, start=1):
            for layer in layers:
                layer.momentum = 1 / i  # equal weight for all batches
            model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
