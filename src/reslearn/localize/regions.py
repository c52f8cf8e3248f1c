"""Training of stage regions, R-CNN (DRL appendix C), on a localizer's proposals."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reslearn.data.augment import FLIP, Draws
from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError
from reslearn.files import write_atomic, write_text
from reslearn.localize.error import IOU, overlap
from reslearn.localize.gallery import Example
from reslearn.localize.net import CONTEXT, Localizer, Regions, create_localizer, warp
from reslearn.localize.sources import LocalizeSource

REGION, KIND = 30, 31  # streams of random numbers, distinct from those of augment.py and views.py
FILE = "proposals.npy"


@dataclass(frozen=True)
class RegionExamples:
    """regions: float32 (R, C, h, w), normalized. labels: int64 (R,), classes of their images. positive: bool (R,). targets: float32
    (R, 4), deltas. On the host."""

    regions: Tensor
    labels: Tensor
    positive: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, size: int) -> "list[RegionExamples]":
        parts = zip(*(tensor.split(size) for tensor in (self.regions, self.labels, self.positive, self.targets)), strict=True)
        return [RegionExamples(*part) for part in parts]


def save_proposals(folder: Path, proposals: np.ndarray) -> None:
    """Writes a run's proposals, float32 (N, P, 4), with their sha256."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, proposals)

    write_atomic(folder / FILE, write)
    write_text(folder / f"{FILE}.sha256", _digest(folder))


def has_proposals(folder: Path) -> bool:
    """Whether a run's proposals are complete. Raises UserError if they are damaged."""
    if not (folder / f"{FILE}.sha256").is_file():
        return False
    if not (folder / FILE).is_file() or (folder / f"{FILE}.sha256").read_text(encoding="utf-8") != _digest(folder):
        raise UserError(f"{folder / FILE} is damaged: the run cannot be resumed; start a new one")
    return True


def _digest(folder: Path) -> str:
    with (folder / FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_second_stage(first: Localizer, proposals: int) -> Localizer:
    """A copy of a localizer with a second stage, which starts from its convolutions; new layers are random (see
    torch.manual_seed)."""
    settings, card = first.settings.model_copy(update={"proposals": proposals}), first.card
    model = create_localizer(card.net, first.classes, settings, card.preprocessing, card.options)
    assert model.regions is not None
    weights = {name: tensor.cpu() for name, tensor in first.state_dict().items()}
    model.load_state_dict(model.state_dict() | weights)
    model.regions.backbone.load_state_dict(model.backbone.state_dict())
    return model


def region_losses(logits: Tensor, deltas: Tensor, labels: Tensor, positive: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The two losses of R regions, 0-dim.

    logits (R, K), deltas (R, K, 4): the second stage's outputs. labels: int64 (R,), classes of the images. positive: bool (R,),
    whether the IoU with a true box is at least 0.5. targets: (R, 4), deltas to that box; used only for positive regions.
    "scores": binary cross-entropy summed over the K classes; the target is 1 only for the image's class of positive regions.
    "boxes": smooth L1 of the class's deltas of positive regions. Both are means over all regions.
    """
    target = F.one_hot(labels, logits.shape[1]).to(logits) * positive[:, None]
    scores = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(logits)
    own = deltas[torch.arange(len(labels), device=labels.device), labels][positive]
    return {"scores": scores, "boxes": F.smooth_l1_loss(own, targets[positive], reduction="sum") / len(logits)}


def pick_region(proposals: np.ndarray, boxes: np.ndarray, kind: float, which: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Samples one of an image's proposals (P, 4). Returns it, the true box of `boxes` (M, 4) it overlaps most, and whether it is
    positive: an IoU of at least 0.5.

    Positive and other proposals have a probability of 1/2 each. kind, which: random numbers in [0, 1).
    """
    overlaps = overlap(proposals.astype(np.float64), boxes)
    positive = overlaps.max(1) >= IOU
    candidates = np.flatnonzero(positive == (kind < 0.5))
    candidates = candidates if len(candidates) else np.arange(len(positive))
    own = candidates[int(which * len(candidates))]
    return proposals[own], boxes[overlaps[own].argmax()], bool(positive[own])


def regions_of(source: LocalizeSource, proposals: np.ndarray, view: Preprocessing, draws: Draws) -> RegionExamples:
    """The regions of a training step: one proposal of each image (see pick_region), mirrored with probability 1/2.

    proposals: float32 (N, P, 4), for all images of the source. view: the preprocessing.
    """
    normalize, regions, positive, targets = view.normalizer(), [], [], []
    numbers = (draws.uniform(stream).tolist() for stream in (KIND, REGION, FLIP))
    for i, kind, which, flip in zip(draws.indices.tolist(), *numbers, strict=True):
        proposal, truth, good = pick_region(np.array(proposals[i]), source.single.boxes[i], kind, which)
        image = normalize(torch.from_numpy(source.reader[i]).permute(2, 0, 1)[None])[0]
        box, true_box = torch.from_numpy(proposal)[None], torch.from_numpy(truth).float()[None]
        region = warp(image, box, view.size)
        if flip < 0.5:  # boxes are mirrored at x = 0: deltas do not depend on the image width
            region, box, true_box = region.flip(3), _mirrored(box), _mirrored(true_box)
        regions.append(region)
        positive.append(good)
        targets.append(Regions.coder.encode_single(true_box, box))
    labels = torch.from_numpy(source.single.labels)[draws.indices]
    return RegionExamples(torch.cat(regions), labels, torch.tensor(positive), torch.cat(targets))


def as_pictures(examples: RegionExamples, view: Preprocessing) -> Iterator[Example]:
    """Regions as network inputs, with the box of the proposal and, for positive ones, the true box."""
    h, w = view.size
    proposal = torch.tensor([[w * CONTEXT, h * CONTEXT, w * (1 - CONTEXT), h * (1 - CONTEXT)]])
    pixels = view.normalizer().invert(examples.regions)
    for region, good, target in zip(pixels, examples.positive.tolist(), examples.targets, strict=True):
        true = Regions.coder.decode_single(target[None], proposal).numpy() if good else ()
        yield region.permute(1, 2, 0).numpy(), list(true), list(proposal.numpy())


def _mirrored(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) mirrored at x = 0."""
    return torch.stack([-boxes[:, 2], boxes[:, 1], -boxes[:, 0], boxes[:, 3]], 1)
