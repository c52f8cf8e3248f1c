"""BN statistics as a true average over training images instead of a moving one: after training (DRL 3.4), and of a backbone
before a detector freezes them (DRL appendix A)."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable[Tensor], keep: Collection[nn.Module] = ()) -> None:
    """Replace the running means and variances of a network by their averages over batches of its normalized input, (N, C, H, W).

    Everything but BN is in evaluation mode meanwhile. keep: layers that stay as they are.
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
                layer.momentum = 1 / i  # all batches count alike
            model(batch)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, training in modes.items():
            module.training = training
