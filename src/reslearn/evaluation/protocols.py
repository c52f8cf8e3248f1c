"""Runs a network on a single view of each image (DRL 3.4 and 4.2) or on many (DRL 3.4)."""

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

PIXELS = 1 << 22  # maximum pixels of a batch of views


class EvalSource(Protocol):
    """Images of a split, such as Resident and Photos."""

    labels: Tensor
    holes: set[int]  # indices of unreadable images among those requested so far

    def __len__(self) -> int: ...

    def eval_batch(self, start: int, stop: int) -> Tensor: ...


class Predictions(NamedTuple):
    """Logits float32 (N, classes), labels int64 (N,) and the images' indices in their split, int64 (N,), on the CPU."""

    logits: Tensor
    labels: Tensor
    indices: Tensor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode and restores the modes at the end."""
    modes = {module: module.training for module in model.modules()}  # frozen modules are in evaluation mode already
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
    """Logits of all readable images of a split. progress(images done) is called after each batch.

    flip: average the logits of each image and its horizontal flip.
    forward: replaces the model's forward, such as a captured graph; may overwrite its output at the next call.
    The training modes of all modules are restored.
    """
    run = forward or model
    logits = []
    with evaluating(model):
        for start in range(0, len(source), batch):
            images = source.eval_batch(start, start + batch).contiguous(memory_format=torch.channels_last)
            with autocast or nullcontext():
                output = run(images).float().cpu()
                logits.append((output + run(images.flip(3)).float().cpu()) / 2 if flip else output)
            progress(min(start + batch, len(source)))
    readable = torch.tensor([i for i in range(len(source)) if i not in source.holes], dtype=torch.int64)
    return Predictions(torch.cat(logits)[readable], source.labels.cpu()[readable], readable)


@torch.inference_mode()
def many_views(
    model: nn.Module, pictures: Pictures, protocol: Views, *, progress: Callable[[int], None] = lambda done: None
) -> Predictions:
    """Scores of all readable images, averaged over many views, as log-scores in Predictions.logits (softmax returns the scores).

    The score of a view is the mean softmax output (float32) over the positions of its map; the score of an image is the mean
    over its views and their flips. Views of the same size are batched across images. Apart from the scores, memory does not
    grow with the number of images. progress(images done) is called after each batch. The training modes of all modules are
    restored.
    """
    preprocessing, device = pictures.preprocessing, next(model.parameters()).device
    normalize = normalizer(preprocessing, protocol.fully_convolutional, device)
    done = torch.zeros(len(pictures), dtype=torch.int64)  # views per image
    sums: Tensor | None = None
    with evaluating(model):
        run = convolutional(model, preprocessing.size) if protocol.fully_convolutional else model
        for indices, pixels in of_one_size(pictures.views(protocol), PIXELS // (2 if protocol.mirror else 1)):
            scores = _scores(run, pixels.to(device), normalize, protocol.mirror).cpu()
            sums = torch.zeros(len(pictures), scores.shape[1]) if sums is None else sums
            sums.index_add_(0, indices, scores)
            done.index_add_(0, indices, torch.ones_like(indices))
            progress(int((done == protocol.count).sum()) + len(pictures.holes))
    if sums is None:
        raise UserError("none of the images can be read")
    readable = done.nonzero()[:, 0]
    return Predictions(log(sums[readable] / protocol.count), torch.from_numpy(pictures.split.labels)[readable], readable)


def _scores(run: Callable[[Tensor], Tensor], pixels: Tensor, normalize: Normalizer, mirror: bool) -> Tensor:
    """Mean softmax outputs of views and, if `mirror`, their flips: uint8 (N, H, W, C) -> float32 (N, classes)."""
    images = normalize(pixels.permute(0, 3, 1, 2))
    both = torch.cat([images, images.flip(3)]) if mirror else images
    scores = run(both.contiguous(memory_format=torch.channels_last)).float().softmax(1)
    scores = scores.flatten(2).mean(2) if scores.ndim == 4 else scores
    return scores.unflatten(0, (2, -1)).mean(0) if mirror else scores


def error_and_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Top-1 error in percent and mean cross-entropy in nats, for logits (N, K) float32 and labels (N,) int64."""
    wrong = (logits.argmax(1) != labels).double().mean()
    return 100 * wrong.item(), F.cross_entropy(logits.double(), labels).item()
