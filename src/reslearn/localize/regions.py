"""Stage regions, R-CNN (DRL appendix C): the boxes that a localizer proposes on its training images, scored again and moved."""

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

REGION, KIND = 30, 31  # which draw is which; apart from those of augment.py and views.py
FILE = "proposals.npy"


@dataclass(frozen=True)
class RegionExamples:
    """seen: float32 (R, C, h, w), normalized. labels: int64 (R,), classes of their images. positive: bool (R,). targets: float32
    (R, 4), deltas. On the host."""

    seen: Tensor
    labels: Tensor
    positive: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, size: int) -> "list[RegionExamples]":
        parts = zip(*(tensor.split(size) for tensor in (self.seen, self.labels, self.positive, self.targets)), strict=True)
        return [RegionExamples(*part) for part in parts]


def save_proposals(folder: Path, proposals: np.ndarray) -> None:
    """Write a run's proposals, float32 (N, P, 4), with their sha256."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, proposals)

    write_atomic(folder / FILE, write)
    write_text(folder / f"{FILE}.sha256", _digest(folder))


def has_proposals(folder: Path) -> bool:
    """Whether a run has its proposals. Raises UserError if they are damaged."""
    if not (folder / f"{FILE}.sha256").is_file():
        return False
    if not (folder / FILE).is_file() or (folder / f"{FILE}.sha256").read_text(encoding="utf-8") != _digest(folder):
        raise UserError(f"{folder / FILE} is damaged: the run cannot be resumed; start a new one")
    return True


def _digest(folder: Path) -> str:
    with (folder / FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_second_stage(first: Localizer, proposals: int) -> Localizer:
    """A localizer with the weights of another, and a second stage that begins as its convolutions, with new layers on them (seed
    them with torch.manual_seed)."""
    settings, card = first.settings.model_copy(update={"proposals": proposals}), first.card
    both = create_localizer(card.net, first.classes, settings, card.preprocessing, card.options)
    assert both.regions is not None
    own = {name: tensor.cpu() for name, tensor in first.state_dict().items()}
    both.load_state_dict(both.state_dict() | own)
    both.regions.backbone.load_state_dict(both.backbone.state_dict())
    return both


def region_losses(logits: Tensor, deltas: Tensor, labels: Tensor, positive: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The two losses of R regions, 0-dim. logits (R, K), deltas (R, K, 4): the second stage's. labels int64 (R,): classes of their
    images. positive bool (R,): whether they overlap a true box by half or more. targets (R, 4): the deltas to it, where they do.

    "scores": binary cross-entropy, summed over the K classes: a positive region is one of its class and of no other, any other of
    none. "boxes": smooth L1 of the class's own deltas of positive regions. Both are means over the regions.
    """
    wanted = F.one_hot(labels, logits.shape[1]).to(logits) * positive[:, None]
    scores = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(logits)
    own = deltas[torch.arange(len(labels), device=labels.device), labels][positive]
    return {"scores": scores, "boxes": F.smooth_l1_loss(own, targets[positive], reduction="sum") / len(logits)}


def pick_region(proposals: np.ndarray, boxes: np.ndarray, kind: float, which: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """One of an image's proposals (P, 4), the true box of `boxes` (M, 4) that it overlaps most, and whether by half or more.

    With even odds it is one that does, or another. kind, which: random numbers in [0, 1).
    """
    overlaps = overlap(proposals.astype(np.float64), boxes)
    good = overlaps.max(1) >= IOU
    candidates = np.flatnonzero(good == (kind < 0.5))
    candidates = candidates if len(candidates) else np.arange(len(good))
    own = candidates[int(which * len(candidates))]
    return proposals[own], boxes[overlaps[own].argmax()], bool(good[own])


def regions_of(source: LocalizeSource, proposals: np.ndarray, view: Preprocessing, draws: Draws) -> RegionExamples:
    """The regions of a step: one proposal of each image, as pick_region picks it, mirrored with probability 1/2.

    proposals: float32 (N, P, 4), of all images of the source. view: how regions become the network's input.
    """
    normalize, seen, positive, targets = view.normalizer(), [], [], []
    numbers = (draws.uniform(which).tolist() for which in (KIND, REGION, FLIP))
    for i, kind, which, flip in zip(draws.indices.tolist(), *numbers, strict=True):
        given, truth, good = pick_region(np.array(proposals[i]), source.single.boxes[i], kind, which)
        image = normalize(torch.from_numpy(source.reader[i]).permute(2, 0, 1)[None])[0]
        box, wanted = torch.from_numpy(given)[None], torch.from_numpy(truth).float()[None]
        region = warp(image, box, view.size)
        if flip < 0.5:  # the mirror at x = 0: what is relative to the region needs no image
            region, box, wanted = region.flip(3), _mirrored(box), _mirrored(wanted)
        seen.append(region)
        positive.append(good)
        targets.append(Regions.coder.encode_single(wanted, box))
    labels = torch.from_numpy(source.single.labels)[draws.indices]
    return RegionExamples(torch.cat(seen), labels, torch.tensor(positive), torch.cat(targets))


def as_pictures(examples: RegionExamples, view: Preprocessing) -> Iterator[Example]:
    """Regions as the network sees them, with the proposal's box and the true one, where that overlaps by half or more."""
    h, w = view.size
    given = torch.tensor([[w * CONTEXT, h * CONTEXT, w * (1 - CONTEXT), h * (1 - CONTEXT)]])
    pixels = view.normalizer().invert(examples.seen)
    for region, good, target in zip(pixels, examples.positive.tolist(), examples.targets, strict=True):
        true = Regions.coder.decode_single(target[None], given).numpy() if good else ()
        yield region.permute(1, 2, 0).numpy(), list(true), list(given.numpy())


def _mirrored(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) at the other side of x = 0."""
    return torch.stack([-boxes[:, 2], boxes[:, 1], -boxes[:, 0], boxes[:, 3]], 1)
