"""Evaluation of models on a data set."""

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
from reslearn.evaluation.views import protocol as make_protocol
from reslearn.html import table
from reslearn.training.folder import read_held_out
from reslearn.weights.store import Card, load, read_card


def pick_split(data: DataSet, card: Card, held_out: dict[str, list[str]], split: str | None) -> tuple[str, Split]:
    """Returns the split to evaluate on, with its name. split: None for test, else val, else all.

    held_out: names of the images that the run held out, by split; used if the data set is the one it was trained on.
    """
    splits = dict(data.splits)
    if "all" in splits and held_out and _same(data, card):
        index = {name: i for i, name in enumerate(splits["all"].names)}
        for name, names in held_out.items():
            splits[name] = splits["all"].take(np.array([index[n] for n in names], np.int64))
    if split is None:
        split = next(name for name in ("test", "val", "all", "train") if name in splits)
    if split not in splits:
        raise UserError(f"'{data.name}' has no split '{split}'{did_you_mean(split, splits)}")
    return split, splits[split]


def _same(data: DataSet, card: Card) -> bool:
    """Whether the data set is the one the model was trained on, with the same file names."""
    same = card.data.get("fingerprint") == data.fingerprint()
    return same and card.data.get("arrangement") in (None, data.arrangement())


def relabel(split: Split, data: DataSet, classes: tuple[str, ...]) -> Split:
    """Returns the split with labels as indices into the model's classes. Raises UserError for an unknown class."""
    index = {name: i for i, name in enumerate(classes)}
    unknown = [name for i, name in enumerate(data.classes) if name not in index and (split.labels == i).any()]
    if unknown:
        raise UserError(f"the model has no class '{unknown[0]}' of '{data.name}'{did_you_mean(unknown[0], classes)}")
    table = np.array([index.get(name, -1) for name in data.classes], np.int64)
    return Split(table[split.labels], split.names, split.pixels, split.files)


Model = nn.Module | str | Path


class Evaluated(dict[str, Any]):
    """The numbers of an evaluation; see `evaluate` for the keys."""

    def _rows(self) -> list[tuple[str, str]]:
        low, high = self["top1_interval"]
        rows = [("top-1 error", f"{self['top1_error']:.2f}% (95% interval {low:.2f} to {high:.2f}, n={self['n']:,})")]
        rows += [("top-5 error", f"{self['top5_error']:.2f}%")] if "top5_error" in self else []
        return [*rows, ("calibration error", f"{self['calibration_error']:.2f} points")]

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name} {value}" for name, value in self._rows())
        return f"{self['data']}, {self['split']}, {self['protocol']}: {numbers}"

    def _repr_html_(self) -> str:
        classes = [(f"accuracy of {one['class']}", f"{one['accuracy']:.1f}%") for one in self["per_class"] if one["n"]]
        return table([*self._rows(), *classes], title=f"{self['data']}, {self['split']}, {self['protocol']}")


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
) -> Evaluated:
    """Evaluate one model or an ensemble in fp32: top-1 and top-5 error, interval, calibration, confusion (see metrics.metrics).

    model: a loaded model, model file or run folder; or several, whose scores are averaged. data: as for `train`. split: "train",
    "val", "test" or "all"; by default test, which may be the images that the model's run held out. on_bad: "skip" leaves out
    files that cannot be read. seed: of the bootstrap.
    protocol: "center" (one view per image), "10crop", "dense" or "multiscale"; `scales`, in px, apply to the last two (see
    views.protocol). flip: average each view with its mirror image; with "center" the logits are averaged, otherwise the scores.
    scores: .npz file to write the scores of each image to (see scores.save_scores).
    device: for model files (see device.pick_device). progress(title, done, total) is called as images are evaluated.

    Returns the metrics, `data`, `split`, `protocol`, `unreadable` {name: reason} and `left_out` {reason: number}; for several
    models `members`, with the errors of each; and a `note` if the images may include training images. Raises UserError.
    """
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad={on_bad!r}: must be 'error' or 'skip'")
    target = None if scores is None else check_target(Path(scores))
    models = [model] if isinstance(model, nn.Module | str | Path) else list(model)
    if not models:
        raise UserError("evaluate needs at least one model")
    cards = [_card(m) for m in models]
    if data not in datasets.NAMES and boxes_alone(data):
        raise UserError(f"{data} is a set with boxes: evaluate a detector on it with reslearn detect eval")
    opened = datasets.open(data, on_bad=on_bad)  # type: ignore[arg-type]
    views = protocol, None if scales is None else tuple(scales), flip
    tests = [_prepare(m, card, opened, split, views) for m, card in zip(models, cards, strict=True)]  # errors before any work
    runs = [_run(test, opened, pick_device(device), on_bad, progress) for test in tests]
    members, logits, unreadable = [run[0] for run in runs], runs[0][1], runs[0][2]
    combined = ensemble(members)
    result = {"data": opened.name, "split": combined.split, "protocol": combined.protocol}
    result |= metrics(logits, combined.labels, combined.classes, seed=seed) if len(tests) == 1 else combined.metrics(seed)
    if target is not None:
        save_scores(combined, target)
    result |= {"unreadable": unreadable, "left_out": opened.left_out}
    result |= {"members": [_member(member, seed) for member in members]} if len(members) > 1 else {}
    warning = next((test.note for test in tests if test.note), "")
    return Evaluated(result | ({"note": warning} if warning else {}))


