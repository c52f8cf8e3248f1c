"""Validation of a detector in training: detections and losses on a split, shared among the ranks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reslearn.data.boxes.source import BoxSource, Target
from reslearn.data.sampling import integer
from reslearn.detect.detector import Detector
from reslearn.detect.evaluate import as_arrays, matches
from reslearn.device import autocast
from reslearn.evaluation.matching import Matches
from reslearn.evaluation.protocols import evaluating
from reslearn.training import ranks
from reslearn.training.task import Progress


class Validation(NamedTuple):
    """Matches of the detected boxes, and of masks from Mask R-CNN, with a split's objects; and the mean losses by name."""

    boxes: Matches
    masks: Matches | None
    losses: dict[str, float]


def to_device(device: torch.device, images: list[Tensor], targets: list[Target]) -> tuple[list[Tensor], list[Target]]:
    """Moves images and targets to a device."""
    options: dict[str, Any] = {"device": device, "non_blocking": device.type == "cuda"}
    moved = [{key: value.to(**options) for key, value in target.items()} for target in targets]
    return [image.to(**options) for image in images], moved


def validate_split(model: Detector, source: BoxSource, precision: str, seed: int, progress: Progress) -> Validation:
    """Runs a detector on a split; returns matches and losses on all ranks.

    The regions of the losses are sampled for each image as a function of the seed and the image's index. All ranks call progress
    equally.
    """
    device = next(model.parameters()).device
    own, sums = list[dict[str, Any]](), dict[str, float]()
    with evaluating(model), torch.no_grad():
        for start in range(0, len(source), ranks.count()):
            progress(start)
            if (i := start + ranks.rank()) >= len(source):
                break
            image, target = source[i]
            with autocast(precision, device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(integer(seed, 0x7A1, i))
                (detections,), losses = model.detect_with_losses(*to_device(device, [image], [target]))
            own.append(as_arrays(detections))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item()
    progress(len(source))
    shares = ranks.gather((own, sums))
    detections = [shares[i % len(shares)][0][i // len(shares)] for i in range(len(source))]
    means = {name: sum(rank_sums.get(name, 0.0) for _, rank_sums in shares) / len(source) for name in shares[0][1]}
    masks = matches(detections, source.split, masks=True) if source.masks else None
    return Validation(matches(detections, source.split), masks, means)
