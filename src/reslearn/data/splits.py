"""Makes validation and test splits: a seeded, stratified share of the images."""

import numpy as np

from reslearn.data.sets import DataSet, Split
from reslearn.errors import UserError

VAL, TEST = 1, 2  # the two splits' streams of random numbers


def stratified(labels: np.ndarray, count: int, seed: int, stream: int) -> np.ndarray:
    """Chooses the images to hold out: bool (N,). Every class gives its share of count, and keeps at least one image.

    labels: int64 (N,). Shares are rounded by largest remainder, so that they add up to count where the classes allow it.
    """
    held = np.zeros(len(labels), bool)
    classes, sizes = np.unique(labels, return_counts=True)
    share = count * sizes / max(len(labels), 1)
    quota = np.floor(share).astype(int)
    by_remainder = np.argsort(-(share - quota), kind="stable")
    quota[by_remainder[: count - quota.sum()]] += 1
    for label, n in zip(classes, np.minimum(quota, sizes - 1), strict=True):
        members = np.flatnonzero(labels == label)
        held[np.random.default_rng([seed, stream, int(label)]).permutation(members)[:n]] = True
    return held


def held_out(amount: float, images: int, key: str) -> int:
    """How many images to hold out. amount: a share of the images below 1, or a number of them. key: for the error."""
    count = round(amount * images) if amount < 1 else round(amount)
    if count >= images > 0:
        raise UserError(f"{key}={amount:g} would hold out {count} of {images} images; use a smaller number, or a share below 1")
    return count


def divide(data: DataSet, *, val: float, test: float, seed: int) -> tuple[dict[str, Split], dict[str, list[str]]]:
    """Returns the splits to train with, and the names of the images that were held out here.

    A set that is divided already keeps its test split; where it has no val split, `val` (a share below 1, or a number of
    images) is taken from train. An undivided one gives up `test` as well. A class with one image keeps it for training.
    Raises UserError where there is nothing to train on or the numbers do not fit.
    """
    splits, made = dict(data.splits), {}
    if "all" in splits:
        splits = {"train": splits.pop("all")}
        wanted = {"test": (test, TEST), "val": (val, VAL)}
    else:
        wanted = {} if "val" in splits else {"val": (val, VAL)}
    if "train" not in splits:
        raise UserError(f"'{data.name}' has no training images (only {', '.join(splits)}): add a train/ folder")
    images = len(splits["train"])
    counts = {name: (held_out(amount, images, f"data.{name}"), stream) for name, (amount, stream) in wanted.items()}
    if (total := sum(count for count, _ in counts.values())) >= images > 0:
        raise UserError(f"data.val and data.test would hold out {total} of {images} images: use smaller numbers")
    for name, (count, stream) in counts.items():
        train = splits["train"]
        held = stratified(train.labels, count, seed, stream)
        if held.any():
            splits |= {"train": train.take(np.flatnonzero(~held)), name: train.take(np.flatnonzero(held))}
            made[name] = list(splits[name].names)
    if len(np.unique(splits["train"].labels)) < 2:
        only = data.classes[int(splits["train"].labels[0])] if len(splits["train"]) else "none"
        raise UserError(f"'{data.name}' has images of one class only ({only}): training needs at least two classes")
    return splits, made
