"""The second stage, R-CNN (DRL appendix C): learned from the boxes that a localizer proposes on its training images."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.data.augment import FLIP, Draws
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.reader import ImageReader
from reslearn.data.sampling import SampleOrder, integer, view_seed
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.localize import run
from reslearn.localize.error import IOU, overlap
from reslearn.localize.gallery import MOST, Example, save_examples
from reslearn.localize.net import (
    CONTEXT,
    Localizer,
    Regions,
    Settings,
    create_localizer,
    described,
    load_localizer,
    save_localizer,
    warp,
)
from reslearn.localize.predict import Progress, propose
from reslearn.localize.run import Say, begin, check_new, facts_of, go_on, read_facts, reopened
from reslearn.localize.sets import open_to_train
from reslearn.localize.train import CACHE_BYTES, finish
from reslearn.localize.views import of_one_kind
from reslearn.training.recipe import Optimizer, Schedule
from reslearn.weights.store import Card

REGION, KIND = 30, 31  # which draw is which; apart from those of augment.py and views.py


class Plan(run.Plan):
    """A training. proposals: how many boxes of an image are learned from, and judged at test.

    The paper prints proposals and batch (DRL appendix C); the schedule it does not.
    """

    proposals: int = Field(default=200, ge=1, le=2000)
    batch: int = Field(default=256, ge=1, le=4096)
    seed: int = Field(default=0, ge=0)
    schedule: Schedule = Schedule(epochs=20, lr=0.02, shape="cosine", warmup=0.05)
    optimizer: Optimizer = Optimizer()


def refine(
    localizer: str | Path, data: str | Path, out: str | Path, *, device: str = "auto", say: Say = print, **plan: Any
) -> dict[str, Any]:
    """Give a localizer a second stage, learned on the train split of an annotated set; returns the run's result.

    localizer: a model file or run folder of train(). out: the run's new folder, whose model.safetensors is the localizer with both
    stages. plan: see Plan. Raises UserError for what cannot be used, Interrupted after a signal: `resume` goes on.
    """
    try:
        made = Plan(**plan)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}") from error
    folder = Path(out)
    check_new(folder)
    on = pick_device(device)
    first = load_localizer(localizer, on)
    if first.regions is not None:
        raise UserError(f"{localizer} has a second stage already: give what localize train has written")
    sets = open_to_train(data)
    if sets["train"].classes != first.classes:
        known, has = (", ".join(each) for each in (first.classes, sets["train"].classes))
        raise UserError(f"{localizer} knows the classes {known}; {data} has {has}")
    n = len(sets["train"])
    say(f"proposals {made.proposals} of each of {n:,} images")
    boxes = propose(first, sets["train"], of_one_kind(sets["train"]).labels[:, None], made.proposals)[:, 0]
    torch.manual_seed(integer(made.seed, 0x1218))
    both = _with_second(first, made.proposals)
    assert both.regions is not None
    chose = [f"the first stage, which proposes regions, is that of {localizer}"]
    facts = facts_of("refine", data, sets, made, chose, on) | {"proposals": _digest(boxes)}

    def more(path: Path) -> None:
        save_localizer(first, path / "localizer.safetensors")
        np.save(path / "proposals.npy", boxes)

    begin(folder, facts, both.regions, both.card, more)
    return go_on(folder, facts, Refinement(sets, made, both.card, boxes), device, say)


def resume(folder: str | Path, *, device: str = "auto", say: Say = print) -> dict[str, Any]:
    """Go on with a run of refine() that was stopped or killed. Raises UserError where there is none."""
    folder = Path(folder)
    facts = read_facts(folder, "refine", Plan)
    try:
        boxes = np.load(folder / "proposals.npy")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'proposals.npy'} cannot be read: the run cannot be resumed") from error
    if _digest(boxes) != facts.get("proposals"):
        raise UserError(f"{folder / 'proposals.npy'} is damaged: the run cannot be resumed")
    card, plan = Card.model_validate(facts["card"]), Plan.model_validate(facts["plan"])
    return go_on(folder, facts, Refinement(reopened(folder, facts), plan, card, boxes), device, say)


def _digest(boxes: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(boxes).tobytes()).hexdigest()


def _with_second(first: Localizer, proposals: int) -> Localizer:
    """A localizer with a second stage that begins as the first one's convolutions; on the CPU."""
    settings = Settings.model_validate(first.settings.model_dump() | {"proposals": proposals})
    card = first.card
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


