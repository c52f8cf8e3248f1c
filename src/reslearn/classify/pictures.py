"""Pictures for the report: augmented training images, and the images with the highest loss."""

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

WORST = 16  # images with the highest loss in the report
SHEET = (4, 12)  # rows and columns of augmented images


def _save_picture(pixels: Tensor, path: Path) -> None:
    """Write a uint8 (C, H, W) image as PNG."""
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda temporary: image.save(temporary, "PNG"))


def save_augmented_sheet(folder: Path, seed: int, source: Images) -> None:
    """Write RUN/images/augmented.png: the first training images after augmentation."""
    rows, columns = SHEET
    epochs, indices = SampleOrder(seed, len(source), rows * columns)[0]
    views, _ = source.train_batch(Draws(view_seed(seed), epochs, indices))
    pixels = F.pad(source.normalize.invert(views).cpu(), (1, 1, 1, 1), value=255)
    sheet = torch.cat([torch.cat(list(row), 2) for row in pixels.split(columns)], 1)
    _save_picture(sheet, folder / "images" / "augmented.png")


def save_worst(folder: Path, source: Images, predictions: Predictions, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Write the images with the highest loss. Returns their entries for result.json, highest loss first."""
    logits, labels = predictions.logits, predictions.labels
    losses = F.cross_entropy(logits, labels, reduction="none")
    rows = []
    for rank, i in enumerate(losses.argsort(descending=True)[:WORST].tolist()):
        image, index = f"images/worst-{rank:02d}.png", int(predictions.indices[i])
        _save_picture(source.view(index), folder / image)
        row = {"image": image, "name": source.names[index], "label": classes[labels[i]]}
        row |= {"predicted": classes[int(logits[i].argmax())], "loss": losses[i].item()}
        rows.append(row | {"probability": logits[i].softmax(0)[labels[i]].item()})
    return rows
