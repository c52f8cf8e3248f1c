"""`Resident` serves batches of small images that are kept in device memory as uint8 and augmented there."""

import torch
from torch import Tensor

from reslearn.data.augment import Draws, Flip, flip_and_crop
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import Split


def to_channels(pixels: Tensor, channels: int) -> Tensor:
    """Converts uint8 (N, C, H, W) to 1 or 3 channels. Gray is Pillow's "L" (luminance, ITU-R 601-2)."""
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1)
    red, green, blue = pixels.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]


class Resident:
    """Batches of a split with pixels in memory."""

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        flip: Flip = False,
        pad: int = 0,
        pad_with: str = "black",
        device: torch.device | str = "cpu",
    ) -> None:
        assert split.pixels is not None
        pixels = to_channels(split.pixels, preprocessing.channels)
        if tuple(pixels.shape[-2:]) != preprocessing.size or preprocessing.covered != preprocessing.size:
            pixels = torch.stack([preprocessing.fit(image.permute(1, 2, 0).numpy()) for image in pixels])
        self.pixels = pixels.to(device)
        self.labels = torch.from_numpy(split.labels).to(device)
        self.names = split.names
        self.holes: set[int] = set()  # unreadable images: none, as all are in memory
        self.bad: dict[str, str] = {}
        self.device = device
        self.normalize = preprocessing.normalizer(device)
        self.flip: Flip = flip
        self.pad, self.pad_with = pad, pad_with

    def __len__(self) -> int:
        return len(self.labels)

    def train_batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augmented, normalized images, float32 (N, C, H, W), and labels, int64 (N,), on the device.

        Padding is black before normalization or, with pad_with "mean", zero after it.
        """
        draws = draws.to(self.device)
        images, labels = self.pixels[draws.indices], self.labels[draws.indices]
        if self.pad_with == "mean":
            return flip_and_crop(self.normalize(images), draws, flip=self.flip, pad=self.pad), labels
        return self.normalize(flip_and_crop(images, draws, flip=self.flip, pad=self.pad)), labels

    def eval_batch(self, start: int, stop: int) -> Tensor:
        """Images start to stop, normalized but not augmented: float32 (N, C, H, W), on the device."""
        return self.normalize(self.pixels[start:stop])

    def view(self, i: int) -> Tensor:
        """The evaluation view of image i: uint8 (C, H, W), on the CPU."""
        return self.pixels[i].cpu()