class Refinement:
    """The second stage, as a run takes it.

    RoI-centric: a batch is of as many images as regions, each drawn from the proposals of its image, with even odds one that
    overlaps a true box by half or more, or another; mirrored with probability 1/2.
    """

    name = "refine"
    of_images = False

    def __init__(self, sets: dict[str, BoxSet], plan: Plan, card: Card, proposals: np.ndarray) -> None:
        self.sets, self.plan, self.card, self.proposals = sets, plan, card, proposals
        self.images, self.single = ImageReader(sets["train"].images, cache=CACHE_BYTES), of_one_kind(sets["train"])
        self.order, self.draws = SampleOrder(plan.seed, len(self), plan.batch), view_seed(plan.seed)

    def __len__(self) -> int:
        return len(self.sets["train"])

    def region(self, i: int, kind: float, which: float) -> tuple[np.ndarray, np.ndarray, bool]:
        """A proposal of image i, (4,), the true box that it overlaps most, and whether by half or more; drawn by two of [0, 1)."""
        overlaps = overlap(self.proposals[i].astype(np.float64), self.single.boxes[i])
        good = overlaps.max(1) >= IOU
        those = np.flatnonzero(good == (kind < 0.5))
        those = those if len(those) else np.arange(len(good))
        own = those[int(which * len(those))]
        return self.proposals[i, own], self.single.boxes[i][overlaps[own].argmax()], bool(good[own])

    def batch(self, step: int, most: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is seen, float32 (R, C, h, w), normalized; labels int64 (R,); positive bool (R,); targets float32 (R, 4); of the
        first `most`, if that is given."""
        epochs, indices = (each[:most] for each in self.order[step])
        draws = Draws(self.draws, epochs, indices)
        look = self.card.preprocessing
        normalize, seen, positive, targets = look.normalizer(), [], [], []
        for i, *drawn in zip(indices.tolist(), *(draws.uniform(which).tolist() for which in (KIND, REGION, FLIP)), strict=True):
            given, truth, good = self.region(i, *drawn[:2])
            image = normalize(torch.from_numpy(self.images[i]).permute(2, 0, 1)[None])[0]
            box, wanted = torch.from_numpy(given)[None], torch.from_numpy(truth).float()[None]
            view = warp(image, box, look.size)
            if drawn[2] < 0.5:  # the mirror at x = 0: what is relative to the region needs no image
                view, box, wanted = view.flip(3), _mirrored(box), _mirrored(wanted)
            seen.append(view)
            positive.append(good)
            targets.append(Regions.coder.encode_single(wanted, box))
        labels = torch.from_numpy(self.single.labels)[indices]
        return torch.cat(seen), labels, torch.tensor(positive), torch.cat(targets)

    def drawn(self) -> Iterator[Example]:
        """Regions of the first batch as they are seen, with the proposal's box and the true one, if that overlaps by half or
        more."""
        seen, _, positive, targets = self.batch(0, MOST)
        look = self.card.preprocessing
        h, w = look.size
        given = torch.tensor([[w * CONTEXT, h * CONTEXT, w * (1 - CONTEXT), h * (1 - CONTEXT)]])
        for view, good, target in zip(look.normalizer().invert(seen), positive.tolist(), targets, strict=True):
            true = Regions.coder.decode_single(target[None], given).numpy() if good else ()
            yield view.permute(1, 2, 0).numpy(), list(true), list(given.numpy())

    def described(self, card: Card) -> nn.Module:
        regions = described(card).regions
        assert regions is not None
        return regions

    def losses(self, model: nn.Module, batch: Any, on: torch.device, context: Any) -> dict[str, Tensor]:
        seen, labels, positive, targets = (each.to(on) for each in batch)
        with context:
            logits, deltas = model(seen.contiguous(memory_format=torch.channels_last))
        return region_losses(logits.float(), deltas.float(), labels, positive, targets)

    def finish(self, model: nn.Module, folder: Path, progress: Progress, say: Say) -> dict[str, Any]:
        assert isinstance(model, Regions)
        on = next(model.parameters()).device
        both = _with_second(load_localizer(folder / "localizer.safetensors"), self.plan.proposals).to(on).eval()
        assert both.regions is not None
        both.regions.load_state_dict(model.state_dict())
        save_examples(folder, self.drawn())
        return finish(both, self.sets, self.plan, folder, progress, say)


def _mirrored(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) at the other side of x = 0."""
    return torch.stack([-boxes[:, 2], boxes[:, 1], -boxes[:, 0], boxes[:, 3]], 1)
