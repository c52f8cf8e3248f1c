"""Pictures of a classification run for its report: augmented training images, and the hardest test images."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reslearn.classify.sources import Images
from reslearn.data.augment import Draws
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.evaluation.protocols import Predictions
from reslearn.files import write_atomic

WORST = 16  # images with the highest loss that the report shows
SHEET = (4, 12)  # rows and columns of the sheet of augmented images


def _picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) as a picture."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _save_picture(pixels: Tensor, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda temporary: _picture(pixels).save(temporary, "PNG"))


def save_augmented_sheet(folder: Path, seed: int, source: Images) -> None:
    """RUN/images/augmented.png: the first training images as the network sees them."""
    rows, columns = SHEET
    epochs, indices = SampleOrder(seed, len(source), rows * columns)[0]
    views, _ = source.train_batch(Draws(view_seed(seed), epochs, indices))
    pixels = F.pad(source.normalize.invert(views).cpu(), (1, 1, 1, 1), value=255)
    sheet = torch.cat([torch.cat(list(row), 2) for row in pixels.split(columns)], 1)
    _save_picture(sheet, folder / "images" / "augmented.png")


def save_worst(folder: Path, source: Images, seen: Predictions, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """The images with the highest loss, their pictures saved beside."""
    losses = F.cross_entropy(seen.logits, seen.labels, reduction="none")
    rows = []
    for rank, i in enumerate(losses.argsort(descending=True)[:WORST].tolist()):
        image, at = f"images/worst-{rank:02d}.png", int(seen.indices[i])
        _save_picture(source.view(at), folder / image)
        row = {"image": image, "name": source.names[at], "label": classes[seen.labels[i]]}
        row |= {"predicted": classes[int(seen.logits[i].argmax())], "loss": losses[i].item()}
        rows.append(row | {"probability": seen.logits[i].softmax(0)[seen.labels[i]].item()})
    return rows
