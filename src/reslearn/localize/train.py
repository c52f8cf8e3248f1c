"""Fine-tuning a classification network for localization, or training one: seeded, and resumed bit for bit."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from torch.optim import SGD

from reslearn.data.anchors import suggest_anchors
from reslearn.data.annotated import open_boxes
from reslearn.data.boxes import BoxSet, bad_boxes_left_out_by
from reslearn.data.draws import Order, integer, view_seed
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import Split
from reslearn.data.statistics import measure
from reslearn.data.stream import Photos, ahead
from reslearn.device import autocast, pick_device, pick_precision
from reslearn.errors import Diverged, Interrupted, UserError
from reslearn.files import write_text
from reslearn.localize.evaluate import evaluate
from reslearn.localize.examples import losses
from reslearn.localize.net import Localizer, Settings, create_localizer, described, flat, save_localizer
from reslearn.localize.views import draws_of, of_one_kind, training_crop
from reslearn.nets import fused
from reslearn.recipes.recipe import Optimizer, Schedule, Section
from reslearn.training import checkpoint, runtime
from reslearn.training.folder import locked
from reslearn.training.schedule import lr
from reslearn.training.step import make_optimizer, set_lr
from reslearn.weights.store import Card, load

KEPT = 1 << 29  # bytes of decoded images that stay in memory
SHAPES = 1000  # how many crops the anchors are fitted to
Say = Callable[[str], None]


class Plan(Section):
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
        raise UserError("give either the name of a network or a model to start from")
    if not plan.size <= plan.jitter[0] <= plan.jitter[1]:
        raise UserError(f"jitter={plan.jitter}: must be two sizes in px, {plan.size} <= low <= high")
    if not 0 < plan.iou[0] <= plan.iou[1] <= 1:
        raise UserError(f"iou={plan.iou}: must be two overlaps, 0 < low <= high <= 1")
    return plan


class Examples:
    """Batches of crops of a set's images, each a pure function of (seed, step)."""

    def __init__(self, data: BoxSet, plan: Plan) -> None:
        self.data, self.plan, self.single = data, plan, of_one_kind(data)
        self.order = Order(plan.seed, len(data), plan.batch)
        self.draws = view_seed(plan.seed)
        small = sum(image.height * image.width * 3 for image in data.images) <= KEPT
        self.kept: dict[int, np.ndarray] | None = {} if small else None

    def image(self, i: int) -> np.ndarray:
        if self.kept is None:
            return self.data.images[i].pixels()
        if i not in self.kept:
            self.kept[i] = self.data.images[i].pixels()
        return self.kept[i]

    def crops(self, epochs: torch.Tensor, indices: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        """Crops uint8 (size, size, 3), with their boxes (M, 4)."""
        size, jitter = (self.plan.size, self.plan.size), self.plan.jitter
        drawn = draws_of(self.draws, epochs, indices)
        return [
            training_crop(self.image(i), self.single.boxes[i], size, jitter, d)
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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder with --out, or go on with --resume {folder}")
    sets = _open(data)
    start = load(made.init) if made.init is not None else None
    view = _view(made, sets["train"], start.card if start is not None else None)  # type: ignore[arg-type]
    settings = Settings(anchors=_anchors(sets["train"], made), iou=made.iou)
    torch.manual_seed(integer(made.seed, 0x1217))
    model = create_localizer(start if start is not None else made.net or "", sets["train"].classes, settings, view)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"source": str(Path(data).resolve()), "fingerprint": sets["train"].fingerprint(), "plan": made.model_dump(mode="json")}
    facts |= {"card": json.loads(model.card.model_dump_json()), "versions": runtime.versions()}
    # What the network is before the first step is a checkpoint too: a resumed run needs no --init file.
    checkpoint.save(folder / "checkpoints", 0, checkpoint.Checkpoint(model.state_dict(), {}, {"step": 0, "log": []}, {}))
    write_text(folder / "localize.json", json.dumps(facts, indent=1))
    return _go_on(folder, facts, sets, device, say)


def resume(folder: str | Path, *, device: str = "auto", say: Say = print) -> dict[str, Any]:
    """Go on with a run that was stopped or killed: it ends as if it had not been. Raises UserError where there is none."""
    folder = Path(folder)
    path = folder / "localize.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run of localize train: it has no localize.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        source, fingerprint = facts["source"], facts["fingerprint"]
        Plan.model_validate(facts["plan"])
        Card.model_validate(facts["card"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: the run cannot be resumed") from error
    sets = _open(source)
    if sets["train"].fingerprint() != fingerprint:
        raise UserError(f"{source} is not the data that {folder} was begun with: the run cannot be resumed")
    return _go_on(folder, facts, sets, device, say)


def _open(data: str | Path) -> dict[str, BoxSet]:
    with bad_boxes_left_out_by(f"reslearn doctor {data} --fix COPY"):
        sets = open_boxes(data)
    if "train" not in sets:
        raise UserError(f"{data}: has no train split to learn from")
    for each in sets.values():
        of_one_kind(each)
    if len(sets["train"].classes) < 2:
        raise UserError(f"{data}: has one class only, '{', '.join(sets['train'].classes)}'")
    return sets


def _view(plan: Plan, data: BoxSet, card: Card | None) -> Preprocessing:
    """How images become the network's input: a model's own statistics, else those of the training images."""
    if card is not None:
        if card.preprocessing.channels != 3:
            raise UserError(f"{plan.init} sees grey images: localization is for networks of colour images")
        return flat(card.preprocessing).model_copy(update={"size": (plan.size, plan.size), "crop_ratio": plan.crop_ratio})
    none = (0.0,) * 3
    view = Preprocessing(channels=3, size=(plan.size, plan.size), crop_ratio=plan.crop_ratio, mean=none, std=(1.0,) * 3)
    names = tuple(image.name for image in data.images)
    files = tuple(image.path for image in data.images)
    return measure(Photos(Split(np.zeros(len(files), np.int64), names, files=files), view), view, "channel")


def _anchors(data: BoxSet, plan: Plan) -> tuple[tuple[float, float], ...]:
    """Shapes fitted to the boxes of crops as training draws them, of the first epoch."""
    some = torch.linspace(0, len(data) - 1, min(len(data), SHAPES)).long()
    crops = Examples(data, plan).crops(torch.zeros_like(some), some)
    shapes = suggest_anchors(np.concatenate([boxes for _, boxes in crops]), plan.anchors, seed=plan.seed)
    return tuple((round(w, 1), round(h, 1)) for w, h in shapes.tolist())


def _go_on(folder: Path, facts: dict[str, Any], sets: dict[str, BoxSet], device: str, say: Say) -> dict[str, Any]:
    plan, card, on = Plan.model_validate(facts["plan"]), Card.model_validate(facts["card"]), pick_device(device)
    with locked(folder), runtime.stop_on_signals() as stop, runtime.deterministic(on):
        if (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found = checkpoint.found(folder / "checkpoints")
        if not found:
            raise UserError(f"{folder} has no checkpoint: remove it and train again")
        saved = checkpoint.load(found[-1])
        model = described(card).to_empty(device=on).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(saved.model)
        if on.type == "cpu":
            fused.enable()  # where the machine has a compiler
        try:
            log = _learn(model.train(), Examples(sets["train"], plan), plan, saved, folder, on, stop, say)
        finally:
            fused.enable(False)
        return _finish(model.eval(), sets, plan, facts, folder, log, say)


def _learn(
    model: Localizer,
    examples: Examples,
    plan: Plan,
    saved: checkpoint.Checkpoint,
    folder: Path,
    on: torch.device,
    stop: runtime.Stop,
    say: Say,
) -> list[dict[str, Any]]:
    """Every step that is left. Returns the log."""
    total = plan.schedule.total(len(examples.data), plan.batch)
    every = max(1, len(examples.data) // plan.batch)  # steps: about an epoch
    optimizer = make_optimizer(model, plan.optimizer, plan.schedule.lr)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        if (buffer := saved.state.get(names[parameter])) is not None:
            state["momentum_buffer"].copy_(buffer)
    normalise, context = model.card.preprocessing.normaliser(on), pick_precision("auto", on)
    log: list[dict[str, Any]] = list(saved.facts["log"])
    first = step = int(saved.facts["step"])

    def save() -> None:
        if step > first:
            there = {names[p]: s["momentum_buffer"] for p, s in optimizer.state.items()}
            state = checkpoint.Checkpoint(model.state_dict(), there, {"step": step, "log": log}, {})
            checkpoint.save(folder / "checkpoints", step, state)
            write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in log))

    workers = min(os.cpu_count() or 1, 4)
    with closing(ahead(examples.batch, range(first, total), workers)) as batches:
        for pixels, boxes, labels in batches:
            try:
                stop.check()
            except Interrupted as signal:
                save()
                raise Interrupted(signal.number, folder, f"reslearn localize train --resume {folder}") from None
            runtime.seed_step(plan.seed, step)
            rate = lr(plan.schedule, step, total, batch=plan.batch)
            set_lr(optimizer, rate, plan.optimizer.style)
            line = _step(model, optimizer, normalise(pixels.to(on)), [b.to(on) for b in boxes], labels.to(on), context)
            if not np.isfinite(sum(line.values())):
                raise Diverged(f"the loss is no longer a number at step {step + 1}: try a lower learning rate")
            step += 1
            if step % every == 0 or step == total:
                log.append({"step": step, "lr": rate, **{name: round(value, 6) for name, value in line.items()}})
                say(f"step {step:>6}/{total}  lr {rate:.4f}  " + "  ".join(f"{k} {v:.4f}" for k, v in line.items()))
                if step == total or step // every % max(1, total // every // 10) == 0:
                    save()
    return log


def _step(
    model: Localizer, optimizer: SGD, images: torch.Tensor, boxes: Sequence[torch.Tensor], labels: torch.Tensor, precision: str
) -> dict[str, float]:
    """One update; the losses of the batch before it."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(precision, images.device):
        logits, deltas, anchors = model(images.contiguous(memory_format=torch.channels_last))
    found = losses(logits.float(), deltas.float(), anchors, boxes, labels, model.settings.iou)
    loss = found["scores"] + found["boxes"]
    if torch.isfinite(loss):  # else the weights stay, and the run ends
        loss.backward()
        optimizer.step()
    return {name: value.item() for name, value in found.items()}


def _finish(
    model: Localizer, sets: dict[str, BoxSet], plan: Plan, facts: dict[str, Any], folder: Path, log: list[dict[str, Any]], say: Say
) -> dict[str, Any]:
    """Test, and write model and result."""
    result: dict[str, Any] = {"steps": log[-1]["step"] if log else 0, "losses": log[-1] if log else {}}
    for name in ("val", "test"):
        if name in sets:
            result[name] = evaluate(model, sets[name], split=name)
            numbers = result[name]["1-crop"]["true_class"]
            low, high = numbers["interval"]
            interval = f"95% interval {low:.2f} to {high:.2f}, n={result[name]['n']:,}"
            say(f"result   {name} localization error, true class given, 1 crop: {numbers['error']:.2f}%  ({interval})")
    metrics = {
        name: {view: result[name][view]["true_class"]["error"] for view in ("1-crop", "dense")} for name in result if name in sets
    }
    data = {"name": sets["train"].name, "fingerprint": facts["fingerprint"]}
    card = model.card.model_copy(update={"recipe": facts["plan"], "metrics": metrics, "data": data})
    save_localizer(model, folder / "model.safetensors", card)
    write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
    return result
