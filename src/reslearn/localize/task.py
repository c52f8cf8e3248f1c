"""The localization task: both stages of a localizer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from reslearn.data.augment import Draws
from reslearn.data.boxes.annotated import AnnotatedSet
from reslearn.data.images.statistics import measure
from reslearn.data.images.stream import Photos
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder, integer, view_seed
from reslearn.data.sets import Split
from reslearn.detect.sources import describe, divide, introduce
from reslearn.errors import UserError, naming
from reslearn.evaluation.protocols import evaluating
from reslearn.files import user_path
from reslearn.localize import regions
from reslearn.localize.crops import Crops, crops_of, training_crops
from reslearn.localize.evaluate import VIEWS, View, errors, views
from reslearn.localize.gallery import MOST, save_examples, save_gallery
from reslearn.localize.losses import losses
from reslearn.localize.net import Localizer, create_localizer, flat, load_localizer, save_localizer
from reslearn.localize.predict import predict, propose
from reslearn.localize.recipes import NAMED, LocalizeRecipe, localize_regions
from reslearn.localize.regions import RegionExamples, add_second_stage, region_losses
from reslearn.localize.sources import LocalizeSource, open_to_train
from reslearn.nets import create
from reslearn.progress import Progress as ViewProgress
from reslearn.progress import silent
from reslearn.training import ranks
from reslearn.training.display import Display
from reslearn.training.recipe import Chosen, flatten, shown
from reslearn.training.task import Evaluation, EvaluationOptions, Job, Losses, LossFunction, Progress, Sources, Task
from reslearn.weights import Card
from reslearn.weights.store import check_classifies, load, model_file, read_card

LocalizeJob = Job[LocalizeRecipe, AnnotatedSet, LocalizeSource]


class Localization(Task[LocalizeRecipe, AnnotatedSet, LocalizeSource]):
    """Localization: a box for each class, in images with objects of one class."""

    name = "localize"
    recipe = LocalizeRecipe
    named = NAMED
    described = ("objects",)

    def open(self, source: str | Path, given: Mapping[str, Any]) -> AnnotatedSet:
        splits = open_to_train(source)
        return AnnotatedSet(user_path(source).absolute(), splits["train"].classes, splits)

    def usual(self, data: AnnotatedSet) -> str:
        return "localize-default"

    def choose(self, name: str, data: AnnotatedSet | None, net: str | None, given: Mapping[str, Any]) -> Chosen:
        return NAMED[name](data, net, given)

    def check(self, recipe: LocalizeRecipe, data: AnnotatedSet, given: Mapping[str, Any]) -> None:
        if recipe.stage == "regions":
            _check_second_stage(recipe, data)
            return
        if recipe.net.init is not None:
            with naming(model_file(recipe.net.init)):
                check_classifies(read_card(recipe.net.init))
        with torch.device("meta"):
            create_localizer(recipe.net.name, data.classes, recipe.settings(), _unmeasured(recipe), recipe.net.options())

    def sources(
        self, data: AnnotatedSet, recipe: LocalizeRecipe, device: torch.device, display: Display, view: Preprocessing | None
    ) -> Sources[LocalizeSource]:
        train, splits, held_out = divide(data, "train", recipe)
        if view is None:
            view = _view(recipe, data, display)
        others = {name: LocalizeSource(split) for name, split in splits.items()}
        return Sources(LocalizeSource(train), others.get("val"), others.get("test"), view, held_out)

    def identity(self, data: AnnotatedSet) -> dict[str, str]:
        return {"fingerprint": data.fingerprint()}

    def describe(self, data: AnnotatedSet, sources: Sources[LocalizeSource]) -> dict[str, Any]:
        return describe(data, sources)

    def introduce(self, job: LocalizeJob) -> list[str]:
        return [introduce(job.facts)]

    def model(self, job: LocalizeJob, *, fresh: bool) -> nn.Module:
        recipe, options = job.recipe, job.recipe.net.options()
        init = recipe.net.init if fresh else None
        if init is not None and recipe.stage == "regions":
            first = load_localizer(init)
            first.card = first.card.model_copy(update={"options": options})
            torch.manual_seed(integer(recipe.seed, 0x1218))
            model = add_second_stage(first, recipe.localizer.proposals or 1)
        else:
            start = recipe.net.name if init is None else _load_with(options, init)
            torch.manual_seed(integer(recipe.seed, 0x1217))
            model = create_localizer(start, job.data.classes, recipe.settings(), job.sources.preprocessing, options)
        return model.to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def enter(self, model: nn.Module, phase: int) -> nn.Module:
        assert isinstance(model, Localizer)
        if model.regions is None:
            return model
        model.requires_grad_(False)
        model.regions.requires_grad_(True)
        return model.regions

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]

    def loss(self, job: LocalizeJob) -> LossFunction:
        normalize, on, iou = job.sources.preprocessing.normalizer(job.device), job.device, job.recipe.localizer.iou

        def crop_loss(model: nn.Module, examples: Crops) -> Losses:
            images = normalize(examples.pixels.to(on)).contiguous(memory_format=torch.channels_last)
            logits, deltas, anchors = model(images)
            boxes = [boxes.to(on) for boxes in examples.boxes]
            return Losses(losses(logits.float(), deltas.float(), anchors, boxes, examples.labels.to(on), iou))

        def region_loss(model: nn.Module, examples: RegionExamples) -> Losses:
            second = model.get_submodule("regions")
            logits, deltas = second(examples.regions.to(on).contiguous(memory_format=torch.channels_last))
            targets = examples.labels.to(on), examples.positive.to(on), examples.targets.to(on)
            return Losses(region_losses(logits.float(), deltas.float(), *targets))

        return crop_loss if job.recipe.stage == "proposals" else region_loss

    def examples(self, job: LocalizeJob, draws: Draws) -> Crops | RegionExamples:
        source, recipe = job.sources.train, job.recipe
        if recipe.stage == "proposals":
            return crops_of(source, recipe.seed, recipe.data.size, recipe.data.jitter, draws)
        return regions.regions_of(source, source.proposals(job.folder / regions.FILE), job.sources.preprocessing, draws)

    def evaluate(self, job: LocalizeJob, model: nn.Module, source: LocalizeSource, options: EvaluationOptions) -> Evaluation:
        assert isinstance(model, Localizer)
        scales, second = (min(model.card.preprocessing.covered),), model.regions is not None

        def predicted(share: LocalizeSource, step: ViewProgress) -> dict[str, View]:
            if options.full or second:
                return views(model, share.split, share.single.labels, scales, None, step, crop=options.full)
            return {"1-crop": View.of(*predict(model, share.split, None, step))}

        with evaluating(model):
            by_name = _shared(source, options.progress, predicted)
        numbers = {name: errors(view.order, view.boxes, source.single, model.classes) for name, view in by_name.items()}
        headline = "refined" if second else "1-crop"
        error = numbers[headline]["true_class"]["error"]
        text = f"held-out localization error, true class given, {VIEWS[headline]}: {error:.2f}%"
        if not options.full:
            return Evaluation(error, {"localization_error": error}, text)
        about = {"n": len(source), "scales": list(scales), "classes": list(model.classes), "classes_from": "its own scores"}
        return Evaluation(error, about | numbers, text, by_name)

    def measures(self, numbers: Mapping[str, Any]) -> dict[str, tuple[float | None, Sequence[float] | None]]:
        by_title = {title: numbers[view]["true_class"] for view, title in VIEWS.items() if view in numbers}
        return {f"localization error, true class given, {title}": (n["error"], n["interval"]) for title, n in by_title.items()}

    def card(self, job: LocalizeJob, model: nn.Module, numbers: dict[str, Any]) -> Card:
        assert isinstance(model, Localizer)
        short = {split: {view: of[view]["true_class"]["error"] for view in VIEWS if view in of} for split, of in numbers.items()}
        data = {"name": job.data.name, **self.identity(job.data)}
        update = {"recipe": job.recipe.model_dump(mode="json"), "metrics": short, "data": data}
        return model.card.model_copy(update=update)

    def save(self, job: LocalizeJob, model: nn.Module, path: Path, numbers: dict[str, Any]) -> object:
        assert isinstance(model, Localizer)
        return save_localizer(model, path, self.card(job, model, numbers))

    def finish(self, job: LocalizeJob, model: nn.Module, split: str, details: Mapping[str, Any]) -> dict[str, Any]:
        source = job.sources.named()[split]
        return {**save_gallery(job.folder, source.split, source.single, details[split]), "gallery_split": split}

    def begin(self, job: LocalizeJob) -> None:
        recipe, source, view = job.recipe, job.sources.train, job.sources.preprocessing
        if recipe.stage == "regions" and not regions.has_proposals(job.folder):
            first = load_localizer(recipe.net.init or "", job.device)
            boxes = propose(
                first,
                source.split,
                source.single.labels[:, None],
                recipe.localizer.proposals or 1,
                progress=lambda what, done, total: job.display.progress(f"proposals, {what}", done, total),
            )
            regions.save_proposals(job.folder, boxes[:, 0])
        if (job.folder / "images" / "examples.jpg").exists():
            return
        order = SampleOrder(recipe.seed, len(source), recipe.batch.size)
        epochs, indices = (batch[:MOST] for batch in order[0])
        if recipe.stage == "proposals":
            size, jitter = recipe.data.size, recipe.data.jitter
            crops = training_crops(source.reader, source.single, recipe.seed, size, jitter, epochs, indices)
            save_examples(job.folder, ((crop, boxes, ()) for crop, boxes in crops))
        else:
            examples = self.examples(job, Draws(view_seed(recipe.seed), epochs, indices))
            assert isinstance(examples, RegionExamples)
            save_examples(job.folder, regions.as_pictures(examples, view))


def _load_with(options: dict[str, Any], init: str) -> nn.Module:
    """The classification model that a run starts from, with the options of the run's recipe, which may differ from the model's."""
    source, card = load(init), read_card(init).model_copy(update={"options": options})
    net = create(card.net, len(card.classes), card.preprocessing.channels, **options)
    net.load_state_dict(source.state_dict())
    net.card = card  # type: ignore[assignment]
    return net


def _check_second_stage(recipe: LocalizeRecipe, data: AnnotatedSet) -> None:
    """Raises UserError if the second stage's images, anchors or classes differ from its localizer's."""
    init = recipe.net.init or ""
    card, expected = read_card(init), localize_regions(data, None, {"net.init": init}).plain()
    if card.classes != data.classes:
        one, other = (", ".join(classes) for classes in (card.classes, data.classes))
        raise UserError(f"{init} has the classes {one}, but {data.name} has {other}")
    resolved = flatten(recipe.model_dump(mode="json"))
    for section in ("data", "localizer"):
        for key, value in flatten(expected[section], f"{section}.").items():
            if key != "localizer.proposals" and shown(resolved[key]) != shown(value):
                raise UserError(
                    f"{key}={shown(resolved[key])} does not apply to stage regions: {init} has {shown(value)}; leave it out"
                )


def _unmeasured(recipe: LocalizeRecipe) -> Preprocessing:
    """A recipe's preprocessing, without statistics."""
    size = (recipe.data.size, recipe.data.size)
    return Preprocessing(channels=3, size=size, crop_ratio=recipe.data.crop_ratio, mean=(0.0,) * 3, std=(1.0,) * 3)