def evaluate_scores(files: Sequence[str | Path], seed: int = 0, scores: str | Path | None = None) -> Evaluated:
    """Evaluate the ensemble of saved scores. Returns what `evaluate` returns for several models. Raises UserError."""
    target = None if scores is None else check_target(Path(scores))
    members = [load_scores(Path(file)) for file in files]
    combined = ensemble(members)
    result = {"data": combined.data, "split": combined.split, "protocol": combined.protocol, **combined.metrics(seed)}
    if target is not None:
        save_scores(combined, target)
    return Evaluated(result | {"unreadable": {}, "left_out": {}, "members": [_member(member, seed) for member in members]})


def _member(scores: Scores, seed: int) -> dict[str, Any]:
    """The errors of one model of an ensemble."""
    numbers = scores.metrics(seed)
    errors = {key: numbers[key] for key in ("top1_error", "top1_interval", "top5_error") if key in numbers}
    return {"model": scores.model, "protocol": scores.protocol, **errors}


class Test(NamedTuple):
    """A model, and the images and protocol to evaluate it on. note: a warning to show with the numbers, or empty."""

    model: Model
    title: str
    card: Card
    protocol: Views
    split: str
    images: Split
    note: str


def _card(model: Model) -> Card:
    card = getattr(model, "card", None) if isinstance(model, nn.Module) else read_card(model)
    if not isinstance(card, Card):
        raise UserError("evaluate needs a model with a card, as returned by reslearn.load()")
    return card


def _prepare(model: Model, card: Card, data: DataSet, split: str | None, views: tuple[str, tuple[int, ...] | None, bool]) -> Test:
    loaded = isinstance(model, nn.Module)
    held_out = {} if loaded else read_held_out(Path(model))
    name, images = pick_split(data, card, held_out, split)
    images = relabel(images, data, card.classes)
    protocol = make_protocol(views[0], card.preprocessing, *views[1:])
    check_applies(protocol, card.preprocessing, data)
    return Test(model, card.net if loaded else str(model), card, protocol, name, images, note(name, data, card, held_out))


def _run(
    test: Test, data: DataSet, device: torch.device, on_bad: str, progress: Callable[[str, int, int], None]
) -> tuple[Scores, Tensor, dict[str, str]]:
    """Returns the scores, their logits, and the files that could not be read, with reasons."""
    model = test.model if isinstance(test.model, nn.Module) else load(test.model, device)
    view, device = test.card.preprocessing, next(model.parameters()).device

    def count(done: int) -> None:
        progress(f"evaluating {test.title} on {test.split}", done, len(test.images))

    if test.protocol.name != "center":
        source = Pictures(test.images, view, on_bad)
        predictions = many_views(model, source, test.protocol, progress=count)
    else:
        resident = test.images.pixels is not None
        source = Resident(test.images, view, device=device) if resident else Photos(test.images, view, on_bad=on_bad, device=device)
        predictions = single_view(model, source, batch=100, flip=test.protocol.mirror, progress=count)
    names = tuple(str(test.images.names[i]) for i in predictions.indices.tolist())
    facts = {"model": test.title, "protocol": str(test.protocol), "data": data.name, "split": test.split}
    logits = predictions.logits
    return Scores(logits.softmax(1), predictions.labels, names, test.card.classes, **facts), logits, source.bad


def note(split: str, data: DataSet, card: Card, held_out: dict[str, list[str]]) -> str:
    """A warning if the error may be too low, because the images include training images."""
    if split not in ("all", "train"):
        return ""
    if card.data.get("fingerprint") == data.fingerprint():  # independent of file names
        return "these include the images that the model was trained on"
    if held_out:
        return f"'{data.name}' differs from the data of the run: all of its images are used"
    return ""
