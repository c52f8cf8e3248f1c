"""Predictions for image files from a model file alone."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from reslearn.data.images.files import IMAGE_SUFFIXES, read
from reslearn.errors import UserError, naming
from reslearn.weights.store import Card, check_classifies, load

BATCH = 32
THREADS = 4

Image = str | Path | IO[bytes]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one file, best first, with probabilities in [0, 1]; or why it cannot be read."""

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {p:.1%}" for name, p in self.classes)
        return f"{self.file}: {shown or self.error}"


def _name(image: Image) -> str:
    return str(image) if isinstance(image, str | Path) else str(getattr(image, "name", "-"))


def _read(image: Image, channels: int) -> np.ndarray:
    """The pixels of a file, or of what an open binary file holds, uint8 (H, W, channels)."""
    if isinstance(image, str | Path):
        return read(image, channels)
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(image.read())
        copy.flush()
        try:
            return read(copy.name, channels)
        except UserError as error:
            raise UserError(str(error).replace(copy.name, _name(image))) from error


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Files as they are, folders as the images below them in sorted order. Hidden files are left out.

    Raises UserError for a folder without images. A path that is not there stays, for its prediction to say so.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
            if not inside:
                raise UserError(f"no images in {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    return found


def predict(model: nn.Module | str | Path, images: Image | Sequence[Image], top: int = 5) -> list[Prediction]:
    """The `top` most probable classes of each image file (or open binary file), in order.

    model: of `load`, or a model file or run folder. A file that cannot be read gives a Prediction with its error; the others go on.
    """
    model = model if isinstance(model, nn.Module) else load(model)
    several = [images] if isinstance(images, str | Path) or hasattr(images, "read") else images
    return list(stream(model, several, top))  # type: ignore[arg-type]


@torch.inference_mode()
def stream(model: nn.Module, images: Iterable[Image], top: int = 5) -> Iterator[Prediction]:
    """`predict`, as the results come, BATCH images at a time."""
    card = getattr(model, "card", None)
    if not isinstance(card, Card):
        raise UserError("predict needs a model with a card: one that reslearn.load() made")
    with naming(Path("the model")):
        check_classifies(card)
    if top < 1:
        raise UserError(f"top={top}: must be at least 1")
    device = next(model.parameters()).device
    normalize = card.preprocessing.normalizer(device)

    def attempt(image: Image) -> Tensor | str:
        try:
            return card.preprocessing.fit(_read(image, card.preprocessing.channels))
        except UserError as error:
            return str(error)

    remaining = iter(images)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(remaining, BATCH)):
            views = list(pool.map(attempt, batch))
            good = [view for view in views if isinstance(view, Tensor)]
            rows: list[tuple[tuple[str, float], ...]] = []
            if good:
                pixels = normalize(torch.stack(good).to(device)).contiguous(memory_format=torch.channels_last)
                best = model(pixels).float().softmax(1).topk(min(top, len(card.classes)), 1)
                rows = [
                    tuple((card.classes[i], p) for i, p in zip(indices, values, strict=True))
                    for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
            following = iter(rows)
            for image, view in zip(batch, views, strict=True):
                if isinstance(view, str):
                    yield Prediction(_name(image), error=view)
                else:
                    yield Prediction(_name(image), next(following))
