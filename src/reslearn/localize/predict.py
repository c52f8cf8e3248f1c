"""Predictions of a localizer: the best box of each class, proposals, and their refinement by the second stage."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.images.stream import ahead
from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError
from reslearn.evaluation.views import of_one_size
from reslearn.localize.net import Localizer, warp
from reslearn.localize.views import view_of

PIXELS = 1 << 20  # of views that are looked at together
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Reports no progress."""


def pixels_of(data: BoxSet, i: int, look: Preprocessing) -> np.ndarray:
    """Image i, uint8 (H, W, 3). Raises UserError where the model sees no colors."""
    image = data.images[i].pixels()
    if look.channels == 3:
        return image
    raise UserError(f"the model takes images of {look.channels} channels, but annotated images are read in color")


def _seen(model: Localizer, data: BoxSet, scale: int | None, progress: Progress) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """All images as the model sees them, some of one size at once: places (n,), its input (n, C, H, W), the way back (n, 4)."""
    look, device = model.card.preprocessing, next(model.parameters()).device
    normalize, n, done = look.normalizer(device), len(data), 0
    back = np.zeros((n, 4))

    def see(i: int) -> tuple[int, list[np.ndarray]]:
        view, back[i] = view_of(pixels_of(data, i, look), look, scale)
        return i, [view]

    for places, pixels in of_one_size(ahead(see, range(n), min(os.cpu_count() or 1, 8)), PIXELS):
        at = places.numpy()
        yield at, normalize(pixels.to(device).permute(0, 3, 1, 2)), back[at]
        done += len(at)
        progress("1 crop" if scale is None else f"{scale} px", done, n)


def _to_image(boxes: Tensor, back: np.ndarray) -> np.ndarray:
    """Boxes (n, ..., 4) of views in their images, float64."""
    found = boxes.cpu().double().numpy()
    shape = (len(found), *[1] * (found.ndim - 2), 4)
    return (found + np.tile(back[:, :2], 2).reshape(shape)) * np.tile(back[:, 2:], 2).reshape(shape)


@torch.inference_mode()
def predict(
    model: Localizer, data: BoxSet, scales: Sequence[int] | None = None, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """The highest-scored box of each class on each image: logits float64 (N, K), boxes float64 (N, K, 4) in the image's pixels.

    scales: shorter sides in px at which the whole image is seen, the best of all places and scales being taken; None: one crop,
    the middle of the image.
    """
    n, k = len(data), len(model.classes)
    best, boxes = np.full((n, k), -np.inf), np.zeros((n, k, 4))
    for scale in [None] if scales is None else scales:
        for at, x, back in _seen(model, data, scale, progress):
            logits, found = model.best(x)
            scores, here = logits.cpu().double().numpy(), _to_image(found, back)
            better = scores > best[at]
            best[at] = np.where(better, scores, best[at])
            boxes[at] = np.where(better[..., None], here, boxes[at])
    return best, boxes


@torch.inference_mode()
def propose(
    model: Localizer, data: BoxSet, classes: np.ndarray, count: int, scales: Sequence[int] = (), progress: Progress = silent
) -> np.ndarray:
    """The `count` highest-scored boxes of some classes of each image, best first: float32 (N, C, count, 4), in its pixels.

    classes: int (N, C), which of them in each image. scales: of the whole image, as predict's; by default the one that crops
    are taken from. Where there are fewer boxes, the last one stands for the missing ones. No box is thinner than 1 px.
    """
    n, c = classes.shape
    scores, boxes = np.full((n, c, count), -np.inf), np.zeros((n, c, count, 4))
    for scale in scales or (min(model.card.preprocessing.covered),):
        for at, x, back in _seen(model, data, scale, progress):
            logits, found = model.ranked(x, torch.from_numpy(classes[at]).to(x.device), count)
            both = np.concatenate([scores[at], logits.cpu().double().numpy()], 2)
            order = np.argsort(-both, axis=2, kind="stable")[..., :count]
            scores[at] = np.take_along_axis(both, order, 2)
            boxes[at] = np.take_along_axis(np.concatenate([boxes[at], _to_image(found, back)], 2), order[..., None], 2)
    last = np.isfinite(scores).sum(2) - 1  # of those that there are
    place = np.minimum(np.arange(count), last[..., None])
    boxes = np.take_along_axis(boxes, place[..., None], 2)
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    return boxes.astype(np.float32)


@torch.inference_mode()
def refine(
    model: Localizer, data: BoxSet, classes: np.ndarray, proposals: np.ndarray, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """Applies the second stage to proposals (see propose): scores and moves each, and keeps the highest-scored one.

    Returns logits float64 (N, K) and boxes float64 (N, K, 4) in the image's pixels; -inf and 0 of classes that `classes` has not.
    """
    assert model.regions is not None
    look, device = model.card.preprocessing, next(model.parameters()).device
    normalize, n, k = look.normalizer(device), len(data), len(model.classes)
    best, boxes = np.full((n, k), -np.inf), np.zeros((n, k, 4))
    some = max(1, PIXELS // (look.size[0] * look.size[1]))

    def see(i: int) -> Tensor:
        return torch.from_numpy(np.array(pixels_of(data, i, look)))

    for i, pixels in enumerate(ahead(see, range(n), min(os.cpu_count() or 1, 8))):
        image = normalize(pixels.to(device).permute(2, 0, 1)[None])[0]
        limits = torch.tensor([image.shape[2], image.shape[1]] * 2, device=device)
        for own, given in zip(classes[i].tolist(), torch.from_numpy(proposals[i]).to(device), strict=True):
            if np.isfinite(best[i, own]):  # the class is named twice
                continue
            scores, moved = [], []
            for part in given.split(some):
                logits, deltas = model.regions(warp(image, part, look.size))
                scores.append(logits[:, own].float())
                moved.append(model.regions.coder.decode_single(deltas[:, own].float(), part))
            top = torch.cat(scores).argmax()
            best[i, own] = torch.cat(scores)[top].item()
            boxes[i, own] = torch.minimum(torch.cat(moved)[top].clamp(min=0), limits).cpu().double().numpy()
        progress("regions", i + 1, n)
    return best, boxes
