"""The detection task."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from reslearn.data.augment import Draws
from reslearn.data.boxes.annotated import AnnotatedSet
from reslearn.data.boxes.read import split_names
from reslearn.data.boxes.source import BoxSource, Target
from reslearn.data.boxes.voc import splits as voc_splits
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder, integer, view_seed
from reslearn.detect.alternating import Alternating, phases
from reslearn.detect.build import assemble, backbone
from reslearn.detect.detector import Detector
from reslearn.detect.evaluate import TestOptions
from reslearn.detect.gallery import save_gallery
from reslearn.detect.pictures import save_examples
from reslearn.detect.recipes import NAMED, DetectRecipe, check, choose
from reslearn.detect.sources import describe, introduce, make_sources, open_set
from reslearn.detect.store import save_detector
from reslearn.detect.validation import Validation, to_device, validate_split
from reslearn.errors import UserError
from reslearn.evaluation.average_precision import coco, detection_metrics
from reslearn.evaluation.detection_review import review
from reslearn.evaluation.matching import Matches
from reslearn.files import user_path
from reslearn.nets import create, spec
from reslearn.training import ranks
from reslearn.training.display import Display, percent
from reslearn.training.precise_bn import precise_bn
from reslearn.training.recipe import Chosen
from reslearn.training.task import Evaluation, EvaluationOptions, Job, Losses, LossFunction, Phase, Sources, Task
from reslearn.weights.store import Card, load

SHOWN = 8  # findings listed when a run starts
CARD_METRICS = ("n", "objects", "AP", "AP50", "AP75", "VOC07", "VOC10")
HEADLINES = ("AP", "AP50", "AP75")
BN_BATCH = 8  # images per batch of precise BN

DetectJob = Job[DetectRecipe, AnnotatedSet, BoxSource]


@dataclass(frozen=True)
class BoxExamples:
    """Images, float32 (C, H, W) on [0, 1], and their targets (see Detector), on the host."""

    images: list[Tensor]
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.images)

    def split(self, size: int) -> "list[BoxExamples]":
        starts = range(0, len(self), size)
        return [BoxExamples(self.images[start : start + size], self.targets[start : start + size]) for start in starts]


class Detection(Task[DetectRecipe, AnnotatedSet, BoxSource]):
    """Detection of objects: boxes, classes and optionally masks.

    Losses are means over the anchors and regions sampled in a forward pass. With batch.micro, passes are weighted by their number
    of images; this equals the whole batch's gradient only if every image contributes equally many anchors and regions, which
    images with few proposals do not.
    """

    name = "detect"
    recipe = DetectRecipe
    named = NAMED
    described = ("objects", "faults")

    def open(self, source: str | Path, given: Mapping[str, Any]) -> AnnotatedSet:
        train = given.get("data.train")
        if not isinstance(train, str) or not train:  # other types are rejected with the recipe
            base = given.get("base")
            train = "trainval" if base in ("voc-paper", "voc-paper-4step") else "train"
            if train == "trainval" and (names := split_names(source)) and train not in voc_splits(user_path(source)):
                raise UserError(f"{source}: {base} trains on VOC's trainval, which is missing: use --set data.train={names[0]}")
        return open_set(source, train, given.get("data.bad") or "fail")

    def usual(self, data: AnnotatedSet) -> str:
        return "detect-default"

    def choose(self, name: str, data: AnnotatedSet | None, net: str | None, given: Mapping[str, Any]) -> Chosen:
        return choose(name, data, net, given)

    def check(self, recipe: DetectRecipe, data: AnnotatedSet, given: Mapping[str, Any]) -> None:
        check(recipe, data, given)

    def sources(
        self, data: AnnotatedSet, recipe: DetectRecipe, device: torch.device, display: Display, view: Preprocessing | None
    ) -> Sources[BoxSource]:
        return make_sources(data, recipe, view or backbone(recipe.net.init or recipe.net.name, None)[2])

    def identity(self, data: AnnotatedSet) -> dict[str, str]:
        return {"fingerprint": data.fingerprint()}

    def describe(self, data: AnnotatedSet, sources: Sources[BoxSource]) -> dict[str, Any]:
        faults = Counter(finding.kind for split in data.splits.values() for finding in split.findings if finding.fault)
        return describe(data, sources) | {"faults": dict(faults)}

    def introduce(self, job: DetectJob) -> list[str]:
        lines = [introduce(job.facts)]
        findings = [finding for split in job.data.splits.values() for finding in split.findings]
        lines += [f"         {'left out or cut' if finding.fault else 'note'}: {finding}" for finding in findings[:SHOWN]]
        if len(findings) > SHOWN:
            lines.append(f"         and {len(findings) - SHOWN} more: reslearn doctor {job.facts['source']} lists all")
        if job.sources.preprocessing.channels == 1:
            lines.append("         images are converted to gray, as the initial model needs")
        if job.recipe.alternate is not None:
            steps = self.phases(job.recipe, len(job.sources.train))
            lines += [f"phase {i}  to step {phase.end:,}: {phase.title}" for i, phase in enumerate(steps, start=1)]
            lines.append(f"         validation runs in phases 3 and 4, after step {steps[1].end:,}")
        return lines

    def model(self, job: DetectJob, *, fresh: bool) -> nn.Module:
        recipe, view = job.recipe, job.sources.preprocessing
        torch.manual_seed(integer(recipe.seed, 0x1217))
        if recipe.net.init is not None and fresh:
            body = load(recipe.net.init)
            job.display.say(f"init     backbone from {recipe.net.init}")
            if recipe.precise_bn is not None:
                _settle_backbone(body.to(job.device), recipe.precise_bn, job)
        else:
            body = create(recipe.net.name, spec(recipe.net.name).classes, view.channels, **recipe.net.options())
        detector = assemble(body, job.data.classes, recipe.detector, view, None)
        detector.to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return detector if recipe.alternate is None else Alternating(detector)

    def loss(self, job: DetectJob) -> LossFunction:
        return lambda model, examples: Losses(model(*to_device(job.device, examples.images, examples.targets)))

    def examples(self, job: DetectJob, draws: Draws) -> BoxExamples:
        images, targets = job.sources.train.train_batch(draws)
        if job.device.type == "cuda":  # for asynchronous copies
            images = [image.pin_memory() for image in images]
            targets = [{key: value.pin_memory() for key, value in target.items()} for target in targets]
        return BoxExamples(images, targets)

    def phases(self, recipe: DetectRecipe, images: int) -> tuple[Phase, ...]:
        return super().phases(recipe, images) if recipe.alternate is None else phases(recipe, images)

    def enter(self, model: nn.Module, phase: int) -> nn.Module:
        return model.enter(phase) if isinstance(model, Alternating) else model

    def evaluate(self, job: DetectJob, model: nn.Module, source: BoxSource, options: EvaluationOptions) -> Evaluation:
        seed = job.recipe.seed
        validation = validate_split(detector_of(model), source, options.precision, seed, options.progress)
        losses: dict[str, Any] = {"loss": sum(validation.losses.values()), "losses": validation.losses}
        metrics = partial(detection_metrics, seed=seed) if options.full else _headlines
        numbers: dict[str, Any] = metrics(validation.boxes)
        numbers = numbers | losses | {"review": review(validation.boxes, source.names)} if options.full else losses | numbers
        if validation.masks is not None:
            numbers["masks"] = metrics(validation.masks)
        text = "  ".join(f"held-out {name} {percent(numbers[name])}" for name in HEADLINES)
        text += f"  masks {percent(numbers['masks']['AP'])}" if validation.masks is not None else ""
        return Evaluation(100 - (numbers["AP"] or 0.0), numbers, text, validation)

    def measures(self, numbers: Mapping[str, Any]) -> dict[str, tuple[float | None, Sequence[float] | None]]:
        kinds = {"": numbers} | ({"mask ": numbers["masks"]} if "masks" in numbers else {})
        return {f"{kind}{key}": (of[key], of["intervals"][key]) for kind, of in kinds.items() for key in HEADLINES}

    def card(self, job: DetectJob, model: nn.Module, numbers: dict[str, Any]) -> Card:
        recipe, data = job.recipe, job.data
        return Card(
            net=recipe.net.name,
            options=recipe.net.options(),
            classes=data.classes,
            preprocessing=job.sources.preprocessing,
            detector=recipe.detector.model_dump(mode="json"),
            recipe=recipe.model_dump(mode="json"),
            metrics={split: {key: values[key] for key in CARD_METRICS} for split, values in numbers.items()},
            data={"name": data.name, **self.identity(data)},
        )

    def save(self, job: DetectJob, model: nn.Module, path: Path, numbers: dict[str, Any]) -> object:
        return save_detector(detector_of(model), path, self.card(job, model, numbers))

    def finish(self, job: DetectJob, model: nn.Module, split: str, details: Mapping[str, Any]) -> dict[str, Any]:
        images, validation = job.sources.named()[split].split.images, details[split]
        assert isinstance(validation, Validation)
        examples = save_examples(job.folder, TestOptions((detector_of(model).eval(),)), images)
        return {"gallery": save_gallery(job.folder, images, validation.boxes), "gallery_split": split, "examples": examples}


def detector_of(model: nn.Module) -> Detector:
    """The detector of a run's model."""
    detector = model.detector if isinstance(model, Alternating) else model
    assert isinstance(detector, Detector)
    return detector


