"""`BoxSource` serves images with boxes as batches of pixels and targets, each a pure function of (seed, epoch, index)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reslearn.data.augment import Draws
from reslearn.data.boxes.box_set import BoxImage, BoxSet
from reslearn.data.boxes.reader import ImageReader

Flip = Literal["none", "horizontal", "both"]
Target = dict[str, Tensor]
ACROSS, DOWN = 0, 1  # draws of an image


class BoxSource:
    """A split, read image by image in `channels` (1 or 3); `names` are the images'. difficult: whether such objects are targets."""

    def __init__(
        self, split: BoxSet, *, flip: Flip = "none", masks: bool = False, difficult: bool = True, channels: int = 3
    ) -> None:
        self.split, self.flip, self.masks, self.difficult, self.channels = split, flip, masks, difficult, channels
        self.pixels = ImageReader(split.images, channels)
        self.names = [image.name for image in split.images]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        """Image i as float32 (C, H, W) on [0, 1], and its target (see BoxImage.target). Raises UserError, naming the file."""
        return to_tensor(self.pixels[i]), self.split.images[i].target(masks=self.masks, difficult=self.difficult)

    def train_batch(self, draws: Draws) -> tuple[list[Tensor], list[Target]]:
        """The images of draws.indices, randomly mirrored."""
        across, down = draws.uniform(ACROSS) < 0.5, draws.uniform(DOWN) < 0.5
        images, targets = [], []
        for at, i in enumerate(draws.indices.tolist()):
            image, target = self[i]
            if self.flip != "none" and across[at]:
                image, target = mirrored(image, target)
            if self.flip == "both" and down[at]:
                image, target = upside_down(image, target)
            images.append(image)
            targets.append(target)
        return images, targets


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) -> float32 (C, H, W) on [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirrors the image (C, H, W), its boxes and its masks from left to right."""
    return image.flip(2), _turned(target, 0, image.shape[2])


def upside_down(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Mirrors the image (C, H, W), its boxes and its masks from top to bottom."""
    return image.flip(1), _turned(target, 1, image.shape[1])


def _turned(target: Target, axis: int, size: int) -> Target:
    boxes = target["boxes"].clone()
    boxes[:, axis], boxes[:, axis + 2] = size - target["boxes"][:, axis + 2], size - target["boxes"][:, axis]
    turned = {**target, "boxes": boxes}
    if "masks" in target:
        turned["masks"] = target["masks"].flip(2 - axis)
    return turned


def hold_out(split: BoxSet, count: int, seed: int) -> tuple[BoxSet, BoxSet]:
    """Splits a set in two: the rest, and `count` randomly chosen images (seeded), both in their order."""
    held = set(np.random.default_rng([seed, 0xB0]).permutation(len(split))[:count].tolist())
    parts: Sequence[list[BoxImage]] = ([], [])
    for i, image in enumerate(split.images):
        parts[i in held].append(image)
    rest, out = (BoxSet(split.name, split.classes, tuple(part), split.findings, split.category_ids) for part in parts)
    return rest, out
