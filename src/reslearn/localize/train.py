"""Fine-tuning a classification network for localization, or training one: seeded, and resumed bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch import nn

from reslearn.data.boxes.anchors import suggest_anchors
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.reader import ImageReader
from reslearn.data.images.statistics import measure
from reslearn.data.images.stream import Photos
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder, integer, view_seed
from reslearn.data.sets import Split
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.localize import run
from reslearn.localize.evaluate import View, evaluate, in_words
from reslearn.localize.examples import losses
from reslearn.localize.gallery import MOST, save_examples, save_gallery
from reslearn.localize.net import Localizer, Settings, create_localizer, described, flat, save_localizer
from reslearn.localize.predict import Progress
from reslearn.localize.run import Say, begin, check_new, facts_of, go_on, read_facts, reopened
from reslearn.localize.sets import open_to_train
from reslearn.localize.views import Single, draws_of, of_one_kind, training_crop
from reslearn.training.recipe import Optimizer, Schedule
from reslearn.weights.store import Card, load

CACHE_BYTES = 1 << 29  # of decoded images that stay in memory
SHAPES = 1000  # how many crops the anchors are fitted to


class Plan(run.Plan):
    """A training, every number of it. net or init: the name of a new network, or a classification model file or run folder.

    size: px of the square crops. jitter: the range of the shorter side in px, for crops. anchors: how many, fitted to the data.
    The paper prints sizes, batch and examples of an image (DRL appendix C); schedule and anchors it does not.
    """

    net: str | None = None
    init: str | None = None
    size: int = Field(default=224, ge=32, le=1024)
    crop_ratio: float = Field(default=0.875, gt=0, le=1)
    jitter: tuple[int, int] = (256, 480)
    anchors: int = Field(default=9, ge=1, le=32)
    batch: int = Field(default=256, ge=1, le=4096)
    iou: tuple[float, float] = (0.3, 0.5)
    seed: int = Field(default=0, ge=0)
    schedule: Schedule = Schedule(epochs=20, lr=0.05, shape="cosine", warmup=0.05)
    optimizer: Optimizer = Optimizer()


def make_plan(values: dict[str, Any]) -> Plan:
    """A plan; jitter goes with size unless given. Raises UserError, naming the key."""
    size = values.get("size") or 224
    try:
        plan = Plan(**{"jitter": (round(256 * size / 224), round(480 * size / 224)), **values})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}") from error
    if (plan.net is None) == (plan.init is None):
        raise UserError("give either net (--model), the name of a network, or init (--init), a model to start from")
    if not plan.size <= plan.jitter[0] <= plan.jitter[1]:
        raise UserError(f"jitter={plan.jitter}: must be two sizes in px, {plan.size} <= low <= high")
    if not 0 < plan.iou[0] <= plan.iou[1] <= 1:
        raise UserError(f"iou={plan.iou}: must be two overlaps, 0 < low <= high <= 1")
    return plan


class Examples:
    """Batches of crops of a set's images, each a pure function of (seed, step)."""

    def __init__(self, data: BoxSet, plan: Plan) -> None:
        self.data, self.plan, self.single = data, plan, of_one_kind(data)
        self.images, self.order = ImageReader(data.images, cache=CACHE_BYTES), SampleOrder(plan.seed, len(data), plan.batch)
        self.draws = view_seed(plan.seed)

    def __len__(self) -> int:
        return len(self.data)

    def crops(self, epochs: torch.Tensor, indices: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        """Crops uint8 (size, size, 3), with their boxes (M, 4)."""
        size, jitter = (self.plan.size, self.plan.size), self.plan.jitter
        drawn = draws_of(self.draws, epochs, indices)
        return [
            training_crop(self.images[i], self.single.boxes[i], size, jitter, d)
            for i, d in zip(indices.tolist(), drawn, strict=True)
        ]

    def batch(self, step: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """uint8 (N, 3, size, size), N boxes float32 (M, 4), labels int64 (N,) from 0."""
        epochs, indices = self.order[step]
        crops = self.crops(epochs, indices)
        pixels = torch.from_numpy(np.stack([crop for crop, _ in crops])).permute(0, 3, 1, 2)
        return pixels, [torch.from_numpy(b.astype(np.float32)) for _, b in crops], torch.from_numpy(self.single.labels)[indices]


def train(data: str | Path, out: str | Path, *, device: str = "auto", say: Say = print, **plan: Any) -> dict[str, Any]:
    """Train a localizer on the train split of an annotated set whose images have objects of one class each; returns its result.

    out: the run's new folder. plan: see Plan. Writes OUT/localize.json, metrics.jsonl, checkpoints, result.json and, at the end,
    model.safetensors. Raises UserError for what cannot be used, Interrupted after a signal: `resume` goes on.
    """
    made, folder = make_plan(plan), Path(out)
    check_new(folder)
    sets = open_to_train(data)
    start = load(made.init) if made.init is not None else None
    view = _view(made, sets["train"], start.card if start is not None else None)  # type: ignore[arg-type]
    settings = Settings(anchors=_anchors(sets["train"], made), iou=made.iou)
    torch.manual_seed(integer(made.seed, 0x1217))
    model = create_localizer(start if start is not None else made.net or "", sets["train"].classes, settings, view)
    facts = facts_of("train", data, sets, made, _chose(made, settings, view), pick_device(device))
    begin(folder, facts, model, model.card)
    return go_on(folder, facts, Boxes(sets, made, view), device, say)


def resume(folder: str | Path, *, device: str = "auto", say: Say = print) -> dict[str, Any]:
    """Go on with a run that was stopped or killed: it ends as if it had not been. Raises UserError where there is none."""
    folder = Path(folder)
    facts = read_facts(folder, "train", Plan)
    view = Card.model_validate(facts["card"]).preprocessing
    return go_on(folder, facts, Boxes(reopened(folder, facts), Plan.model_validate(facts["plan"]), view), device, say)


class Boxes(Examples):
    """The first stage, as a run takes it: boxes for each class, at every place of the map."""

    name = "train"
    of_images = True

    def __init__(self, sets: dict[str, BoxSet], plan: Plan, view: Preprocessing) -> None:
        super().__init__(sets["train"], plan)
        self.sets, self.view = sets, view

    def described(self, card: Card) -> Localizer:
        return described(card)

    def losses(self, model: nn.Module, batch: Any, on: torch.device, context: Any) -> dict[str, torch.Tensor]:
        pixels, boxes, labels = batch
        images = self.view.normalizer(on)(pixels.to(on))
        with context:
            logits, deltas, anchors = model(images.contiguous(memory_format=torch.channels_last))
        return losses(logits.float(), deltas.float(), anchors, [b.to(on) for b in boxes], labels.to(on), self.plan.iou)

    def finish(self, model: nn.Module, folder: Path, progress: Progress, say: Say) -> dict[str, Any]:
        assert isinstance(model, Localizer)
        save_examples(folder, ((crop, boxes, ()) for crop, boxes in self.crops(*(each[:MOST] for each in self.order[0]))))
        return finish(model, self.sets, self.plan, folder, progress, say)


def finish(model: Localizer, sets: dict[str, BoxSet], plan: run.Plan, folder: Path, progress: Progress, say: Say) -> dict[str, Any]:
    """Test a localizer on the splits to test on and write FOLDER/model.safetensors, with pictures of the last one for the report.

    Returns the numbers by split, and what the pictures show.
    """
    result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    shown: dict[str, Any] = {}
    tested = [split for split in ("val", "test") if split in sets]
    names = {"1-crop": "1 crop", "dense": "dense", "refined": "refined"}

    def show(data: BoxSet, truth: Single, found: dict[str, View]) -> None:
        shown.update(save_gallery(folder, data, truth, found), gallery_split=tested[-1])

    for split in tested:
        draws = show if split == tested[-1] else None
        result[split] = found = evaluate(model, sets[split], split=split, progress=progress, show=draws)
        for view in (name for name in names if name in found):
            error = in_words(found[view], found["n"])
            say(f"result   {split} localization error, true class given, {names[view]}: {error}")
    metrics = {
        split: {view: result[split][view]["true_class"]["error"] for view in names if view in result[split]} for split in tested
    }
    data = {"name": sets["train"].name, "fingerprint": sets["train"].fingerprint()}
    update = {"recipe": plan.model_dump(mode="json"), "metrics": metrics, "data": data}
    save_localizer(model, folder / "model.safetensors", model.card.model_copy(update=update))
    return result | shown


def _view(plan: Plan, data: BoxSet, card: Card | None) -> Preprocessing:
    """How images become the network's input: a model's own statistics, else those of the training images."""
    if card is not None:
        if card.preprocessing.channels != 3:
            raise UserError(f"{plan.init} sees gray images: localization is for networks of color images")
        return flat(card.preprocessing).model_copy(update={"size": (plan.size, plan.size), "crop_ratio": plan.crop_ratio})
    none = (0.0,) * 3
    view = Preprocessing(channels=3, size=(plan.size, plan.size), crop_ratio=plan.crop_ratio, mean=none, std=(1.0,) * 3)
    names = tuple(image.name for image in data.images)
    files = tuple(image.path for image in data.images)
    return measure(Photos(Split(np.zeros(len(files), np.int64), names, files=files), view), view, "channel")


def _chose(plan: Plan, settings: Settings, view: Preprocessing) -> list[str]:
    """What was taken from the data, or from the model that training starts from."""
    shapes = ", ".join(f"{w:.0f} x {h:.0f}" for w, h in settings.anchors)
    colors = "the model that it starts from" if plan.init is not None else "the training images"
    mean, std = (", ".join(f"{value:.3f}" for value in values) for values in (view.mean or (), view.std))
    return [
        f"{len(settings.anchors)} anchors of {shapes} px: fitted to the boxes of training crops",
        f"mean {mean} and deviation {std} of the channels: those of {colors}",
    ]


def _anchors(data: BoxSet, plan: Plan) -> tuple[tuple[float, float], ...]:
    """Shapes fitted to the boxes of crops as training draws them, of the first epoch."""
    some = torch.linspace(0, len(data) - 1, min(len(data), SHAPES)).long()
    crops = Examples(data, plan).crops(torch.zeros_like(some), some)
    shapes = suggest_anchors(np.concatenate([boxes for _, boxes in crops]), plan.anchors, seed=plan.seed)
    return tuple((round(w, 1), round(h, 1)) for w, h in shapes.tolist())
