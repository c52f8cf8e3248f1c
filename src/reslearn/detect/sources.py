"""A set with boxes as a detector's run reads it: opened, divided, and checked."""

from pathlib import Path
from typing import Any

from reslearn.data.boxes.annotated import AnnotatedSet
from reslearn.data.boxes.box_set import BoxSet, bad_boxes_left_out_by
from reslearn.data.boxes.read import open_boxes, split_names
from reslearn.data.boxes.source import BoxSource, hold_out
from reslearn.data.preprocess import Preprocessing
from reslearn.data.splits import held_out
from reslearn.detect.recipes import DetectRecipe
from reslearn.errors import UserError
from reslearn.files import user_path
from reslearn.training.task import Sources


def open_set(path: str | Path, train: str, bad: Any) -> AnnotatedSet:
    """A set with boxes: all of its splits, or with a split of one's own to train on that one and test."""
    only = None if train == "train" else [train, *(name for name in split_names(path) if name == "test")]
    with bad_boxes_left_out_by("data.bad=drop"):
        splits = open_boxes(path, bad=bad, only=only)
    return AnnotatedSet(user_path(path).absolute(), next(iter(splits.values())).classes, splits, train)


def make_sources(data: AnnotatedSet, recipe: DetectRecipe, view: Preprocessing) -> Sources[BoxSource]:
    """The splits to train with, in the channels that the backbone takes."""
    splits, held, how = dict(data.splits), dict[str, list[str]](), recipe.data
    own = next((name for name in (how.train, "all") if name in splits), None)
    if own is None:
        raise UserError(f"'{data.name}' has no images to train on: no {how.train} (only {', '.join(splits)})")
    train = splits.pop(own)
    if "val" not in splits and (count := held_out(how.val, len(train), "data.val")):
        train, splits["val"] = hold_out(train, count, recipe.seed)
        held["val"] = [image.name for image in splits["val"].images]
    if not any(len(image.objects) for image in train.images):
        raise UserError(f"'{data.name}': the training images have no objects")
    masks = recipe.detector.masks
    for name, split in {"train": train, **splits}.items() if masks else ():
        _check_masks(name, split)
    options = {
        "masks": masks,
        "difficult": how.difficult,
        "channels": view.channels,
    }  # the same losses on all
    others = {name: BoxSource(split, **options) for name, split in splits.items()}
    return Sources(BoxSource(train, flip=how.flip, **options), others.get("val"), others.get("test"), view, held)


def _check_masks(name: str, split: BoxSet) -> None:
    """Reject objects without a mask: in training they would be background, and held out there is nothing to compare with."""
    for image in split.images:
        segmentations = image.objects.segmentations or (None,) * len(image.objects)
        for id, segmentation in zip(image.objects.ids, segmentations, strict=True):
            if segmentation is None:
                raise UserError(
                    f"detector.masks=true: {name} image {image.name}, object {id} has no segmentation to learn or judge masks by: "
                    "give it one, or set detector.masks=false"
                )
