"""How a network is tested: on the single view of each image (DRL 3.4 and 4.2), or on many (DRL 3.4)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.data.preprocess import Normalizer
from reslearn.errors import UserError
from reslearn.evaluation.scores import log
from reslearn.evaluation.views import Pictures, Views, normalizer, of_one_size
from reslearn.nets.convolutional import convolutional

PIXELS = 1 << 22  # of views that go through a network together


class EvalSource(Protocol):
    """Images of a split, as Resident and Photos hold them."""

    labels: Tensor
    holes: set[int]  # images that could not be read, known once they were asked for

    def __len__(self) -> int: ...

    def eval_batch(self, start: int, stop: int) -> Tensor: ...


class Predictions(NamedTuple):
    """Logits float32 (N, classes), labels int64 (N,) and the images' places in their split, int64 (N,); on the CPU."""

    logits: Tensor
    labels: Tensor
    indices: Tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the one, training or evaluation, that it came in."""
    modes = {module: module.training for module in model.modules()}  # a frozen part is in evaluation mode already
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.inference_mode()
def single_view(
    model: nn.Module,
    source: EvalSource,
    *,
    batch: int = 250,
    forward: Callable[[Tensor], Tensor] | None = None,
    flip: bool = False,
    autocast: AbstractContextManager[Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Predictions:
    """Logits of every image of a split that can be read. progress(images done) is called after each batch.

    flip: the mean of the logits of each image and its mirror.
    forward: another way to run the model, such as a captured one; its logits may be overwritten by its next call.
    Every module comes back in the mode, training or evaluation, that it came in.
    """
    run = forward or model
    logits = []
    with evaluating(model):
        for start in range(0, len(source), batch):
            images = source.eval_batch(start, start + batch).contiguous(memory_format=torch.channels_last)
            with autocast or nullcontext():
                seen = run(images).float().cpu()
                logits.append((seen + run(images.flip(3)).float().cpu()) / 2 if flip else seen)
            progress(min(start + batch, len(source)))
    readable = torch.tensor([i for i in range(len(source)) if i not in source.holes], dtype=torch.int64)
    return Predictions(torch.cat(logits)[readable], source.labels.cpu()[readable], readable)


@torch.inference_mode()
def many_views(
    model: nn.Module, pictures: Pictures, protocol: Views, *, progress: Callable[[int], None] = lambda done: None
) -> Predictions:
    """Logarithms of the mean scores of every image that can be read, as Predictions's logits: their softmax gives the scores back.

    The score of an image is the mean over its views and their mirrors; that of a view the mean over the places of its map, of
    softmax outputs in float32. Views of one size go through the network together, whatever images they are of. Beside the
    scores, memory does not grow with the number of images. progress(images done) is called as they are done.
    Every module comes back in the mode, training or evaluation, that it came in.
    """
    look, on = pictures.look, next(model.parameters()).device
    normalize = normalizer(look, protocol.as_map, on)
    seen = torch.zeros(len(pictures), dtype=torch.int64)  # views of each image
    sums: Tensor | None = None
    with evaluating(model):
        run = convolutional(model, look.size) if protocol.as_map else model
        for places, pixels in of_one_size(pictures.views(protocol), PIXELS // (2 if protocol.mirror else 1)):
            scores = _scores(run, pixels.to(on), normalize, protocol.mirror).cpu()
            sums = torch.zeros(len(pictures), scores.shape[1]) if sums is None else sums
            sums.index_add_(0, places, scores)
            seen.index_add_(0, places, torch.ones_like(places))
            progress(int((seen == protocol.count).sum()) + len(pictures.holes))
    if sums is None:
        raise UserError("none of the images can be read")
    readable = seen.nonzero()[:, 0]
    return Predictions(log(sums[readable] / protocol.count), torch.from_numpy(pictures.split.labels)[readable], readable)


def _scores(run: Callable[[Tensor], Tensor], pixels: Tensor, normalize: Normalizer, mirror: bool) -> Tensor:
    """Mean softmax outputs of views and, where asked for, their mirrors: uint8 (N, H, W, C) -> float32 (N, classes)."""
    images = normalize(pixels.permute(0, 3, 1, 2))
    both = torch.cat([images, images.flip(3)]) if mirror else images
    scores = run(both.contiguous(memory_format=torch.channels_last)).float().softmax(1)
    scores = scores.flatten(2).mean(2) if scores.ndim == 4 else scores
    return scores.unflatten(0, (2, -1)).mean(0) if mirror else scores


def error_and_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 error in percent and mean cross-entropy in nats, of logits (N, K) float32 and labels (N,) int64."""
    wrong = (logits.argmax(1) != labels).double().mean()
    return 100 * wrong.item(), F.cross_entropy(logits.double(), labels).item()
