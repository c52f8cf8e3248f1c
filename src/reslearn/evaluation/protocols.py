"""How a network is tested: the single view of each image (DRL 3.4 and 4.2)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Source(Protocol):
    """Images of a split, as Resident and Photos hold them."""

    labels: Tensor
    holes: set[int]  # images that could not be read, known once they were asked for

    def __len__(self) -> int: ...

    def eval_batch(self, start: int, stop: int) -> Tensor: ...


class Seen(NamedTuple):
    """Logits float32 (N, classes), labels int64 (N,) and the images' places in their split, int64 (N,); on the CPU."""

    logits: Tensor
    labels: Tensor
    indices: Tensor


@torch.inference_mode()
def single_view(
    model: nn.Module,
    source: Source,
    *,
    batch: int = 250,
    forward: Callable[[Tensor], Tensor] | None = None,
    flip: bool = False,
    autocast: AbstractContextManager[Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Seen:
    """Logits of every image of a split that can be read. progress(images done) is called after each batch.

    flip: the mean of the logits of each image and its mirror.
    forward: another way to run the model, such as a captured one; its logits may be overwritten by its next call.
    Every module comes back in the mode, training or evaluation, that it came in.
    """
    run = forward or model
    modes = {module: module.training for module in model.modules()}  # a frozen part is in evaluation mode already
    model.eval()
    logits = []
    try:
        for start in range(0, len(source), batch):
            images = source.eval_batch(start, start + batch).contiguous(memory_format=torch.channels_last)
            with autocast or nullcontext():
                seen = run(images).float().cpu()
                logits.append((seen + run(images.flip(3)).float().cpu()) / 2 if flip else seen)
            progress(min(start + batch, len(source)))
    finally:
        for module, training in modes.items():
            module.training = training
    readable = torch.tensor([i for i in range(len(source)) if i not in source.holes], dtype=torch.int64)
    return Seen(torch.cat(logits)[readable], source.labels.cpu()[readable], readable)


def error_and_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 error in percent and mean cross-entropy in nats, of logits (N, K) float32 and labels (N,) int64."""
    wrong = (logits.argmax(1) != labels).double().mean()
    return 100 * wrong.item(), F.cross_entropy(logits.double(), labels).item()
