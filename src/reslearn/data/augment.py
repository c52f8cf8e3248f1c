"""Augmentation of training images: small images by the batch, and photos. All randomness is a pure function of Draws."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reslearn.data.preprocess import covering
from reslearn.data.sampling import uniform

Flip = bool | Literal["alternate"]
FLIP, TOP, LEFT, AREA, ASPECT, SIDE, COLOR = range(7)  # random streams; color uses four
# Principal components of the RGB values on [0, 1] of ImageNet's training images (Krizhevsky et al., 2012, section 4.1): a row of
# eigenvectors per color, and the square roots of the eigenvalues.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)
ASPECTS, ATTEMPTS, APART = (3 / 4, 4 / 3), 10, 100  # random crops; APART: offset between the random streams of two attempts


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch, pure functions of (seed, epoch, index). epochs, indices: int64 (N,).

    began: the epoch in which the whole batch starts, if this is only part of it; else None.
    """

    seed: int
    epochs: Tensor
    indices: Tensor
    began: int | None = None

    def uniform(self, stream: int) -> Tensor:
        """Uniform random numbers, float32 (N,) in [0, 1)."""
        return uniform(self.seed, self.epochs, self.indices, stream)

    def mirrored(self, flip: Flip) -> Tensor:
        """Which images to mirror, bool (N,): each with probability 1/2 or, with "alternate", in every other epoch.

        With "alternate", two consecutive epochs show both sides of every image; with random flips, half of the images show the same
        side twice (Jordan, 2024, 94% on CIFAR-10 in 3.29 Seconds, section 3.6).
        """
        if flip == "alternate":
            first = uniform(self.seed, torch.zeros_like(self.epochs), self.indices, FLIP) < 0.5
            return first ^ (self.epochs % 2 == 1)
        return self.uniform(FLIP) < (0.5 if flip else 0)

    def to(self, device: torch.device | str) -> "Draws":
        return Draws(self.seed, self.epochs.to(device), self.indices.to(device))


def flip_and_crop(images: Tensor, draws: Draws, *, flip: Flip, pad: int) -> Tensor:
    """Random horizontal flip and random crop of the original size from the zero-padded image (DRL 4.2), in one gather.

    images: (N, C, H, W), any dtype. pad: pixels on each side.
    """
    n, _, height, width = images.shape
    rows = torch.arange(height, device=images.device).expand(n, -1)
    columns = torch.arange(width, device=images.device).expand(n, -1)
    if flip:
        columns = torch.where(draws.mirrored(flip)[:, None], columns.flip(1), columns)
    if pad:
        rows = rows + (draws.uniform(TOP) * (2 * pad + 1)).long()[:, None] - pad
        columns = columns + (draws.uniform(LEFT) * (2 * pad + 1)).long()[:, None] - pad
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]  # (N, H, W)
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    pixels = images.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return pixels.view_as(images) * inside[:, None].to(images.dtype)


def crop_boxes(sizes: np.ndarray, draws: Draws, scale: tuple[float, float]) -> np.ndarray:
    """Random crops with a fraction `scale` of the area and aspect ratio 3/4 to 4/3 (Szegedy et al., 2015, section 6).

    sizes: the photos' (height, width), int64 (N, 2). Returns top, left, height, width in pixels, int64 (N, 4). Like torchvision's
    RandomResizedCrop, tries up to ten crops until one fits into the photo, then takes the largest center crop.
    """
    height, width = sizes.T.astype(np.float64)
    h, w = np.minimum(height, np.rint(width / ASPECTS[0])), np.minimum(width, np.rint(height * ASPECTS[1]))
    top, left = (height - h) // 2, (width - w) // 2
    positions = [draws.uniform(stream).double().numpy() for stream in (TOP, LEFT)]
    missing = np.ones(len(sizes), bool)
    for attempt in range(ATTEMPTS):
        u, v = (draws.uniform(stream + APART * attempt).double().numpy() for stream in (AREA, ASPECT))
        area, aspect = height * width * (scale[0] + (scale[1] - scale[0]) * u), ASPECTS[0] * (ASPECTS[1] / ASPECTS[0]) ** v
        tall, wide = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
        fits = missing & (tall > 0) & (wide > 0) & (tall <= height) & (wide <= width)
        h, w = np.where(fits, tall, h), np.where(fits, wide, w)
        top = np.where(fits, np.floor(positions[0] * (height - h + 1)), top)
        left = np.where(fits, np.floor(positions[1] * (width - w + 1)), left)
        missing &= ~fits
        if not missing.any():
            break
    return np.stack([top, left, h, w], 1).astype(np.int64)


def color_noise(draws: Draws, std: float) -> Tensor:
    """PCA color noise to add to each image: float32 (N, 3), on the scale [0, 1] (Krizhevsky et al., 2012)."""
    u = [draws.uniform(COLOR + i) for i in range(4)]
    radius = [(-2 * (1 - v).log()).sqrt() for v in (u[0], u[2])]  # Box and Muller, 1958
    angles = [(2 * math.pi * v) for v in (u[1], u[3])]
    normal = torch.stack([radius[0] * angles[0].cos(), radius[0] * angles[0].sin(), radius[1] * angles[1].cos()], 1)
    values = torch.tensor(PCA_VALUES, device=normal.device)
    return (std * normal * values) @ torch.tensor(PCA_VECTORS, device=normal.device).T


def grown(size: tuple[int, int], done: float) -> int:
    """The side of training views in px after a fraction `done` of training (progressive resizing; Howard, DAWNBench, 2018).

    size[0] until 1/3, then linear to size[1] at 5/6; in multiples of 32 px if both sizes are.
    """
    progress = min(max((done - 1 / 3) / (5 / 6 - 1 / 3), 0.0), 1.0)
    step = 32 if not (size[0] % 32 or size[1] % 32) else 1
    return size[0] + round((size[1] - size[0]) * progress / step) * step


def training_views(
    sizes: np.ndarray,
    draws: Draws,
    size: tuple[int, int],
    *,
    covered: tuple[int, int],
    scale: tuple[float, float] | None,
    jitter: tuple[int, int] | None = None,
    flip: Flip,
) -> np.ndarray:
    """The training views of photos, int32 (N, 9) (see images/decode.py).

    sizes: the photos' (height, width), int64 (N, 2). size: the network's input (height, width). scale: the crop's fraction of the
    area (see crop_boxes). If scale is None, a random crop of the input size is taken from the photo scaled to cover `covered` or,
    with jitter, scaled to a shorter side sampled uniformly from jitter[0]..jitter[1] px (DRL 3.4).
    """
    n = len(sizes)
    views = np.zeros((n, 9), np.int32)
    if scale is None:
        views[:, 2:4] = sizes
        if jitter is None:
            views[:, 4:6] = [covering(h, w, *covered) for h, w in sizes.tolist()]
        else:
            sides = jitter[0] + (draws.uniform(SIDE).double().numpy() * (jitter[1] - jitter[0] + 1)).astype(int)
            views[:, 4:6] = [covering(h, w, s, s) for (h, w), s in zip(sizes.tolist(), sides.tolist(), strict=True)]
        for column, stream, side in ((6, TOP, size[0]), (7, LEFT, size[1])):
            views[:, column] = draws.uniform(stream).double().numpy() * (views[:, column - 2] - side + 1)
    else:
        views[:, :4] = crop_boxes(sizes, draws, scale)
        views[:, 4:6] = size
    views[:, 8] = draws.mirrored(flip).numpy()
    return views
