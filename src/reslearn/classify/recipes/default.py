"""The default recipe for a user's own images, chosen from the data.

reslearn train path/to/folder
"""

import numpy as np

from reslearn.data.sets import DataSet
from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.nets.options import applies
from reslearn.training.recipe import Chosen


def _training_labels(data: DataSet) -> np.ndarray:
    split = data.splits.get("train", data.splits.get("all"))
    return split.labels if split is not None else np.zeros(0, np.int64)


def default(data: DataSet | None, net: str | None) -> Chosen:
    """Network, image size, batch size and epochs, chosen from the number and size of the images. One-cycle schedule."""
    if data is None:
        raise UserError("recipe default depends on the data: give a data set as well")
    labels = _training_labels(data)
    images, (height, width) = len(labels), data.sizes
    small = data.resident or min(height, width) <= 80
    chose: dict[str, str] = {}

    if net is None:
        net = "resnet20" if small else "resnet18"
        chose["net.name"] = f"net {net}: images are about {height}x{width} px"
    row = spec(net)

    if data.resident:
        size, view = None, {"pad": max(2, min(height, width) // 8)}
    else:
        size = 128 if row.stem == "imagenet" else 32 if min(height, width) < 48 else 64
        view = {"size": size, "crop_scale": (0.35, 1.0), "crop_ratio": 0.875, "workers": 2}
        chose["data.size"] = f"image size {size}: suits {net} and trains fast (to change it, set data.size)"

    batch = int(2 ** np.floor(np.log2(np.clip(images / 16, 16, 128))))
    epochs = int(np.clip(round(200_000 / max(images, 1)), 15, 60))
    chose["batch.size"] = f"batch {batch}: {images:,} images"
    chose["schedule.epochs"] = f"{epochs} epochs: {images:,} images"

    counts = np.bincount(labels, minlength=len(data.classes))
    uneven = counts.max() > 1.5 * max(counts.min(), 1)
    if uneven:
        chose["loss.class_weights"] = f"class weights auto: classes have {counts.min()} to {counts.max()} images"

    values = {
        "name": "default",
        "net": {"name": net, "zero_init_last_gamma": applies(row, "zero_init_last_gamma") or None},
        "data": {"flip": True, **view},
        "batch": {"size": batch},
        "optimizer": {"weight_decay": 5e-4, "nesterov": True},
        "schedule": {"epochs": epochs, "lr": 0.1 * batch / 128, "shape": "one-cycle", "warmup": 0.2},
        "loss": {"label_smoothing": 0.1, "class_weights": "auto" if uneven else "none"},
        "log": {"every": 20},
    }
    return Chosen(values, chose)
