"""The task of image classification."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn import data as datasets
from reslearn.classify import pictures, validation
from reslearn.classify.recipes import NAMED, ClassifyRecipe
from reslearn.classify.recipes.recipe import Loss
from reslearn.classify.sources import Images, make_model, make_sources, start_from, starting_view
from reslearn.data.augment import Draws
from reslearn.data.boxes.read import boxes_alone
from reslearn.data.images.resident import Resident
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.data.sets import DataSet
from reslearn.data.splits import divide
from reslearn.device import autocast
from reslearn.errors import UserError
from reslearn.evaluation.metrics import metrics
from reslearn.evaluation.protocols import error_and_loss
from reslearn.nets import create, spec
from reslearn.training import ranks
from reslearn.training.display import Display
from reslearn.training.precise_bn import precise_bn
from reslearn.training.recipe import Chosen
from reslearn.training.state import frozen_modules
from reslearn.training.task import Evaluation, EvaluationOptions, Job, Losses, LossFunction, Sources, Task
from reslearn.weights.store import Card, load, read_card, save

SHOWN_BAD = 5  # unreadable files to list per split
EVAL_BATCH = (250, 1000)  # evaluation batch size on a CPU, on a GPU
EVAL_PIXELS = 1 << 21  # most pixels per evaluation batch on a CPU: small batches of photos keep ranks from waiting for each other
FULL_BATCH = 250  # batch size of the final test on every device, because the last bits depend on it
CARD_METRICS = ("n", "loss", "top1_error", "top1_interval", "top5_error", "calibration_error")

ClassifyJob = Job[ClassifyRecipe, DataSet, Images]


@dataclass(frozen=True)
class ImageExamples:
    """images: float32 (N, C, H, W), normalized; labels: int64 (N,). Both are on the device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, size: int) -> "list[ImageExamples]":
        return [ImageExamples(*part) for part in zip(self.images.split(size), self.labels.split(size), strict=True)]


