"""Measures the mean and standard deviation of a training split's pixels."""

from collections.abc import Iterator

import torch
from torch import Tensor

from reslearn.data.images.resident import Resident
from reslearn.data.images.stream import Photos, Progress, silent
from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError

PHOTOS = 1000  # maximum number of photos to measure
CHUNK = 1000


def _views(source: Resident | Photos) -> Iterator[Tensor]:
    """Yields views, uint8 (N, C, H, W), of all small images, or of up to PHOTOS evenly spaced readable photos."""
    if isinstance(source, Resident):
        yield from source.pixels.split(CHUNK)
        return
    for i in torch.linspace(0, len(source) - 1, min(len(source), PHOTOS)).long().unique().tolist():
        view = source.view(i)
        if i not in source.holes:
            yield view[None]


def measure(source: Resident | Photos, preprocessing: Preprocessing, kind: str, progress: Progress = silent) -> Preprocessing:
    """Returns the preprocessing with the statistics of the split, on the scale [0, 1].

    kind "channel": per-channel mean and standard deviation; "pixel-mean": per-pixel mean, no division (DRL 4.2).
    Raises UserError if no image can be read.
    """
    count, total, squares = 0, 0.0, 0.0
    for chunk in _views(source):
        x = chunk.double() / 255
        count += len(x)
        total = total + x.sum(0)  # (C, H, W)
        squares = squares + x.square().sum(0)
        progress("measuring mean and std", count, len(source) if isinstance(source, Resident) else min(len(source), PHOTOS))
    if not count:
        raise UserError("none of the training images can be read")
    pixel_mean = torch.as_tensor(total).cpu() / count
    mean = pixel_mean.mean((1, 2))
    if kind == "pixel-mean":
        update = {"pixel_mean": Preprocessing.encode_pixel_mean(pixel_mean), "std": (1.0,) * len(mean)}
    else:
        variance = torch.as_tensor(squares).cpu().mean((1, 2)) / count - mean.square()
        # a (nearly) constant channel has no standard deviation to divide by
        update = {"std": tuple(round(s, 6) if s > 1e-3 else 1.0 for s in variance.clamp(min=0).sqrt().tolist())}
    return preprocessing.model_copy(update={"mean": tuple(round(m, 6) for m in mean.tolist()), **update})