def _headlines(matches: Matches) -> dict[str, Any]:
    return {name: value for name, value in coco(matches).items() if name in HEADLINES}


def _settle_backbone(net: nn.Module, images: int, job: DetectJob) -> None:
    """Averages a classification network's BN statistics over the first training images, scaled and flipped as in training."""
    recipe, view, source, device = job.recipe, job.sources.preprocessing, job.sources.train, next(net.parameters()).device
    sides = recipe.detector.min_size, recipe.detector.max_size
    fit = GeneralizedRCNNTransform(*sides, list(view.mean), list(view.std), size_divisible=1)  # no padding
    order = SampleOrder(recipe.seed, len(source), BN_BATCH)

    def batches() -> Iterator[Tensor]:
        for done in range(0, images, BN_BATCH):
            epochs, indices = (batch[: images - done] for batch in order[done // BN_BATCH])
            photos, _ = source.train_batch(Draws(view_seed(recipe.seed), epochs, indices))
            scaled = [fit([photo.to(device)])[0].tensors[0] for photo in photos]
            height, width = (min(image.shape[side] for image in scaled) for side in (-2, -1))  # cropped: padding would be averaged
            yield torch.stack([image[:, :height, :width] for image in scaled])
            job.display.progress("averaging BN", min(done + BN_BATCH, images), images)

    precise_bn(net, batches())
    ranks.wait(ranks.PREPARING)
    ranks.average([buffer for buffer in net.buffers() if buffer.is_floating_point()])  # identical bits on all ranks
    job.display.say(f"         BN statistics averaged over {images} training images")


DETECT = Detection()