class Classification(Task[ClassifyRecipe, DataSet, Images]):
    """Assigns one class to each image."""

    name = "classify"
    recipe = ClassifyRecipe
    named = NAMED
    described = ("channels", "sizes", "left_out")

    def open(self, source: str | Path, given: Mapping[str, Any]) -> DataSet:
        if source not in datasets.NAMES and boxes_alone(source):
            raise UserError(f"{source} is a set with boxes: train a detector with reslearn detect train {source}")
        return datasets.open(source, on_bad="skip" if given.get("data.on_bad") == "skip" else "error")

    def usual(self, data: DataSet) -> str:
        fashion = data.name in ("fashion-sample", "fashion-mnist") and data.sizes == (28, 28) and data.channels == 1
        return "fashion" if fashion and data.resident else "default"  # a user's folder may have the same name

    def choose(self, name: str, data: DataSet | None, net: str | None, given: Mapping[str, Any]) -> Chosen:
        return NAMED[name](data, net)

    def check(self, recipe: ClassifyRecipe, data: DataSet, given: Mapping[str, Any]) -> None:
        if "data.test" in given and "all" not in data.splits:
            reason = "has its own test images" if "test" in data.splits else "is already divided, without test images"
            raise UserError(f"data.test does not apply: '{data.name}' {reason}; leave it out")
        _check_applies(recipe, data)

    def sources(
        self, data: DataSet, recipe: ClassifyRecipe, device: torch.device, display: Display, view: Preprocessing | None
    ) -> Sources[Images]:
        if ranks.count() > 1 and recipe.loss.class_weights == "auto":
            raise UserError("loss.class_weights=auto does not support several ranks: set loss.class_weights=none")
        if view is None and recipe.net.init is not None:
            view = starting_view(read_card(recipe.net.init), data, recipe.data)
        splits, held_out = divide(data, val=recipe.data.val, test=recipe.data.test, seed=recipe.seed)
        return make_sources(data, splits, recipe, device, display.progress, view, held_out)

    def identity(self, data: DataSet) -> dict[str, str]:
        return {"fingerprint": data.fingerprint(), "arrangement": data.arrangement()}

    def describe(self, data: DataSet, sources: Sources[Images]) -> dict[str, Any]:
        return {
            "name": data.name,
            "classes": list(data.classes),
            "channels": data.channels,
            "sizes": list(data.sizes),
            "n": {name: len(source) for name, source in sources.named().items()},
            "left_out": data.left_out,
        }

    def introduce(self, job: ClassifyJob) -> list[str]:
        described, sources = job.facts["data"], job.sources
        counts = " + ".join(f"{n:,} {name}" for name, n in described["n"].items())
        height, width = described["sizes"]
        color = "gray" if described["channels"] == 1 else "color"
        lines = [f"data     {described['name']}: {len(described['classes'])} classes, {counts} images, {height}x{width} {color}"]
        lines += [f"         left out: {n:,} {reason}" for reason, n in described["left_out"].items()]
        for name, source in sources.named().items():
            bad = list(source.bad.items())[:SHOWN_BAD]
            lines += [f"         left out: {name} image {title}: {reason}" for title, reason in bad]
        counted = np.sum([np.bincount(split.labels, minlength=len(job.data.classes)) for split in job.data.splits.values()], axis=0)
        if single := [name for name, n in zip(job.data.classes, counted, strict=True) if n == 1]:
            names = ", ".join(single[:5]) + " ..." * (len(single) > 5)
            lines.append(f"warning  one image only: {names}: too few to learn from and to measure an error on")
        grow, size = job.recipe.data.grow, min(sources.preprocessing.size)
        if grow is not None and grow[1] > size:
            lines.append(f"note     data.grow: training images grow to {grow[1]} px, larger than the {size} px of evaluation")
        return lines

    def model(self, job: ClassifyJob, *, fresh: bool) -> nn.Module:
        recipe, classes = job.recipe, job.data.classes
        model = make_model(recipe, len(classes), job.sources.preprocessing.channels, job.device)
        if recipe.net.init is not None and fresh:
            source = load(recipe.net.init)
            job.display.say("init     " + start_from(model, read_card(recipe.net.init), source.state_dict(), classes))
        return model

    def loss(self, job: ClassifyJob) -> LossFunction:
        counts = torch.bincount(job.sources.train.labels, minlength=len(job.data.classes))
        return cross_entropy(job.recipe.loss, counts)

    def examples(self, job: ClassifyJob, draws: Draws) -> ImageExamples:
        return ImageExamples(*job.sources.train.train_batch(draws))

    def resident(self, sources: Sources[Images]) -> bool:
        return isinstance(sources.train, Resident)

    def evaluate(self, job: ClassifyJob, model: nn.Module, source: Images, options: EvaluationOptions) -> Evaluation:
        height, width = job.sources.preprocessing.size
        on_cpu, on_gpu = EVAL_BATCH
        batch = on_gpu if job.device.type == "cuda" else max(min(on_cpu, EVAL_PIXELS // (height * width)), 1)
        predictions = validation.single_view(
            model,
            source,
            batch=min(batch, FULL_BATCH) if options.full else batch,
            forward=options.forward,
            flip=job.recipe.evaluate.flip,
            autocast=autocast(options.precision, job.device),
            progress=options.progress,
        )
        if options.full:
            numbers = metrics(predictions.logits, predictions.labels, job.data.classes, seed=job.recipe.seed)
            return Evaluation(numbers["top1_error"], numbers, f"error {numbers['top1_error']:.2f}%", predictions)
        error, loss = error_and_loss(predictions.logits, predictions.labels)
        return Evaluation(error, {"loss": loss, "top1_error": error}, f"held-out error {error:.2f}%")

    def measures(self, numbers: Mapping[str, Any]) -> dict[str, tuple[float | None, Sequence[float] | None]]:
        return {"error": (numbers["top1_error"], numbers["top1_interval"])}

    def card(self, job: ClassifyJob, model: nn.Module, numbers: dict[str, Any]) -> Card:
        recipe, data = job.recipe, job.data
        return Card(
            net=recipe.net.name,
            options=recipe.net.options(),
            classes=data.classes,
            preprocessing=job.sources.preprocessing,
            recipe=recipe.model_dump(mode="json"),
            metrics={split: {key: of[key] for key in CARD_METRICS if key in of} for split, of in numbers.items()},
            data={"name": data.name, **self.identity(data)},
        )

    def save(self, job: ClassifyJob, model: nn.Module, path: Path, numbers: dict[str, Any]) -> object:
        return save(model, path, self.card(job, model, numbers))

    def finish(self, job: ClassifyJob, model: nn.Module, split: str, details: Mapping[str, Any]) -> dict[str, Any]:
        named = job.sources.named()
        worst = pictures.save_worst(job.folder, named[split], details[split], job.data.classes)
        unreadable = {name: source.bad for name, source in named.items() if source.bad}
        views = "the image and its mirror, averaged" if job.recipe.evaluate.flip else "the image"
        return {"views": views, "worst": worst, "worst_split": split} | ({"unreadable": unreadable} if unreadable else {})

    def begin(self, job: ClassifyJob) -> None:
        if not (job.folder / "images" / "augmented.png").exists():
            pictures.save_augmented_sheet(job.folder, job.recipe.seed, job.sources.train)

    def settle(self, job: ClassifyJob, model: nn.Module, check: Callable[[], None]) -> None:
        recipe, source, count = job.recipe, job.sources.train, job.recipe.precise_bn
        source.bad = ranks.merged(source.bad)  # each rank has read only its own images
        if count is None:
            return
        size = recipe.batch.micro or recipe.batch.size
        order = SampleOrder(recipe.seed, len(source), size)  # continues with the batches after the last step
        first = recipe.schedule.total(len(source), recipe.batch.size) * recipe.batch.size // size

        def batches() -> Any:
            for i in range(count):
                check()
                epochs, indices = order[first + i]
                draws = Draws(view_seed(recipe.seed), epochs.to(job.device), indices.to(job.device))
                yield source.train_batch(draws)[0].contiguous(memory_format=torch.channels_last)
                job.display.progress("averaging BN", i + 1, count)

        keep = {module for frozen in frozen_modules(model, recipe.net.frozen) for module in frozen.modules()}
        precise_bn(model.eval(), batches(), keep)


def cross_entropy(recipe: Loss, counts: Tensor) -> LossFunction:
    """Returns the mean cross-entropy of logits (N, K) and labels (N,). counts: training images per class, (K,)."""
    weight = None
    if recipe.class_weights == "auto":
        weight = counts.sum() / (len(counts) * counts.clamp(min=1).float())

    def loss(model: nn.Module, examples: ImageExamples) -> Losses:
        logits = model(examples.images.contiguous(memory_format=torch.channels_last))
        value = F.cross_entropy(logits.float(), examples.labels, weight=weight, label_smoothing=recipe.label_smoothing)
        return Losses({"cross_entropy": value}, (logits.argmax(1) != examples.labels).sum())

    return loss


def _check_applies(recipe: ClassifyRecipe, data: DataSet) -> None:
    """Raise UserError for an option that does not apply to the data; none is ignored."""
    d, row = recipe.data, spec(recipe.net.name)
    if not data.resident:
        if d.pad:
            raise UserError(f"data.pad={d.pad} applies to small images; '{data.name}' has photos: use data.crop_scale")
        if d.size is None:
            raise UserError("data.size is missing: photos need an input size in px, such as data.size=128")
    elif key := next((key for key in ("crop_scale", "jitter", "color") if getattr(d, key) is not None), None) or (
        "cache" if d.cache == "on" else None
    ):
        raise UserError(f"data.{key} applies to photos; '{data.name}' has small images: use data.pad")
    if d.color is not None and data.channels != 3:
        raise UserError(f"data.color applies to color photos; those of '{data.name}' are gray")
    if row.build is not None:
        _check_input_size(recipe, data)
    size = d.size or min(data.sizes)
    if row.stem == "imagenet" and size < 32:
        raise UserError(
            f"{row.name} downsamples its input 32 times: {size} px are too few; use a CIFAR net such as resnet20, or set data.size"
        )


def _check_input_size(recipe: ClassifyRecipe, data: DataSet) -> None:
    """Raise UserError where the images are too small for a baseline network."""
    height, width = (recipe.data.size,) * 2 if recipe.data.size else data.sizes
    with torch.device("meta"):
        net = create(recipe.net.name, len(data.classes), data.channels).eval()
        try:
            net(torch.zeros(1, data.channels, height, width))
        except RuntimeError as error:
            raise UserError(f"images of {height}x{width} px are too small for {recipe.net.name}: set data.size") from error


CLASSIFY = Classification()
