"""Creates validation and test splits: a random (seeded), stratified fraction of the images."""

from pathlib import Path

import numpy as np

from reslearn.data.sets import DataSet, Split
from reslearn.errors import UserError

VAL, TEST = 1, 2  # random streams


def stratified(labels: np.ndarray, count: int, seed: int, stream: int) -> np.ndarray:
    """Chooses `count` images to hold out, in proportion to the classes: bool (N,). Each class keeps at least one image.

    labels: int64 (N,). The class quotas are rounded by largest remainder, so that they add up to `count` if the classes are large
    enough.
    """
    held_out = np.zeros(len(labels), bool)
    classes, sizes = np.unique(labels, return_counts=True)
    share = count * sizes / max(len(labels), 1)
    quota = np.floor(share).astype(int)
    by_remainder = np.argsort(-(share - quota), kind="stable")
    quota[by_remainder[: count - quota.sum()]] += 1
    for label, n in zip(classes, np.minimum(quota, sizes - 1), strict=True):
        members = np.flatnonzero(labels == label)
        held_out[np.random.default_rng([seed, stream, int(label)]).permutation(members)[:n]] = True
    return held_out


def held_out(amount: float, images: int, key: str) -> int:
    """The number of images to hold out. amount: a fraction below 1, or a number of images. key: the recipe key, for the error."""
    count = round(amount * images) if amount < 1 else round(amount)
    if count >= images > 0:
        raise UserError(f"{key}={amount:g} would hold out {count} of {images} images: use a smaller number, or a fraction below 1")
    return count


def divide(data: DataSet, *, val: float, test: float, seed: int) -> tuple[dict[str, Split], dict[str, list[str]]]:
    """Returns the splits for training, and the names of the images held out here by split.

    val, test: a fraction below 1, or a number of images. A set that already has splits keeps them; `val` is taken from train if it
    has no val split. An undivided set is split into train, val and test. Raises UserError if there are no training images, fewer
    than two classes, or too many images to hold out.
    """
    splits, held_out_names = dict(data.splits), {}
    if "all" in splits:
        splits = {"train": splits.pop("all")}
        wanted = {"test": (test, TEST), "val": (val, VAL)}
    else:
        wanted = {} if "val" in splits else {"val": (val, VAL)}
    if "train" not in splits:
        raise UserError(f"'{data.name}' has no training images (only {', '.join(splits)}): add a train split")
    images = len(splits["train"])
    counts = {name: (held_out(amount, images, f"data.{name}"), stream) for name, (amount, stream) in wanted.items()}
    if (total := sum(count for count, _ in counts.values())) >= images > 0:
        raise UserError(f"data.val and data.test would hold out {total} of {images} images: use smaller numbers")
    for name, (count, stream) in counts.items():
        train = splits["train"]
        chosen = stratified(train.labels, count, seed, stream)
        if chosen.any():
            splits |= {"train": train.take(np.flatnonzero(~chosen)), name: train.take(np.flatnonzero(chosen))}
            held_out_names[name] = list(splits[name].names)
    if len(np.unique(splits["train"].labels)) < 2:
        only = data.classes[int(splits["train"].labels[0])] if len(splits["train"]) else "none"
        folders = sorted({Path(name).parts[1] for name in splits["train"].names if len(Path(name).parts) > 2})
        hint = f"; if {', '.join(folders[:3])} are the classes, use the folder {only} in it" if len(folders) > 1 else ""
        raise UserError(f"'{data.name}' has images of one class only ({only}): training needs at least two classes{hint}")
    return splits, held_out_names
