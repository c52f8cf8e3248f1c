"""BN statistics as a true average over training images after training, instead of the moving one (DRL 3.4)."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from reslearn.data.augment import Draws
from reslearn.data.draws import Order, view_seed
from reslearn.training import runtime
from reslearn.training.loop import Loop


@torch.no_grad()
def settle_bn(model: nn.Module, loop: Loop, stop: runtime.Stop) -> None:
    """Replace the running means and variances of a network by averages over `precise_bn` batches of augmented training images,
    those that would come next; nothing where the recipe has no precise_bn. Layers that training kept frozen stay as they are.
    """
    recipe, source = loop.recipe, loop.sources.train
    if recipe.precise_bn is None:
        return
    frozen = {name for name, module in loop.state.model.named_modules() if module in _within(loop.state.frozen)}
    layers = [m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and name not in frozen]
    size = recipe.batch.micro or recipe.batch.size
    order, first = Order(recipe.seed, len(source), size), loop.total * recipe.batch.size // size
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    try:
        for i in range(recipe.precise_bn):
            stop.check()
            epochs, indices = order[first + i]
            images, _ = source.train_batch(Draws(view_seed(recipe.seed), epochs.to(loop.device), indices.to(loop.device)))
            for layer in layers:
                layer.momentum = 1 / (i + 1)  # so that all batches count alike
            model(images.contiguous(memory_format=torch.channels_last))
            loop.display.progress("averaging BN", i + 1, recipe.precise_bn)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        model.eval()


def _within(parts: list[nn.Module]) -> set[nn.Module]:
    return {module for part in parts for module in part.modules()}
