"""Training-time augmentation: of a whole batch of small images at once, and of one photo. Every draw is a pure function."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reslearn.data.draws import uniform

Flip = bool | Literal["alternate"]
FLIP, TOP, LEFT, AREA, ASPECT, SIDE, COLOUR = range(7)  # which draw is which; colour takes four
# Of the pixels of ImageNet's training images, RGB on the scale [0, 1] (as Krizhevsky et al., 2012, section 4.1, describe them):
# a row of eigenvectors for each colour, and the eigenvalues' roots.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)


@dataclass(frozen=True)
class Draws:
    """What one batch draws: who is in it, from which epochs, under which seed. epochs, indices: int64 (N,)."""

    seed: int
    epochs: Tensor
    indices: Tensor

    def uniform(self, draw: int) -> Tensor:
        """float32 (N,) in [0, 1)."""
        return uniform(self.seed, self.epochs, self.indices, draw)

    def mirrored(self, flip: Flip) -> Tensor:
        """Which images are mirrored, bool (N,): each with probability 1/2; or, "alternate", each in every other epoch.

        Two epochs that alternate show both sides of every image, where chance shows one side twice to half of them (Jordan,
        2024, 94% on CIFAR-10 in 3.29 seconds, section 3.6).
        """
        if flip == "alternate":
            first = uniform(self.seed, torch.zeros_like(self.epochs), self.indices, FLIP) < 0.5
            return first ^ (self.epochs % 2 == 1)
        return self.uniform(FLIP) < (0.5 if flip else 0)

    def to(self, device: torch.device | str) -> "Draws":
        return Draws(self.seed, self.epochs.to(device), self.indices.to(device))


def flip_and_crop(images: Tensor, draws: Draws, *, flip: Flip, pad: int) -> Tensor:
    """Random horizontal flip, and a random crop of the original size from the image padded with zeros (DRL 4.2).

    images: (N, C, H, W), any dtype; pad in pixels on each side. One gather does both.
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


def crop_box(height: int, width: int, scale: tuple[float, float], u: dict[int, float]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a random crop of `scale` of the area and aspect 3/4 to 4/3 (Szegedy et al., 2015, section 6).

    A crop that is too wide or too tall is cut to the image instead of drawn again: a draw must stay a pure function.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[AREA])
    aspect = math.exp((2 * u[ASPECT] - 1) * math.log(4 / 3))
    w, h = min(width, math.sqrt(area * aspect)), min(height, math.sqrt(area / aspect))
    left, top = (width - w) * u[LEFT], (height - h) * u[TOP]
    return left, top, left + w, top + h


def jittered_crop(image: np.ndarray, u: dict[int, float], size: tuple[int, int], sides: tuple[int, int], mirrored: bool) -> Tensor:
    """One photo's training view by scale jitter (DRL 3.4): the shorter side becomes one of low..high px, each as likely, and a crop
    of `size` is taken anywhere. uint8 (H, W, C) -> uint8 (C, height, width).
    """
    height, width, channels = image.shape
    side = sides[0] + int(u[SIDE] * (sides[1] - sides[0] + 1))
    scale = min(height, width) / side  # photo's px for one of the view
    box_width, box_height = min(size[1] * scale, width), min(size[0] * scale, height)
    left, top = u[LEFT] * (width - box_width), u[TOP] * (height - box_height)
    pil = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    box = (left, top, left + box_width, top + box_height)
    view = np.asarray(pil.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)).reshape(*size, channels)
    return torch.from_numpy(np.array((view[:, ::-1] if mirrored else view).transpose(2, 0, 1), order="C"))


def colour_noise(draws: Draws, deviation: float) -> Tensor:
    """What PCA colour noise adds to the colours of each image: float32 (N, 3), on the scale [0, 1] (Krizhevsky et al., 2012)."""
    u = [draws.uniform(COLOUR + i) for i in range(4)]
    radius = [(-2 * (1 - v).log()).sqrt() for v in (u[0], u[2])]  # Box and Muller, 1958
    angles = [(2 * math.pi * v) for v in (u[1], u[3])]
    normal = torch.stack([radius[0] * angles[0].cos(), radius[0] * angles[0].sin(), radius[1] * angles[1].cos()], 1)
    values = torch.tensor(PCA_VALUES, device=normal.device)
    return (deviation * normal * values) @ torch.tensor(PCA_VECTORS, device=normal.device).T


def grown(size: tuple[int, int], done: float) -> int:
    """The side of training views when a share `done` of training is over: small until a third, then rising evenly to its end
    at 5/6, in multiples of 32 px where both are (progressive resizing, as Howard used it for DAWNBench, 2018).
    """
    share = min(max((done - 1 / 3) / (5 / 6 - 1 / 3), 0.0), 1.0)
    step = 32 if not (size[0] % 32 or size[1] % 32) else 1
    return size[0] + round((size[1] - size[0]) * share / step) * step


def resized_crop(
    image: np.ndarray, u: dict[int, float], size: tuple[int, int], *, scale: tuple[float, float] | None, mirrored: bool
) -> Tensor:
    """One photo's training view, uint8 (H, W, C) -> uint8 (C, height, width).

    u: its draws in [0, 1). scale: the crop's share of the area, or None for a crop of just the network's size.
    """
    height, width, channels = image.shape
    if scale is None:
        top, left = int(u[TOP] * (height - size[0] + 1)), int(u[LEFT] * (width - size[1] + 1))
        view = image[top : top + size[0], left : left + size[1]]
    else:
        pil = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        box = crop_box(height, width, scale, u)
        view = np.asarray(pil.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)).reshape(*size, channels)
    if mirrored:
        view = view[:, ::-1]
    return torch.from_numpy(np.array(view.transpose(2, 0, 1), order="C"))
