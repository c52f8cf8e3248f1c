"""What a test protocol looks at: crops of an image, or the whole of it at several scales (DRL 3.4)."""

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
SCALES = (224, 256, 384, 480, 640)  # shorter sides in pixels, of nets that see 224 (DRL 3.4)
WAITING = 1 << 26  # pixels of views that wait for others of their size: 200 MB in color
MOST_PIXELS = 1 << 23  # of one view: VGG's first feature map of it and its mirror takes 4 GB


@dataclass(frozen=True)
class Views:
    """How each image is seen. Scores are softmax outputs, averaged over places of a map, then over views and their mirrors.

    name: "center", the middle of the image, alone; "10crop", corners and middle of the same, each with its mirror (mean of
    scores); "dense", the whole image at one scale, by the net as a map (see nets.convolutional); "multiscale", the same at
    several scales, each with its mirror. scales: shorter sides in pixels, of the latter two. mirror: each view is joined by its
    mirror.
    """

    name: Name
    scales: tuple[int, ...]
    mirror: bool

    @property
    def as_map(self) -> bool:
        """Whether whole images are seen, of any size, rather than crops."""
        return bool(self.scales)

    @property
    def count(self) -> int:
        """Views of an image, without mirrors."""
        return len(self.scales) or {"center": 1, "10crop": 5}[self.name]

    def __str__(self) -> str:
        scales = " ".join(map(str, self.scales))
        return f"{self.name} {scales}".rstrip() + (", mirrored" if self.mirror else "")

    def views(self, image: np.ndarray, look: Preprocessing) -> list[np.ndarray]:
        """The views of an image, uint8 (H, W, C) -> uint8 (h, w, C), without mirrors; of all protocols but "center"."""
        assert self.name != "center", "which Photos and Resident know"
        if self.as_map:
            return [_scaled(image, look, scale) for scale in self.scales]
        covered = cover(image, *look.covered)
        h, w = look.size
        corners = covered[:h, :w], covered[:h, -w:], covered[-h:, :w], covered[-h:, -w:]
        return [*corners, center_crop(covered, h, w)]


def _scaled(image: np.ndarray, look: Preprocessing, scale: int) -> np.ndarray:
    """The whole image, so large that `scale` is its shorter side; of a net whose input is no square, that of what it covers."""
    height, width = (round(side * scale / min(look.size)) for side in look.size)
    h, w = image.shape[:2]
    if h * w * max(height / h, width / w) ** 2 > MOST_PIXELS:
        raise UserError(f"{w} x {h} px is too long a shape for scale {scale}: more than {MOST_PIXELS:,} pixels to look at")
    return cover(image, height, width)


def protocol(name: str, look: Preprocessing, scales: tuple[int, ...] | None = None, flip: bool = False) -> Views:
    """A protocol by name, for a net that sees images as `look` says.

    scales: by default those of the paper for "multiscale", in proportion where the net's input is not 224 px, and for "dense"
    the one that the net's crops are taken from. flip: with the mirror of each view, where it is not so already.
    Raises UserError for what does not apply.
    """
    if name not in NAMES:
        raise UserError(f"no protocol '{name}'{did_you_mean(name, NAMES)}")
    shorter = min(look.size)
    if scales is not None and name not in ("multiscale", "dense"):
        raise UserError(f"scales do not apply to protocol {name}: it takes crops; leave them out, or take dense or multiscale")
    if flip and name in ("10crop", "multiscale"):
        raise UserError(f"protocol {name} has the mirror of each view already: leave flip out")
    if name in ("center", "10crop"):
        if name == "10crop" and look.covered == look.size:
            size = f"{look.size[1]} x {look.size[0]} px"
            raise UserError(f"10crop does not apply: the model sees images whole, at {size} (crop_ratio 1); ten crops are one")
        return Views(name, (), flip or name == "10crop")
    usual = tuple(round(scale * shorter / SCALES[0]) for scale in SCALES) if name == "multiscale" else (min(look.covered),)
    taken = usual if scales is None else tuple(scales)
    if not taken or (name == "dense" and len(taken) > 1):
        raise UserError(f"dense takes one scale, not {len(taken)}: for several, take multiscale" if taken else "give a scale")
    if len(set(taken)) < len(taken):
        raise UserError(f"scale {next(s for i, s in enumerate(taken) if s in taken[:i])} is given twice")
    if wrong := [scale for scale in taken if not shorter <= scale <= 4096]:
        raise UserError(f"scale {wrong[0]}: must be from {shorter} (what the model sees) to 4096 px")
    return Views(name, taken, flip or name == "multiscale")  # type: ignore[arg-type]


