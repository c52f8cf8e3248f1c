"""Predictions of a localizer: each class's best box, proposals, and their refinement by the second stage."""

import os
from collections.abc import Iterator, Sequence

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
from reslearn.progress import Progress, silent

PIXELS = 1 << 20  # pixels per batch


def pixels_of(data: BoxSet, i: int, view: Preprocessing) -> np.ndarray:
    """Image i, uint8 (H, W, 3). Raises UserError if the model does not take color images."""
    image = data.images[i].pixels()
    if view.channels == 3:
        return image
    raise UserError(f"the model takes images with {view.channels} channels, but annotated images are read in color")


def _batches(
    model: Localizer, data: BoxSet, scale: int | None, progress: Progress
) -> Iterator[tuple[np.ndarray, Tensor, np.ndarray]]:
    """All images in batches of one size: indices (n,), the model's input (n, C, H, W), and the transforms back (n, 4), see
    view_of."""
    preprocessing, device = model.card.preprocessing, next(model.parameters()).device
    normalize, n, done = preprocessing.normalizer(device), len(data), 0
    back = np.zeros((n, 4))

    def read(i: int) -> tuple[int, list[np.ndarray]]:
        view, back[i] = view_of(pixels_of(data, i, preprocessing), preprocessing, scale)
        return i, [view]

    for places, pixels in of_one_size(ahead(read, range(n), min(os.cpu_count() or 1, 8)), PIXELS):
        indices = places.numpy()
        yield indices, normalize(pixels.to(device).permute(0, 3, 1, 2)), back[indices]
        done += len(indices)
        progress("1 crop" if scale is None else f"{scale} px", done, n)


def _to_image(view_boxes: Tensor, back: np.ndarray) -> np.ndarray:
    """Converts boxes (n, ..., 4) from pixels of the views to pixels of the images, float64."""
    boxes = view_boxes.cpu().double().numpy()
    shape = (len(boxes), *[1] * (boxes.ndim - 2), 4)
    return (boxes + np.tile(back[:, :2], 2).reshape(shape)) * np.tile(back[:, 2:], 2).reshape(shape)


@torch.inference_mode()
def predict(
    model: Localizer, data: BoxSet, scales: Sequence[int] | None = None, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """The highest-scored box of each class in each image: logits, float64 (N, K), and boxes, float64 (N, K, 4), in its pixels.

    scales: shorter sides, px, of the whole image; the best box over all positions and scales is taken. None: the center crop.
    """
    n, k = len(data), len(model.classes)
    best, boxes = np.full((n, k), -np.inf), np.zeros((n, k, 4))
    for scale in [None] if scales is None else scales:
        for at, x, back in _batches(model, data, scale, progress):
            logits, view_boxes = model.best(x)
            scores = logits.cpu().double().numpy()
            better = scores > best[at]
            best[at] = np.where(better, scores, best[at])
            boxes[at] = np.where(better[..., None], _to_image(view_boxes, back), boxes[at])
    return best, boxes


@torch.inference_mode()
def propose(
    model: Localizer, data: BoxSet, classes: np.ndarray, count: int, scales: Sequence[int] = (), progress: Progress = silent
) -> np.ndarray:
    """The `count` highest-scored boxes of some classes in each image, best first: float32 (N, C, count, 4), in its pixels.

    classes: int (N, C), the classes by image. scales: as for predict; by default the scale of the center crop. If there are fewer
    boxes, the last one is repeated. Boxes are at least 1 px wide and high.
    """
    n, c = classes.shape
    scores, boxes = np.full((n, c, count), -np.inf), np.zeros((n, c, count, 4))
    for scale in scales or (min(model.card.preprocessing.covered),):
        for at, x, back in _batches(model, data, scale, progress):
            logits, view_boxes = model.ranked(x, torch.from_numpy(classes[at]).to(x.device), count)
            both = np.concatenate([scores[at], logits.cpu().double().numpy()], 2)
            order = np.argsort(-both, axis=2, kind="stable")[..., :count]
            scores[at] = np.take_along_axis(both, order, 2)
            boxes[at] = np.take_along_axis(np.concatenate([boxes[at], _to_image(view_boxes, back)], 2), order[..., None], 2)
    last = np.isfinite(scores).sum(2) - 1
    boxes = np.take_along_axis(boxes, np.minimum(np.arange(count), last[..., None])[..., None], 2)
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    return boxes.astype(np.float32)


@torch.inference_mode()
def refine(
    model: Localizer, data: BoxSet, classes: np.ndarray, proposals: np.ndarray, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """Applies the second stage to proposals (see propose): scores and refines each, and keeps the highest-scored one.

    Returns logits, float64 (N, K), and boxes, float64 (N, K, 4), in the image's pixels; -inf and 0 for classes not in `classes`.
    """
    assert model.regions is not None
    view, device = model.card.preprocessing, next(model.parameters()).device
    normalize, n, k = view.normalizer(device), len(data), len(model.classes)
    best, boxes = np.full((n, k), -np.inf), np.zeros((n, k, 4))
    batch = max(1, PIXELS // (view.size[0] * view.size[1]))

    def read(i: int) -> Tensor:
        return torch.from_numpy(np.array(pixels_of(data, i, view)))

    for i, pixels in enumerate(ahead(read, range(n), min(os.cpu_count() or 1, 8))):
        image = normalize(pixels.to(device).permute(2, 0, 1)[None])[0]
        limits = torch.tensor([image.shape[2], image.shape[1]] * 2, device=device)
        for label, candidates in zip(classes[i].tolist(), torch.from_numpy(proposals[i]).to(device), strict=True):
            if np.isfinite(best[i, label]):  # repeated class
                continue
            scores, refined = [], []
            for part in candidates.split(batch):
                logits, deltas = model.regions(warp(image, part, view.size))
                scores.append(logits[:, label].float())
                refined.append(model.regions.coder.decode_single(deltas[:, label].float(), part))
            top = torch.cat(scores).argmax()
            best[i, label] = torch.cat(scores)[top].item()
            boxes[i, label] = torch.minimum(torch.cat(refined)[top].clamp(min=0), limits).cpu().double().numpy()
        progress("regions", i + 1, n)
    return best, boxes
