"""The subject of an analysis: a model in evaluation mode, and labeled images."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reslearn import data as datasets
from reslearn.classify.evaluate import note, pick_split, relabel
from reslearn.data.images.files import IMAGE_SUFFIXES
from reslearn.data.images.resident import Resident
from reslearn.data.images.statistics import measure
from reslearn.data.images.stream import Photos
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import Split
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.evaluation.protocols import error_and_loss
from reslearn.nets import create, spec
from reslearn.training.folder import read_held_out
from reslearn.weights.store import Card, load

BATCH = 250  # 32x32 images per chunk; fewer for larger images


@dataclass(frozen=True)
class Subject:
    """A network and images.

    name: of the network. path: the model as given. images: float32 (N, C, H, W), normalized. labels: int64 (N,), indices into
    `classes`, -1 for none; both on the model's device. names: of the images. note: why the numbers may be optimistic, or "".
    trained: False for an untrained network.
    """

    name: str
    path: str
    model: nn.Module
    card: Card
    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]
    data: str
    split: str
    note: str = ""
    trained: bool = True

    def facts(self) -> dict[str, Any]:
        """The entry of this subject in an analysis' JSON."""
        data = {"data": self.data, "split": self.split, "images": len(self.labels), "device": str(self.images.device)}
        return {"model": self.path, "net": self.card.net, "options": self.card.options, "trained": self.trained, **data}


def open_subject(
    model: str | Path, data: str | None, images: int, seed: int, device: str = "auto", *, any_classes: bool = False
) -> Subject:
    """Opens a model file or run folder, or an untrained network by name, with up to `images` random test images (seeded).

    data: a data set's name or path; by default the training data recorded by the model or run.
    any_classes: allow classes that the model does not know, and a folder of images without classes.
    Raises UserError if the model or data does not exist, or the images are not of the model's classes.
    """
    on = pick_device(device)
    if _is_name(model):
        return _untrained(str(model), data, images, seed, on)
    net = load(model, on)
    card: Card = net.card  # type: ignore[assignment]
    given = data or trained_on(Path(model), card)
    if given is None:
        raise UserError(f"{model} does not record its training data: choose a data set with --data")
    if any_classes and (unlabeled := _unlabeled(given)):
        name, split, classes, title, warning = "all", unlabeled, (), Path(given).resolve().name, ""
    else:
        opened = datasets.open(given)
        held_out = read_held_out(Path(model))
        name, split = pick_split(opened, card, held_out, None)
        known = set(opened.classes) <= set(card.classes)
        classes = card.classes if known or not any_classes else opened.classes
        split = relabel(split, opened, classes)
        title, warning = opened.name, note(name, opened, card, held_out)
    split = _sample(split, images, seed)
    pixels, labels = _pixels(split, card.preprocessing, on)
    return Subject(card.net, str(model), net, card, pixels, labels, tuple(split.names), classes, title, name, warning)


def open_subjects(
    models: Sequence[str | Path], data: str | None, images: int, seed: int, device: str = "auto", *, any_classes: bool = False
) -> dict[str, Subject]:
    """Opens several subjects (see open_subject), by unique name. Raises UserError if a model is given twice."""
    subjects = [open_subject(model, data, images, seed, device, any_classes=any_classes) for model in models]
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        names = [f"{name} ({model})" for name, model in zip(names, models, strict=True)]
    if len(set(names)) < len(names):
        raise UserError("the same model is given twice: give each model once")
    return dict(zip(names, subjects, strict=True))


def _is_name(model: str | Path) -> bool:
    """Whether `model` names a network of the zoo, and no existing file or folder."""
    try:
        spec(str(model))
    except UserError:
        return False
    return not os.path.exists(model)  # noqa: PTH110  unlike Path.exists, accepts names that are too long


