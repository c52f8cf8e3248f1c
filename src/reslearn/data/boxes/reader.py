"""`ImageReader` decodes the images of a set with boxes by index, and caches small sets in memory."""

from collections.abc import Sequence

import numpy as np

from reslearn.data.boxes.box_set import BoxImage


class ImageReader:
    """The pixels of images by index, uint8 (H, W, channels); `channels` is 1 or 3.

    cache: bytes. If all images together fit into it, they are kept in memory once decoded. Reading raises UserError (see
    BoxImage.pixels).
    """

    def __init__(self, images: Sequence[BoxImage], channels: int = 3, cache: int = 0) -> None:
        self.images, self.channels = images, channels
        fits = sum(image.height * image.width * channels for image in images) <= cache
        self.cached: dict[int, np.ndarray] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        pixels = None if self.cached is None else self.cached.get(i)
        if pixels is None:
            pixels = self.images[i].pixels(self.channels)
            if self.cached is not None:
                self.cached[i] = pixels
        return pixels
