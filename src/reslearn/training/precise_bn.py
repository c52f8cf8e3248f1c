"""BN statistics as a true average over training images instead of a moving one: after training (DRL 3.4), and of a backbone
before a detector freezes them (DRL appendix A).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from reslearn.data.augment import Draws
from reslearn.data.boxes.source import BoxSource
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.detect.backbone import settle_batch_norm
from reslearn.detect.recipes import DetectRecipe
from reslearn.training import ranks, runtime
from reslearn.training.display import Display
from reslearn.training.loop import Loop

TOGETHER = 8  # images of a detector's that are averaged over at once


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
    order, first = SampleOrder(recipe.seed, len(source), size), loop.total * recipe.batch.size // size
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


def settle_backbone(
    net: nn.Module, images: int, recipe: DetectRecipe, view: Preprocessing, source: BoxSource, display: Display
) -> None:
    """The same of a classification network before it becomes a detector's backbone: over the first training images, in the size
    that the detector sees, and mirrored as in training.
    """
    device = next(net.parameters()).device
    sides = recipe.detector.min_size, recipe.detector.max_size
    fit = GeneralizedRCNNTransform(*sides, list(view.mean), list(view.std), size_divisible=1)  # nothing is padded
    order = SampleOrder(recipe.seed, len(source), TOGETHER)

    def batches() -> Iterator[Tensor]:
        for done in range(0, images, TOGETHER):
            epochs, indices = (drawn[: images - done] for drawn in order[done // TOGETHER])
            photos, _ = source.train_batch(Draws(view_seed(recipe.seed), epochs, indices))
            scaled = [fit([photo.to(device)])[0].tensors[0] for photo in photos]
            height, width = (min(each.shape[side] for each in scaled) for side in (-2, -1))  # cut, as what pads would count, too
            yield torch.stack([each[:, :height, :width] for each in scaled])
            display.progress("averaging BN", min(done + TOGETHER, images), images)

    settle_batch_norm(net, batches())
    ranks.wait(ranks.PREPARING)
    ranks.average([buffer for buffer in net.buffers() if buffer.is_floating_point()])  # the same on all, bit for bit
    display.say(f"         its BN statistics are averages over {images} training images")