def trained_on(model: Path, card: Card) -> str | None:
    """The data set that a model was trained on: the run's `source`, otherwise the built-in set named by the card. None: unknown."""
    record = (model if model.is_dir() else model.parent) / "recipe.json"
    if record.is_file():
        source = json.loads(record.read_text(encoding="utf-8")).get("source")
        if isinstance(source, str):
            return source
    name = str(card.data.get("name", ""))
    return name if name in datasets.NAMES else None


def _unlabeled(folder: str) -> Split | None:
    """The images of a folder without class folders, with labels of -1; None for any other data set."""
    if folder in datasets.NAMES or not Path(folder).is_dir() or any(path.is_dir() for path in Path(folder).iterdir()):
        return None
    files = [f for f in sorted(Path(folder).iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
    if not files:
        return None
    return Split(np.full(len(files), -1, np.int64), tuple(file.name for file in files), files=tuple(files))


def _sample(split: Split, images: int, seed: int) -> Split:
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:images].sort().values
    return split.take(chosen)


def _source(split: Split, view: Preprocessing, on: torch.device) -> Resident | Photos:
    return Resident(split, view, device=on) if split.pixels is not None else Photos(split, view, device=on)


def _pixels(split: Split, view: Preprocessing, on: torch.device) -> tuple[Tensor, Tensor]:
    source = _source(split, view, on)
    return torch.cat([source.eval_batch(start, start + BATCH) for start in range(0, len(split), BATCH)]), source.labels


def _untrained(name: str, data: str | None, images: int, seed: int, on: torch.device) -> Subject:
    """An untrained network, with a data set's image size and statistics."""
    if data is None:
        raise UserError(f"{name} is an untrained network: choose a data set with --data")
    opened = datasets.open(data)
    side = spec(name).size
    size, ratio = (opened.sizes, 1.0) if opened.resident else ((side, side), 0.875)
    n = opened.channels
    view = Preprocessing(channels=n, size=size, crop_ratio=ratio, mean=(0.0,) * n, std=(1.0,) * n)
    training = opened.splits.get("train", next(iter(opened.splits.values())))
    view = measure(_source(training, view, torch.device("cpu")), view, "channel")
    if len(opened.classes) < 2:
        raise UserError(f"'{opened.name}' has only one class: choose a data set with two or more")
    card = Card(net=name, classes=opened.classes, preprocessing=view)
    chosen, split = pick_split(opened, card, {}, None)
    split = _sample(split, images, seed)
    pixels, labels = _pixels(split, view, on)
    try:
        model = initialized(card, pixels, seed)
    except RuntimeError as error:  # pooled to an empty map
        if "too small" not in str(error):
            raise
        raise UserError(f"{name} cannot take images of {size[0]}x{size[1]} px: they are too small") from error
    title, names = f"{name}, untrained", tuple(split.names)
    return Subject(title, name, model, card, pixels, labels, names, card.classes, opened.name, chosen, trained=False)


def initialized(card: Card, images: Tensor, seed: int = 0) -> nn.Module:
    """A card's network before training, initialized with `seed`, with BN statistics computed from images (N, C, H, W)."""
    torch.manual_seed(seed)
    model = create(card.net, len(card.classes), images.shape[1], **card.options).to(images.device).eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # cumulative average over all batches
        norm.train()  # only BN: dropout and stochastic depth stay off
    with torch.no_grad():
        for (part,) in chunks(images):
            model(part)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def fresh(subject: Subject, seed: int = 0) -> nn.Module:
    """The subject's network before training, with BN statistics from its images."""
    return initialized(subject.card, subject.images, seed)


def chunks(images: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits images (N, C, H, W) and other tensors of N rows into chunks that fit into memory together with autograd's buffers."""
    size = min(BATCH, max(8, BATCH * 32 * 32 // (images.shape[2] * images.shape[3])))
    return zip(*(tensor.split(size) for tensor in (images, *more)), strict=True)


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, float32 (N, classes)."""
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last)).float() for (part,) in chunks(images)])


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 error in percent."""
    return error_and_loss(logits(model, images).cpu(), labels.cpu())[0]
