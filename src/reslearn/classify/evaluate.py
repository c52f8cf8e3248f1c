"""A model's numbers on a data set."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reslearn import data as datasets
from reslearn.data.boxes.read import boxes_alone
from reslearn.data.images.resident import Resident
from reslearn.data.images.stream import Photos
from reslearn.data.sets import DataSet, Split
from reslearn.device import pick_device
from reslearn.errors import UserError, did_you_mean
from reslearn.evaluation.metrics import metrics
from reslearn.evaluation.protocols import many_views, single_view
from reslearn.evaluation.scores import Scores, check_target, ensemble, load_scores, save_scores
from reslearn.evaluation.views import Pictures, Views, check_applies
from reslearn.evaluation.views import protocol as chosen_protocol
from reslearn.training.folder import read_held_out
from reslearn.weights.store import Card, load, read_card


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


Model = nn.Module | str | Path


def evaluate(
    model: Model | Sequence[Model],
    data: str | Path,
    split: str | None = None,
    on_bad: str = "error",
    seed: int = 0,
    device: str = "auto",
    flip: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    *,
    protocol: str = "center",
    scales: Sequence[int] | None = None,
    scores: str | Path | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 error, interval, calibration, confusion (see metrics.metrics), in fp32.

    model: of `load`, or a model file or run folder; or several, whose scores are averaged. data: as for `train`. split: "train",
    "val", "test" or "all"; by default the test split, also the one that the model's run held out. on_bad: "skip" leaves out
    files that cannot be read and lists them.
    protocol: "center" (one view of each image), "10crop", "dense" or "multiscale", with `scales` in pixels where it takes them
    (see views.protocol). flip: also the mirror of each view; with "center" the mean is that of the logits, else of the scores.
    scores: a .npz file for the scores of each image (see scores.save_scores).
    device: for a model file (see device.pick_device). progress(what, done, total) is called as images are done. Besides the
    metrics: `data`, `split`, `protocol`, `unreadable` {name: reason}, `left_out` {reason: number}, of several models `members`
    with the errors of each, and a `note` where the images may be those that the model was trained on. Raises UserError.
    """
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad={on_bad!r}: must be 'error' or 'skip'")
    target = None if scores is None else check_target(Path(scores))
    models = [model] if isinstance(model, nn.Module | str | Path) else list(model)
    if not models:
        raise UserError("evaluate needs at least one model")
    cards = [_card(each) for each in models]
    if data not in datasets.NAMES and boxes_alone(data):
        raise UserError(f"{data} is a set with boxes: a detector is tested on it, by reslearn detect eval")
    opened = datasets.open(data, on_bad=on_bad)  # type: ignore[arg-type]
    how = protocol, None if scales is None else tuple(scales), flip
    # All of them are looked at before the first one takes its time.
    tests = [_prepare(each, card, opened, split, how) for each, card in zip(models, cards, strict=True)]
    runs = [_run(test, opened, pick_device(device), on_bad, progress) for test in tests]
    members, logits, unreadable = [run[0] for run in runs], runs[0][1], runs[0][2]
    whole = ensemble(members)
    result = {"data": opened.name, "split": whole.split, "protocol": whole.protocol}
    result |= metrics(logits, whole.labels, whole.classes, seed=seed) if len(tests) == 1 else whole.metrics(seed)
    if target is not None:
        save_scores(whole, target)
    result |= {"unreadable": unreadable, "left_out": opened.left_out}
    result |= {"members": [_member(each, seed) for each in members]} if len(members) > 1 else {}
    said = next((test.note for test in tests if test.note), "")
    return result | ({"note": said} if said else {})


def of_scores(files: Sequence[str | Path], seed: int = 0, scores: str | Path | None = None) -> dict[str, Any]:
    """What `evaluate` returns of several models, from files of their scores. Raises UserError."""
    target = None if scores is None else check_target(Path(scores))
    members = [load_scores(Path(file)) for file in files]
    whole = ensemble(members)
    result = {"data": whole.data, "split": whole.split, "protocol": whole.protocol, **whole.metrics(seed)}
    if target is not None:
        save_scores(whole, target)
    return result | {"unreadable": {}, "left_out": {}, "members": [_member(each, seed) for each in members]}


def _member(scores: Scores, seed: int) -> dict[str, Any]:
    """The errors of one model of an ensemble."""
    numbers = scores.metrics(seed)
    errors = {key: numbers[key] for key in ("top1_error", "top1_interval", "top5_error") if key in numbers}
    return {"model": scores.model, "protocol": scores.protocol, **errors}


class Planned(NamedTuple):
    """A model and what it is to be tested on: images of a split, by a protocol; and what is to be said with the numbers."""

    model: Model
    called: str
    card: Card
    protocol: Views
    split: str
    images: Split
    note: str


def _card(model: Model) -> Card:
    card = getattr(model, "card", None) if isinstance(model, nn.Module) else read_card(model)
    if not isinstance(card, Card):
        raise UserError("evaluate needs a model with a card: one that reslearn.load() made")
    return card


def _prepare(model: Model, card: Card, data: DataSet, split: str | None, how: tuple[str, tuple[int, ...] | None, bool]) -> Planned:
    loaded = isinstance(model, nn.Module)
    held_out = {} if loaded else read_held_out(Path(model))
    name, images = pick_split(data, card, held_out, split)
    images = relabel(images, data, card.classes)
    asked = chosen_protocol(how[0], card.preprocessing, *how[1:])
    check_applies(asked, card.preprocessing, data)
    return Planned(model, card.net if loaded else str(model), card, asked, name, images, note(name, data, card, held_out))


def _run(
    test: Planned, data: DataSet, device: torch.device, on_bad: str, progress: Callable[[str, int, int], None]
) -> tuple[Scores, Tensor, dict[str, str]]:
    """Scores, the logits that they are made of, and the files that could not be read, with the reason."""
    model = test.model if isinstance(test.model, nn.Module) else load(test.model, device)
    look, on = test.card.preprocessing, next(model.parameters()).device

    def count(done: int) -> None:
        progress(f"evaluating {test.called} on {test.split}", done, len(test.images))

    if test.protocol.name != "center":
        source = Pictures(test.images, look, on_bad)
        seen = many_views(model, source, test.protocol, progress=count)
    else:
        resident = test.images.pixels is not None
        source = Resident(test.images, look, device=on) if resident else Photos(test.images, look, on_bad=on_bad, device=on)
        seen = single_view(model, source, batch=100, flip=test.protocol.mirror, progress=count)
    names = tuple(str(test.images.names[i]) for i in seen.indices.tolist())
    said = {"model": test.called, "protocol": str(test.protocol), "data": data.name, "split": test.split}
    return Scores(seen.logits.softmax(1), seen.labels, names, test.card.classes, **said), seen.logits, source.bad


def note(split: str, data: DataSet, card: Card, held_out: dict[str, list[str]]) -> str:
    """A warning where a number would look better than it is."""
    if split not in ("all", "train"):
        return ""
    if card.data.get("fingerprint") == data.fingerprint():  # whatever the files are called now
        return "these include the images that the model was trained on"
    if held_out:
        return f"'{data.name}' is not what the run was trained on, or has changed since: all its images are used"
    return ""
