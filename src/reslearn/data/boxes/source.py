"""`BoxSource` serves batches of images and targets; augmentation is a pure function of (seed, epoch, index)."""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reslearn.data.augment import Draws
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.reader import ImageReader

Flip = Literal["none", "horizontal", "both"]
Target = dict[str, Tensor]
ACROSS, DOWN = 0, 1  # random streams: horizontal and vertical flip


class BoxSource:
    """Images and targets of a split, decoded to `channels` (1 or 3). difficult: whether difficult objects are targets."""

    def __init__(
        self, split: BoxSet, *, flip: Flip = "none", masks: bool = False, difficult: bool = True, channels: int = 3
    ) -> None:
        self.split, self.flip, self.masks, self.difficult, self.channels = split, flip, masks, difficult, channels
        self.pixels = ImageReader(split.images, channels)
        self.names = [image.name for image in split.images]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        """Image i, float32 (C, H, W) on [0, 1], and its target (see BoxImage.target). Raises UserError."""
        return to_tensor(self.pixels[i]), self.split.images[i].target(masks=self.masks, difficult=self.difficult)

    def train_batch(self, draws: Draws) -> tuple[list[Tensor], list[Target]]:
        """The images and targets of draws.indices, randomly flipped."""
        across, down = draws.uniform(ACROSS) < 0.5, draws.uniform(DOWN) < 0.5
        images, targets = [], []
        for j, i in enumerate(draws.indices.tolist()):
            image, target = self[i]
            if self.flip != "none" and across[j]:
                image, target = mirrored(image, target)
            if self.flip == "both" and down[j]:
                image, target = upside_down(image, target)
            images.append(image)
            targets.append(target)
        return images, targets


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) -> float32 (C, H, W) on [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flips the image (C, H, W), its boxes and its masks horizontally."""
    return image.flip(2), _flipped(target, 0, image.shape[2])


def upside_down(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flips the image (C, H, W), its boxes and its masks vertically."""
    return image.flip(1), _flipped(target, 1, image.shape[1])


def _flipped(target: Target, axis: int, size: int) -> Target:
    boxes = target["boxes"].clone()
    boxes[:, axis], boxes[:, axis + 2] = size - target["boxes"][:, axis + 2], size - target["boxes"][:, axis]
    flipped = {**target, "boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(2 - axis)
    return flipped


def hold_out(split: BoxSet, count: int, seed: int) -> tuple[BoxSet, BoxSet]:
    """Splits a set into the rest and `count` randomly chosen images (seeded); both keep their order."""
    chosen = set(np.random.default_rng([seed, 0xB0]).permutation(len(split))[:count].tolist())
    rest = tuple(image for i, image in enumerate(split.images) if i not in chosen)
    held_out = tuple(image for i, image in enumerate(split.images) if i in chosen)
    return replace(split, images=rest), replace(split, images=held_out)
