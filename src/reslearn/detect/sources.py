"""Sets with boxes for training: opened, split, checked and described."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reslearn.data.boxes.annotated import AnnotatedSet
from reslearn.data.boxes.box_set import BoxSet, bad_boxes_left_out_by
from reslearn.data.boxes.read import open_boxes, split_names
from reslearn.data.boxes.source import BoxSource, hold_out
from reslearn.data.preprocess import Preprocessing
from reslearn.data.splits import held_out as held_out_count
from reslearn.detect.recipes import BoxRecipe, DetectRecipe
from reslearn.errors import UserError
from reslearn.files import user_path
from reslearn.training.task import Sources


def open_set(path: str | Path, train: str, bad: Any) -> AnnotatedSet:
    """Opens a set with boxes: all splits, or if `train` names another split to train on, that one and test."""
    only = None if train == "train" else [train, *(name for name in split_names(path) if name == "test")]
    with bad_boxes_left_out_by("data.bad=drop"):
        splits = open_boxes(path, bad=bad, only=only)
    return AnnotatedSet(user_path(path).absolute(), next(iter(splits.values())).classes, splits, train)


def divide(data: AnnotatedSet, name: str, recipe: BoxRecipe) -> tuple[BoxSet, dict[str, BoxSet], dict[str, list[str]]]:
    """The training images, from split `name`; the other splits; and the names of held-out images by split.

    A set without a val split holds out recipe.data.val of the training images.
    """
    splits, held_out = dict(data.splits), dict[str, list[str]]()
    train = splits.pop(name)
    if "val" not in splits and (count := held_out_count(recipe.data.val, len(train), "data.val")):
        train, splits["val"] = hold_out(train, count, recipe.seed)
        held_out["val"] = [image.name for image in splits["val"].images]
    return train, splits, held_out


def make_sources(data: AnnotatedSet, recipe: DetectRecipe, view: Preprocessing) -> Sources[BoxSource]:
    """The splits of a run, read with the number of channels that the backbone takes."""
    name = next((name for name in (recipe.data.train, "all") if name in data.splits), None)
    if name is None:
        raise UserError(f"'{data.name}' has no split '{recipe.data.train}' to train on (only {', '.join(data.splits)})")
    train, splits, held_out = divide(data, name, recipe)
    if not any(len(image.objects) for image in train.images):
        raise UserError(f"'{data.name}': the training images have no objects")
    masks = recipe.detector.masks
    for name, split in {"train": train, **splits}.items() if masks else ():
        _check_masks(name, split)
    options = {"masks": masks, "difficult": recipe.data.difficult, "channels": view.channels}  # the same losses on all splits
    others = {name: BoxSource(split, **options) for name, split in splits.items()}
    return Sources(BoxSource(train, flip=recipe.data.flip, **options), others.get("val"), others.get("test"), view, held_out)


def describe(data: AnnotatedSet, sources: Sources[Any]) -> dict[str, Any]:
    """What recipe.json says of the data besides its identity; see Task.describe."""
    return {
        "name": data.name,
        "classes": list(data.classes),
        "n": {name: len(source) for name, source in sources.named().items()},
        "objects": sources.train.split.counts(),
    }


def introduce(facts: Mapping[str, Any]) -> str:
    """The line on the data before a run starts. facts: the run's recipe.json."""
    described = facts["data"]
    counts = " + ".join(f"{n:,} {name}" for name, n in described["n"].items())
    objects = ", ".join(f"{name} {n:,}" for name, n in described["objects"].items())
    return f"data     {described['name']}: {counts} images; training objects: {objects}"


def _check_masks(name: str, split: BoxSet) -> None:
    """Rejects objects without a mask: in training they would count as background, and evaluation needs one for each object."""
    for image in split.images:
        segmentations = image.objects.segmentations or (None,) * len(image.objects)
        for id, segmentation in zip(image.objects.ids, segmentations, strict=True):
            if segmentation is None:
                raise UserError(
                    f"detector.masks=true: {name} image {image.name}, object {id} has no segmentation: "
                    "add one, or set detector.masks=false"
                )
