"""Training crops of stage proposals, with their boxes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reslearn.data.augment import Draws
from reslearn.data.boxes.box_set import BoxImage
from reslearn.data.boxes.reader import ImageReader
from reslearn.data.sampling import view_seed
from reslearn.localize.sources import LocalizeSource
from reslearn.localize.views import Single, crop_randoms, training_crop


@dataclass(frozen=True)
class Crops:
    """pixels: uint8 (N, 3, size, size). boxes: N tensors, float32 (M, 4). labels: int64 (N,), from 0. On the host."""

    pixels: Tensor
    boxes: list[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, size: int) -> "list[Crops]":
        slices = [slice(start, start + size) for start in range(0, len(self), size)]
        return [Crops(self.pixels[part], self.boxes[part], self.labels[part]) for part in slices]


def training_crops(
    images: Sequence[BoxImage] | ImageReader,
    single: Single,
    seed: int,
    size: int,
    jitter: tuple[int, int],
    epochs: Tensor,
    indices: Tensor,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Crops, uint8 (size, size, 3), of the images at `indices`, with their boxes (M, 4): a function of seed, epoch and index."""
    reader = images if isinstance(images, ImageReader) else ImageReader(images)
    rows = zip(indices.tolist(), crop_randoms(view_seed(seed), epochs, indices), strict=True)
    return [training_crop(reader[i], single.boxes[i], (size, size), jitter, randoms) for i, randoms in rows]


def crops_of(source: LocalizeSource, seed: int, size: int, jitter: tuple[int, int], draws: Draws) -> Crops:
    """The crops of a training step."""
    crops = training_crops(source.reader, source.single, seed, size, jitter, draws.epochs, draws.indices)
    pixels = torch.from_numpy(np.stack([crop for crop, _ in crops])).permute(0, 3, 1, 2)
    boxes = [torch.from_numpy(boxes.astype(np.float32)) for _, boxes in crops]
    return Crops(pixels, boxes, torch.from_numpy(source.single.labels)[draws.indices])
