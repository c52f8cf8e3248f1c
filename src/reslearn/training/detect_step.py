"""Steps of a detector's training, and its judgement on held-out images."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reslearn.data.augment import Draws
from reslearn.data.boxed import Boxed, Target
from reslearn.data.draws import Order, integer, view_seed
from reslearn.detect.detector import Detector
from reslearn.device import autocast
from reslearn.evaluation.matching import Matches, match
from reslearn.recipes.detection import DetectRecipe
from reslearn.training.state import Progress, State
from reslearn.training.step import NonFinite

Losses = Callable[[list[Tensor], list[Target]], dict[str, Tensor]]


class BoxBatch(NamedTuple):
    """A step's draws, int64 (N,) each, and its images and targets (see Detector)."""

    epochs: Tensor
    indices: Tensor
    images: list[Tensor]
    targets: list[Target]


class DetectStepper:
    """See stepper.Stepper: the same, of a detector.

    losses: by name, of a list of images and a list of targets on the device (see Detector): means over what is drawn of these
    images (anchors, regions; of masks and of boxes that are corrected, see torchvision). With batch.micro each pass has its own,
    and its losses and gradients count by its share of the step's images. That is the whole batch's gradient where each image gives
    as many anchors and regions, which those with few proposals do not; and other regions are drawn, the images of a pass are
    padded to the largest of them, and live BN takes the statistics of a pass.
    """

    def __init__(self, recipe: DetectRecipe, source: Boxed, state: State, precision: str, losses: Losses) -> None:
        self.source, self.state, self.losses = source, state, losses
        self.order = Order(recipe.seed, len(source), recipe.batch.size)
        self.seed, self.micro = view_seed(recipe.seed), recipe.batch.micro or recipe.batch.size
        self.device = next(state.model.parameters()).device
        self.autocast = autocast(precision, self.device)
        self.grad_norm = 0.0

    def prepare(self, step: int) -> BoxBatch:
        epochs, indices = self.order[step]
        return BoxBatch(epochs, indices, *self.source.train_batch(Draws(self.seed, epochs, indices)))

    def __call__(self, batch: BoxBatch, progress: Progress) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
        n, sums = len(batch.images), dict[str, float]()
        for start in range(0, n, self.micro):
            images, targets = batch.images[start : start + self.micro], batch.targets[start : start + self.micro]
            with self.autocast:
                losses = self.losses(*on(self.device, images, targets))
            share = len(images) / n
            (torch.stack(list(losses.values())).sum() * share).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * share
        trained = [p for group in self.state.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
        loss = sum(sums.values())
        if not np.isfinite(loss + norm):
            raise NonFinite(f"the loss is {loss:g} and the norm of its gradient {norm:g}")
        self.state.optimizer.step()
        if self.state.ema is not None:
            self.state.ema.set_step(progress.step)
            self.state.ema.update()
        progress.loss += loss * n
        for name, value in sums.items():
            progress.losses[name] = progress.losses.get(name, 0.0) + value * n
        self.grad_norm = norm

    def collect(self, progress: Progress) -> None:
        pass

    def restart(self, progress: Progress) -> None:
        pass


def on(device: torch.device, images: list[Tensor], targets: list[Target]) -> tuple[list[Tensor], list[Target]]:
    """The same on a device."""
    moved = [{key: value.to(device) for key, value in target.items()} for target in targets]
    return [image.to(device) for image in images], moved


class Judged(NamedTuple):
    """What became of the boxes, and of a mask detector's masks, in the images of a split; and the means of its losses there."""

    boxes: Matches
    masks: Matches | None
    losses: dict[str, float]


def judge(model: Detector, source: Boxed, precision: str, seed: int, progress: Callable[[int], None]) -> Judged:
    """What a detector finds in the images of a split against their objects.

    The losses are of regions that are drawn for each image as a function of the seed and the image's place.
    """
    device = next(model.parameters()).device
    boxes, sums = list[dict[str, Tensor]](), dict[str, float]()

    def found() -> Iterator[dict[str, Tensor]]:
        for i in range(len(source)):
            image, target = source[i]
            with torch.no_grad(), autocast(precision, device):
                images, targets = on(device, [image], [target])
                raw = {key: value.float() if key == "scores" else value for key, value in model(images)[0].items()}
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(integer(seed, 0x7A1, i))
                    for name, value in model.losses(images, targets).items():
                        sums[name] = sums.get(name, 0.0) + value.item()
            boxes.append({key: value.cpu() for key, value in raw.items() if key != "masks"})
            progress(i + 1)
            yield raw

    model.eval()
    truth, classes, each = [image.objects for image in source.split.images], source.split.classes, found()
    masks = match(truth, each, classes, masks=True) if source.masks else None  # image by image: masks are large
    for _ in each:
        pass
    return Judged(match(truth, boxes, classes), masks, {name: value / len(source) for name, value in sums.items()})


def headline(numbers: dict[str, Any]) -> float:
    """The error in percent that the best weights have least of: what is missing of AP."""
    return 100 - (numbers["AP"] or 0.0)