def _view(recipe: LocalizeRecipe, data: AnnotatedSet, display: Display) -> Preprocessing:
    """The preprocessing, with the statistics of the model in net.init, by default of the training images."""
    unmeasured = _unmeasured(recipe)
    if recipe.net.init is not None:
        view = read_card(recipe.net.init).preprocessing
        if view.channels != 3:
            raise UserError(f"{recipe.net.init} takes gray images; localization needs a network of color images")
        own = {"size": unmeasured.size, "crop_ratio": unmeasured.crop_ratio}
        return view if recipe.stage == "regions" else flat(view).model_copy(update=own)
    images = data.training.images
    names, files = tuple(image.name for image in images), tuple(image.path for image in images)
    photos = Photos(Split(np.zeros(len(files), np.int64), names, files=files), unmeasured)
    return measure(photos, unmeasured, "channel", display.progress)


def _shared(
    source: LocalizeSource, progress: Progress, predicted: Callable[[LocalizeSource, ViewProgress], dict[str, View]]
) -> dict[str, View]:
    """Views of a split: each rank applies `predicted` to its share of the images, and all ranks get the whole result."""
    n, count = len(source), ranks.count()
    if count == 1:
        return predicted(source, lambda what, done, total: progress(done))
    progress(0)
    own = predicted(source.share(ranks.rank(), count), silent) if ranks.rank() < n else {}
    ranks.wait(ranks.PREPARING)  # ranks may take unequally long
    progress(n)
    shares = [share for share in ranks.gather(own) if share]
    order = np.argsort(np.concatenate([np.arange(rank, n, count) for rank in range(len(shares))]))

    def joined(name: str) -> View:
        return View(*(np.concatenate(arrays)[order] for arrays in zip(*(share[name] for share in shares), strict=True)))

    return {name: joined(name) for name in shares[0]}


LOCALIZE = Localization()
