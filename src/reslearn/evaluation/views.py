"""Test protocols: the views of an image, crops or the whole image at several scales (DRL 3.4)."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from reslearn.data.images.files import read
from reslearn.data.images.resident import to_channels
from reslearn.data.images.stream import ahead
from reslearn.data.preprocess import Normalizer, Preprocessing, center_crop, cover
from reslearn.data.sets import DataSet, Split
from reslearn.errors import UserError, did_you_mean

Name = Literal["center", "10crop", "multiscale", "dense"]
NAMES: tuple[Name, ...] = ("center", "10crop", "multiscale", "dense")
SCALES = (224, 256, 384, 480, 640)  # shorter sides in pixels, for an input of 224 (DRL 3.4)
MAX_WAITING = 1 << 26  # pixels of views waiting for others of their size: 200 MB in RGB
MAX_PIXELS = 1 << 23  # per view: VGG's first feature map of it and its flip takes 4 GB


@dataclass(frozen=True)
class Views:
    """The views of each image. Scores are softmax outputs, averaged over the positions of a map, then over views and flips.

    name: "center": the center crop; "10crop": corners and center with their flips; "dense": the whole image at one scale, by the
    fully convolutional network (see nets.convolutional); "multiscale": the same at several scales, with flips.
    scales: shorter sides in pixels for the last two. mirror: add the horizontal flip of each view.
    """

    name: Name
    scales: tuple[int, ...]
    mirror: bool

    @property
    def fully_convolutional(self) -> bool:
        """Whether the network is applied to whole images instead of crops."""
        return bool(self.scales)

    @property
    def count(self) -> int:
        """Number of views per image, without flips."""
        return len(self.scales) or {"center": 1, "10crop": 5}[self.name]

    def __str__(self) -> str:
        scales = " ".join(map(str, self.scales))
        return f"{self.name} {scales}".rstrip() + (", mirrored" if self.mirror else "")

    def views(self, image: np.ndarray, preprocessing: Preprocessing) -> list[np.ndarray]:
        """The views of an image, uint8 (H, W, C) -> uint8 (h, w, C), without flips; for all protocols but "center"."""
        assert self.name != "center", "see Photos and Resident"
        if self.fully_convolutional:
            return [_scaled(image, preprocessing, scale) for scale in self.scales]
        covered = cover(image, *preprocessing.covered)
        h, w = preprocessing.size
        corners = covered[:h, :w], covered[:h, -w:], covered[-h:, :w], covered[-h:, -w:]
        return [*corners, center_crop(covered, h, w)]


def _scaled(image: np.ndarray, preprocessing: Preprocessing, scale: int) -> np.ndarray:
    """The whole image, resized to cover an input of the model's aspect ratio whose shorter side is `scale`."""
    height, width = (round(side * scale / min(preprocessing.size)) for side in preprocessing.size)
    h, w = image.shape[:2]
    if h * w * max(height / h, width / w) ** 2 > MAX_PIXELS:
        raise UserError(f"{w} x {h} px is too elongated for scale {scale}: resized, it has more than {MAX_PIXELS:,} pixels")
    return cover(image, height, width)


def protocol(name: str, preprocessing: Preprocessing, scales: tuple[int, ...] | None = None, flip: bool = False) -> Views:
    """Returns a protocol by name for a model with this preprocessing.

    scales: default: for "multiscale" those of the paper, in proportion to the model's input; for "dense" the size that the
    model's crops are taken from. flip: add the horizontal flip of each view.
    Raises UserError for options that do not apply.
    """
    if name not in NAMES:
        raise UserError(f"no protocol '{name}'{did_you_mean(name, NAMES)}")
    shorter = min(preprocessing.size)
    if scales is not None and name not in ("multiscale", "dense"):
        raise UserError(f"scales do not apply to protocol {name}, which uses crops; leave them out, or use dense or multiscale")
    if flip and name in ("10crop", "multiscale"):
        raise UserError(f"protocol {name} already flips each view; leave flip out")
    if name in ("center", "10crop"):
        if name == "10crop" and preprocessing.covered == preprocessing.size:
            size = f"{preprocessing.size[1]} x {preprocessing.size[0]} px"
            raise UserError(f"10crop does not apply: the model's input is the whole image, {size} (crop_ratio 1)")
        return Views(name, (), flip or name == "10crop")
    if scales is None and name == "multiscale":
        scales = tuple(round(scale * shorter / SCALES[0]) for scale in SCALES)
    scales = (min(preprocessing.covered),) if scales is None else tuple(scales)
    if not scales:
        raise UserError(f"protocol {name} needs at least one scale")
    if name == "dense" and len(scales) > 1:
        raise UserError(f"protocol dense has one scale, not {len(scales)}; use multiscale for several")
    if len(set(scales)) < len(scales):
        raise UserError(f"scale {next(s for i, s in enumerate(scales) if s in scales[:i])} is given twice")
    if invalid := [scale for scale in scales if not shorter <= scale <= 4096]:
        raise UserError(f"scale {invalid[0]}: must be from {shorter} (the model's input) to 4096 px")
    return Views(name, scales, flip or name == "multiscale")  # type: ignore[arg-type]


