"""Preprocessing of images to a network's input, shared by evaluation, prediction and export; stored in a model's card."""

import base64
import math

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor


def scaled(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales an image, uint8 (H, W, C), with Pillow (antialiased bilinear), first horizontally, then vertically.

    Fixes the order because Pillow 13 starts with the cheaper direction, which can change pixels by one level.
    """
    h, w, channels = image.shape
    if (h, w) == (height, width):
        return image
    pil = Image.fromarray(image[:, :, 0] if channels == 1 else np.ascontiguousarray(image))
    pil = pil.resize((width, h), Image.Resampling.BILINEAR).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(pil).reshape(height, width, channels)


def covering(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """The smallest (height, width) with the aspect ratio of h x w that covers height x width."""
    scale = max(height / h, width / w)
    return max(height, round(h * scale)), max(width, round(w * scale))


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales an image, uint8 (H, W, C), to the smallest size that covers height x width, keeping its aspect ratio."""
    h, w, _ = image.shape
    return scaled(image, *covering(h, w, height, width))


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The center height x width of an image, (H, W, C)."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


class Preprocessing(BaseModel):
    """Decode to `channels`, scale to cover size / crop_ratio, center crop, then (x / 255 - mean) / std.

    size: (height, width) in pixels. crop_ratio: 1 for small images, 0.875 for photos (256 -> 224). mean, std: per channel, on the
    scale [0, 1]. pixel_mean: per-pixel mean that replaces `mean` (DRL 4.2), as base64 of little-endian float32 (channels, height,
    width).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: int = Field(ge=1, le=3)
    size: tuple[int, int]
    crop_ratio: float = Field(default=1.0, gt=0, le=1)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_mean: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Preprocessing":
        if min(self.size) < 1 or max(self.size) > 4096:
            raise ValueError("size must be between 1 and 4096 px")
        if not (len(self.mean) == len(self.std) == self.channels) or min(self.std) <= 0:
            raise ValueError("mean and std must have one number per channel, std above 0")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError("mean and std must be finite")
        if self.pixel_mean is not None:
            self._pixel_mean()
        return self

    @property
    def covered(self) -> tuple[int, int]:
        """The (height, width) to cover before the center crop."""
        return round(self.size[0] / self.crop_ratio), round(self.size[1] / self.crop_ratio)

    def shrink(self, image: np.ndarray) -> np.ndarray:
        """The scaled image, uint8 (H, W, C), to take crops from."""
        return cover(image, *self.covered)

    def center_views(self, sizes: np.ndarray) -> np.ndarray:
        """The views, int32 (N, 9) (see images/decode.py), of `fit` for photos of these (height, width), int (N, 2)."""
        views = np.zeros((len(sizes), 9), np.int32)
        views[:, 2:4] = sizes
        views[:, 4:6] = [covering(h, w, *self.covered) for h, w in sizes.tolist()]
        views[:, 6:8] = (views[:, 4:6] - np.array(self.size)) // 2
        return views

    def fit(self, image: np.ndarray) -> Tensor:
        """The network's input before normalization: uint8 (H, W, C) -> uint8 (C, height, width)."""
        view = center_crop(self.shrink(image), *self.size)
        return torch.from_numpy(np.array(view.transpose(2, 0, 1), order="C"))

    def _pixel_mean(self) -> Tensor:
        try:
            values = np.frombuffer(base64.b64decode(self.pixel_mean or "", validate=True), "<f4")
            return torch.from_numpy(values.reshape(self.channels, *self.size).copy())
        except ValueError as error:
            raise ValueError(f"pixel_mean must be {self.channels}x{self.size[0]}x{self.size[1]} numbers") from error

    def normalizer(self, device: torch.device | str = "cpu") -> "Normalizer":
        """The function that normalizes uint8 batches on a device."""
        mean = torch.tensor(self.mean)[:, None, None] if self.pixel_mean is None else self._pixel_mean()
        return Normalizer(mean.to(device), torch.tensor(self.std)[:, None, None].to(device))

    @staticmethod
    def encode_pixel_mean(mean: Tensor) -> str:
        """Encodes a per-pixel mean, float (C, H, W) on the scale [0, 1], as `pixel_mean`."""
        return base64.b64encode(mean.numpy().astype("<f4").tobytes()).decode()


class Normalizer:
    """Computes (x / 255 - mean) / std as one multiply-add: uint8 (N, C, H, W) -> float32 (N, C, H, W)."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, pixels: Tensor) -> Tensor:
        scale, shift = self.scale, self.shift
        if pixels.is_contiguous(memory_format=torch.channels_last):  # vectorizes over whole rows instead of 3 channels
            width = pixels.shape[3]
            scale, shift = (t.expand(-1, -1, width).permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in (scale, shift))
        return pixels.float().mul_(scale).add_(shift)

    def invert(self, images: Tensor) -> Tensor:
        """Converts normalized images back to uint8 pixels, for display."""
        return ((images - self.shift) / self.scale).round_().clamp_(0, 255).to(torch.uint8)
