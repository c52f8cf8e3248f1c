"""What is analysed: a model in evaluation mode, and images with labels."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reslearn import data as datasets
from reslearn.data.resident import Resident
from reslearn.data.stream import Photos
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.evaluation.evaluate import pick_split, relabel
from reslearn.evaluation.protocols import error_and_loss
from reslearn.nets import create
from reslearn.weights.store import Card, load

BATCH = 250


@dataclass(frozen=True)
class Subject:
    """name: of the network. images: float32 (N, C, H, W), normalised; labels: int64 (N,); on the model's device; names: of them."""

    name: str
    model: nn.Module
    card: Card
    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    data: str
    split: str


def open_subject(model: str | Path, data: str | None, images: int, seed: int, device: str = "auto") -> Subject:
    """A model file or run folder with `images` of its test images, drawn by `seed`.

    data: a data set's name or path; by default the one that the model was trained on, where it has a name.
    Raises UserError where there is no such model or data, or the images are not of the model's classes.
    """
    net = load(model, pick_device(device))
    card: Card = net.card  # type: ignore[assignment]
    name = str(card.data.get("name", ""))
    if data is None and name not in datasets.NAMES:
        raise UserError(f"{model} does not say which images it was trained on: give some with --data")
    opened = datasets.open(data or name)
    which, split = pick_split(opened, card, {}, None)
    split = relabel(split, opened, card.classes)
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:images].sort().values
    split = split.take(chosen)
    on = next(net.parameters()).device
    view = card.preprocessing
    source = Resident(split, view, device=on) if split.pixels is not None else Photos(split, view, device=on)
    pixels = torch.cat([source.eval_batch(start, start + BATCH) for start in range(0, len(split), BATCH)])
    return Subject(card.net, net, card, pixels, source.labels.to(on), tuple(split.names), opened.name, which)


def fresh(subject: Subject, seed: int = 0) -> nn.Module:
    """The subject's network as it was before training, with statistics of BN from its images."""
    torch.manual_seed(seed)
    model = create(subject.card.net, len(subject.card.classes), subject.images.shape[1], **subject.card.options)
    model = model.to(subject.images.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain mean over the batches that follow
    with torch.no_grad():
        for part in subject.images.split(BATCH):
            model.train()(part)
    return model.eval()


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """float32 (N, classes)."""
    return torch.cat([model(part.contiguous(memory_format=torch.channels_last)).float() for part in images.split(BATCH)])


def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 error in percent."""
    return error_and_loss(logits(model, images).cpu(), labels.cpu())[0]