def check_applies(protocol: Views, preprocessing: Preprocessing, data: DataSet) -> None:
    """Raises UserError if the whole image is no larger than the model's input, so that the protocol would only enlarge it."""
    (height, width), (h, w) = data.sizes, preprocessing.size
    if protocol.fully_convolutional and data.resident and height <= h and width <= w:
        raise UserError(
            f"{protocol.name} does not apply to '{data.name}': the model's input already covers its {width} x {height} px images"
        )


class Pictures:
    """The images of a split. Threads read ahead, each image once for all its views.

    on_bad: "skip" adds unreadable files to `holes`; "error" raises UserError with the file.
    """

    def __init__(self, split: Split, preprocessing: Preprocessing, on_bad: str = "error") -> None:
        self.split, self.preprocessing, self.on_bad = split, preprocessing, on_bad
        self.bad: dict[str, str] = {}  # name -> reason
        self.holes: set[int] = set()

    def __len__(self) -> int:
        return len(self.split)

    def image(self, i: int) -> np.ndarray:
        """The pixels of image i: uint8 (H, W, C)."""
        if self.split.files is not None:
            return read(self.split.files[i], self.preprocessing.channels)
        assert self.split.pixels is not None
        return to_channels(self.split.pixels[i : i + 1], self.preprocessing.channels)[0].permute(1, 2, 0).numpy()

    def views(self, protocol: Views) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields the index and views of each readable image."""

        def load(i: int) -> list[np.ndarray] | str:
            try:
                return protocol.views(self.image(i), self.preprocessing)
            except UserError as error:
                name = self.split.names[i]
                return str(error) if name in str(error) else f"{name}: {error}"

        for i, views in enumerate(ahead(load, range(len(self)), min(os.cpu_count() or 1, 16))):
            if isinstance(views, list):
                yield i, views
            elif self.on_bad == "error":
                raise UserError(views)
            else:
                self.holes.add(i)
                self.bad[self.split.names[i]] = views


def of_one_size(images: Iterable[tuple[int, list[np.ndarray]]], pixels: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches views by size: yields indices of images, int64 (N,), and views, uint8 (N, H, W, C).

    images: (index, views). pixels: maximum of a batch; a batch has at least one view.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    waiting_pixels = 0

    def batch(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal waiting_pixels
        indices, views = zip(*waiting.pop(size), strict=True)
        waiting_pixels -= len(views) * math.prod(size)
        return torch.tensor(indices), torch.from_numpy(np.stack(views))

    for i, views in images:
        for view in views:
            size = view.shape[:2]
            waiting.setdefault(size, []).append((i, view))
            waiting_pixels += math.prod(size)
            if (len(waiting[size]) + 1) * math.prod(size) > pixels:
                yield batch(size)
        while waiting_pixels > MAX_WAITING:
            yield batch(max(waiting, key=lambda size: len(waiting[size]) * math.prod(size)))
    for size in [*waiting]:
        yield batch(size)


def normalizer(preprocessing: Preprocessing, fully_convolutional: bool, device: torch.device | str = "cpu") -> Normalizer:
    """The model's normalization. For whole images, a mean image is replaced by its per-channel mean."""
    normalize = preprocessing.normalizer(device)
    if fully_convolutional and normalize.shift.shape[1:] != (1, 1):
        normalize.shift = normalize.shift.mean((1, 2), keepdim=True)
    return normalize
