"""Predictions for image files from a model file."""

import base64
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from reslearn.data.images.files import IMAGE_SUFFIXES, read
from reslearn.errors import UserError, naming
from reslearn.html import Raw, table
from reslearn.weights.store import Card, check_classifies, load

BATCH = 32
THREADS = 4

Image = str | Path | IO[bytes]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one file, best first, with probabilities in [0, 1]; or the error if it cannot be read."""

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {p:.1%}" for name, p in self.classes)
        return f"{self.file}: {shown or str(self.error).removeprefix(f'{self.file}: ')}"


class Predictions(list[Prediction]):
    """Predictions in the order of the images."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        rows = [(_thumbnail(one.file), Path(one.file).name, str(one).removeprefix(f"{one.file}: ")) for one in self]
        return table(rows, ("", "file", "prediction"))


def _thumbnail(file: str) -> Raw:
    """An HTML image of a file, at most 96 px; empty if it cannot be read."""
    try:
        picture = PIL.Image.fromarray(read(file, 3))
    except UserError:
        return Raw("")
    picture.thumbnail((96, 96))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return Raw(f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">')


def _name(image: Image) -> str:
    return str(image) if isinstance(image, str | Path) else str(getattr(image, "name", "-"))


def _read(image: Image, channels: int) -> np.ndarray:
    """The pixels of a path or open binary file, uint8 (H, W, channels)."""
    if isinstance(image, str | Path):
        return read(image, channels)
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(image.read())
        copy.flush()
        try:
            return read(copy.name, channels)
        except UserError as error:
            raise UserError(str(error).replace(copy.name, _name(image))) from error


def find_images(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """Expands folders to the images in them, recursively and sorted, without hidden files.

    Raises UserError for a folder without images. Missing files are kept; their Prediction holds the error.
    """
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            images = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
            if not images:
                raise UserError(f"no images in {path} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
            files += images
        else:
            files.append(path)
    return files


def predict(model: nn.Module | str | Path, images: Image | Sequence[Image], top: int = 5) -> Predictions:
    """Returns the `top` most probable classes of each image (path or open binary file), in order; folders are expanded.

    model: from `load`, or a model file or run folder. An unreadable image gives a Prediction with an error.
    """
    model = model if isinstance(model, nn.Module) else load(model)
    given: list[Image] = [images] if isinstance(images, str | Path) or hasattr(images, "read") else list(images)  # type: ignore
    files = [file for image in given for file in (find_images(image) if isinstance(image, str | Path) else [image])]
    return Predictions(stream(model, files, top))  # type: ignore[arg-type]


def card_of(model: nn.Module) -> Card:
    """The card of a loaded classifier. Raises UserError if there is none."""
    card = getattr(model, "card", None)
    if not isinstance(card, Card):
        raise UserError("the model has no card: use one from reslearn.load()")
    with naming(Path("the model")):
        check_classifies(card)
    return card


@torch.inference_mode()
def stream(model: nn.Module, images: Iterable[Image], top: int = 5) -> Iterator[Prediction]:
    """Like `predict`, but yields the results as they are computed, BATCH images at a time."""
    card = card_of(model)
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
            readable = [view for view in views if isinstance(view, Tensor)]
            rows: Iterator[tuple[list[int], list[float]]] = iter(())
            if readable:
                pixels = normalize(torch.stack(readable).to(device)).contiguous(memory_format=torch.channels_last)
                best = model(pixels).float().softmax(1).topk(min(top, len(card.classes)), 1)
                rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for image, view in zip(batch, views, strict=True):
                if isinstance(view, str):
                    yield Prediction(_name(image), error=view)
                else:
                    indices, values = next(rows)
                    yield Prediction(_name(image), tuple((card.classes[i], p) for i, p in zip(indices, values, strict=True)))