def check_applies(protocol: Views, look: Preprocessing, data: DataSet) -> None:
    """Raise UserError where a protocol could only look at small images enlarged."""
    (height, width), (h, w) = data.sizes, look.size
    if protocol.as_map and data.resident and height <= h and width <= w:
        raise UserError(
            f"{protocol.name} does not apply to '{data.name}': the model sees its {width} x {height} px images whole already"
        )


class Pictures:
    """Images of a split, each read once for all its views, by threads that work ahead.

    on_bad: "skip" makes files that cannot be read `holes`, "error" raises UserError naming them.
    """

    def __init__(self, split: Split, look: Preprocessing, on_bad: str = "error") -> None:
        self.split, self.look, self.on_bad = split, look, on_bad
        self.bad: dict[str, str] = {}  # name -> why it could not be read
        self.holes: set[int] = set()

    def __len__(self) -> int:
        return len(self.split)

    def image(self, i: int) -> np.ndarray:
        """Image i as it is: uint8 (H, W, C)."""
        if self.split.files is not None:
            return read(self.split.files[i], self.look.channels)
        assert self.split.pixels is not None
        return to_channels(self.split.pixels[i : i + 1], self.look.channels)[0].permute(1, 2, 0).numpy()

    def views(self, protocol: Views) -> Iterator[tuple[int, list[np.ndarray]]]:
        """The places of images that can be read, with their views."""

        def look(i: int) -> list[np.ndarray] | str:
            try:
                return protocol.views(self.image(i), self.look)
            except UserError as error:
                name = self.split.names[i]
                return str(error) if name in str(error) else f"{name}: {error}"

        for i, found in enumerate(ahead(look, range(len(self)), min(os.cpu_count() or 1, 16))):
            if isinstance(found, list):
                yield i, found
            elif self.on_bad == "error":
                raise UserError(found)
            else:
                self.holes.add(i)
                self.bad[self.split.names[i]] = found


def of_one_size(seen: Iterable[tuple[int, list[np.ndarray]]], pixels: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of images in batches of one size of at most so many pixels, or one view: places int64 (N,), uint8 (N, H, W, C)."""
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    held = 0

    def batch(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal held
        places, views = zip(*waiting.pop(size), strict=True)
        held -= len(views) * math.prod(size)
        return torch.tensor(places), torch.from_numpy(np.stack(views))

    for i, views in seen:
        for view in views:
            size = view.shape[:2]
            waiting.setdefault(size, []).append((i, view))
            held += math.prod(size)
            if (len(waiting[size]) + 1) * math.prod(size) > pixels:
                yield batch(size)
        while held > WAITING:
            yield batch(max(waiting, key=lambda size: len(waiting[size]) * math.prod(size)))
    for size in [*waiting]:
        yield batch(size)


def normalizer(look: Preprocessing, as_map: bool, device: torch.device | str = "cpu") -> Normalizer:
    """What turns pixels into a net's input; of a map, whose places are anywhere, a mean for each pixel is its mean color."""
    normalize = look.normalizer(device)
    if as_map and normalize.shift.shape[1:] != (1, 1):
        normalize.shift = normalize.shift.mean((1, 2), keepdim=True)
    return normalize
