"""A model's numbers on a data set."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from reslearn import data as datasets
from reslearn.data.resident import Resident
from reslearn.data.sets import DataSet, Split
from reslearn.data.stream import Photos
from reslearn.device import pick_device
from reslearn.errors import UserError, did_you_mean
from reslearn.evaluation.metrics import metrics
from reslearn.evaluation.protocols import single_view
from reslearn.weights.store import Card, load


def pick_split(data: DataSet, card: Card, held_out: dict[str, list[str]], split: str | None) -> tuple[str, Split]:
    """The images to evaluate on: the split asked for, else test, else val, else all.

    held_out: names that the run held out of an undivided set, used where the set is the one it was trained on.
    """
    splits = dict(data.splits)
    if "all" in splits and held_out and _same(data, card):
        whole = splits["all"]
        place = {name: i for i, name in enumerate(whole.names)}
        for name, names in held_out.items():
            splits[name] = whole.take(np.array([place[n] for n in names], np.int64))
    if split is None:
        split = next(name for name in ("test", "val", "all", "train") if name in splits)
    if split not in splits:
        raise UserError(f"'{data.name}' has no split '{split}'{did_you_mean(split, splits)}")
    return split, splits[split]


def read_held_out(model: Path) -> dict[str, list[str]]:
    """The names that the run of a model file or run folder held out of an undivided set; {} where there is no such record."""
    record = (model if model.is_dir() else model.parent) / "split.json"
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def _same(data: DataSet, card: Card) -> bool:
    """Whether the data set is the one that the model was trained on, and its images are called the same."""
    same = card.data.get("fingerprint") == data.fingerprint()
    return same and card.data.get("arrangement") in (None, data.arrangement())


def relabel(split: Split, data: DataSet, classes: tuple[str, ...]) -> Split:
    """The split with labels that count the model's classes. Raises UserError for a class that the model does not know."""
    place = {name: i for i, name in enumerate(classes)}
    unknown = [name for i, name in enumerate(data.classes) if name not in place and (split.labels == i).any()]
    if unknown:
        raise UserError(f"the model has no class '{unknown[0]}' of '{data.name}'{did_you_mean(unknown[0], classes)}")
    table = np.array([place.get(name, -1) for name in data.classes], np.int64)
    return Split(table[split.labels], split.names, split.pixels, split.files)


def evaluate(
    model: nn.Module | str | Path,
    data: str | Path,
    split: str | None = None,
    on_bad: str = "error",
    seed: int = 0,
    device: str = "auto",
    flip: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Top-1 and top-5 error, interval, calibration, confusion (see metrics.metrics), in fp32 on single views (or `flip`).

    model: of `load`, or a model file or run folder. data: as for `train`. split: "train", "val", "test" or "all"; by default the
    test split, also the one that the model's run held out. on_bad: "skip" leaves out files that cannot be read and lists them.
    flip: average the logits of each image and its mirror.
    device: for a model file (see device.pick_device). progress(what, done, total) is called as images are done. Besides the
    metrics: `data`, `split`, `unreadable` {name: reason}, `left_out` {reason: number}, and a `note` where the images may be
    those that the model was trained on. Raises UserError.
    """
    held_out: dict[str, list[str]] = {}
    if not isinstance(model, nn.Module):
        path = Path(model)
        model = load(path, pick_device(device))
        held_out = read_held_out(path)
    card = getattr(model, "card", None)
    if not isinstance(card, Card):
        raise UserError("evaluate needs a model with a card: one that reslearn.load() made")
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad={on_bad!r}: must be 'error' or 'skip'")
    opened = datasets.open(data, on_bad=on_bad)  # type: ignore[arg-type]
    name, chosen = pick_split(opened, card, held_out, split)
    chosen = relabel(chosen, opened, card.classes)
    on = next(model.parameters()).device
    if chosen.pixels is not None:
        source = Resident(chosen, card.preprocessing, device=on)
    else:
        source = Photos(chosen, card.preprocessing, on_bad=on_bad, device=on)

    def count(done: int) -> None:
        progress(f"evaluating on {name}", done, len(source))

    seen = single_view(model, source, batch=100, flip=flip, progress=count)
    result = {"data": opened.name, "split": name, **metrics(seen.logits, seen.labels, card.classes, seed=seed)}
    result |= {"unreadable": source.bad, "left_out": opened.left_out}
    return result | ({"note": said} if (said := note(name, opened, card, held_out)) else {})


def note(split: str, data: DataSet, card: Card, held_out: dict[str, list[str]]) -> str:
    """A warning where a number would look better than it is."""
    if split not in ("all", "train"):
        return ""
    if card.data.get("fingerprint") == data.fingerprint():  # whatever the files are called now
        return "these include the images that the model was trained on"
    if held_out:
        return f"'{data.name}' is not what the run was trained on, or has changed since: all its images are used"
    return ""
