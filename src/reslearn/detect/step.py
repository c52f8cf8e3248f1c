"""Steps of a detector's training, and its judgement on held-out images."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from reslearn.data.augment import Draws
from reslearn.data.boxes.masks import draw, runs_of
from reslearn.data.boxes.source import BoxSource, Target
from reslearn.data.sampling import SampleOrder, integer, view_seed
from reslearn.detect.detector import Detector
from reslearn.detect.recipes import DetectRecipe
from reslearn.device import autocast
from reslearn.evaluation.matching import Matches, match
from reslearn.training import ranks
from reslearn.training.state import Progress, State
from reslearn.training.step import NonFinite

Losses = Callable[[list[Tensor], list[Target]], dict[str, Tensor]]


class BoxBatch(NamedTuple):
    """A step's draws, int64 (N,) each, and its images and targets (see Detector): all N, or a rank's own."""

    epochs: Tensor
    indices: Tensor
    images: list[Tensor]
    targets: list[Target]


class DetectStepper:
    """See stepper.Stepper: the same, of a detector, on however many ranks.

    losses: by name, of a list of images and a list of targets on the device (see Detector): means over what is drawn of these
    images (anchors, regions; of masks and of boxes that are corrected, see torchvision). With batch.micro each pass has its own,
    and its losses and gradients count by its share of the step's images. That is the whole batch's gradient where each image gives
    as many anchors and regions, which those with few proposals do not; and other regions are drawn, the images of a pass are
    padded to the largest of them, and live BN takes the statistics of a pass.
    """

    def __init__(self, recipe: DetectRecipe, source: BoxSource, state: State, precision: str, losses: Losses) -> None:
        self.source, self.state, self.losses = source, state, losses
        self.order = SampleOrder(recipe.seed, len(source), recipe.batch.size)
        self.seed, self.micro = view_seed(recipe.seed), recipe.batch.micro or recipe.batch.size
        self.device = next(state.model.parameters()).device
        self.autocast = autocast(precision, self.device)
        self.grad_norm = 0.0

    def prepare(self, step: int) -> BoxBatch:
        epochs, indices = self.order[step]
        own = ranks.own(len(indices))
        images, targets = self.source.train_batch(Draws(self.seed, epochs[own], indices[own]))
        if self.device.type == "cuda":  # where the GPU can fetch them while the host goes on
            images = [image.pin_memory() for image in images]
            targets = [{key: value.pin_memory() for key, value in target.items()} for target in targets]
        return BoxBatch(epochs, indices, images, targets)

    def __call__(self, batch: BoxBatch, progress: Progress) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
        n, names, parts, shares = len(batch.images), tuple[str, ...](), list[Tensor](), list[float]()
        for start in range(0, n, self.micro):
            images, targets = batch.images[start : start + self.micro], batch.targets[start : start + self.micro]
            with self.autocast:
                losses = self.losses(*on(self.device, images, targets))
            names, each, share = tuple(losses), torch.stack(list(losses.values())), len(images) / n
            (each.sum() * share).backward()
            parts.append(each.detach())
            shares.append(share)
        trained = [p for group in self.state.optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in trained if p.grad is not None]
        means = torch.stack([each * share for each, share in zip(parts, shares, strict=True)]).sum(0)
        live = [module for module in self.state.trained.modules() if isinstance(module, _BatchNorm) and module.training]
        # Ranks normalize by their own images: see stepper.HostStepper.
        statistics = [buffer for module in live for buffer in module.buffers() if buffer.is_floating_point()]
        ranks.average([*gradients, *statistics, means])
        *values, norm = torch.cat([means, torch.nn.utils.get_total_norm(gradients)[None]]).tolist()  # the only wait for the device
        sums = dict(zip(names, values, strict=True))
        loss = sum(sums.values())
        if not np.isfinite(loss + norm):
            raise NonFinite(f"the loss is {loss:g} and the norm of its gradient {norm:g}")
        self.state.optimizer.step()
        if self.state.ema is not None:
            self.state.ema.set_step(progress.step)
            self.state.ema.update()
        everyone = len(batch.indices)
        progress.loss += loss * everyone
        for name, value in sums.items():
            progress.losses[name] = progress.losses.get(name, 0.0) + value * everyone
        self.grad_norm = norm

    def collect(self, progress: Progress) -> None:
        pass

    def restart(self, progress: Progress) -> None:
        pass


def on(device: torch.device, images: list[Tensor], targets: list[Target]) -> tuple[list[Tensor], list[Target]]:
    """The same on a device."""
    how = {"device": device, "non_blocking": device.type == "cuda"}
    moved = [{key: value.to(**how) for key, value in target.items()} for target in targets]
    return [image.to(**how) for image in images], moved


class Judged(NamedTuple):
    """What became of the boxes, and of a mask detector's masks, in the images of a split; and the means of its losses there."""

    boxes: Matches
    masks: Matches | None
    losses: dict[str, float]


def judge(model: Detector, source: BoxSource, precision: str, seed: int, progress: Callable[[int], None]) -> Judged:
    """What a detector finds in the images of a split against their objects; each rank looks at a part of them.

    The losses are of regions that are drawn for each image as a function of the seed and the image's place. progress is called
    by all ranks alike.
    """
    device = next(model.parameters()).device
    boxes, sums = list[dict[str, Tensor]](), dict[str, float]()

    def looks() -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(source), ranks.count()):
            progress(start)
            if (i := start + ranks.rank()) >= len(source):
                return
            image, target = source[i]
            with torch.no_grad(), autocast(precision, device):
                images, targets = on(device, [image], [target])
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(integer(seed, 0x7A1, i))
                    (found,), losses = model.judge(images, targets)
            raw = {key: value.float() if key == "scores" else value for key, value in found.items()}
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            yield raw

    def kept() -> Iterator[dict[str, Tensor]]:
        for raw in looks() if ranks.count() == 1 else _everyones(looks(), len(source)):
            boxes.append({key: value.cpu() for key, value in raw.items() if key != "masks"})
            yield raw

    model.eval()
    truth, classes, each = [image.objects for image in source.split.images], source.split.classes, kept()
    masks = match(truth, each, classes, masks=True) if source.masks else None  # image by image: masks are large
    for _ in each:
        pass
    progress(len(source))
    parts = ranks.gather(sums)
    means = {name: sum(part.get(name, 0.0) for part in parts) / len(source) for name in parts[0]}
    return Judged(match(truth, boxes, classes), masks, means)


def _everyones(own: Iterator[dict[str, Tensor]], images: int) -> Iterator[dict[str, Any]]:
    """What all ranks have found, in the images' order. Masks travel as runs."""
    packed = []
    for found in own:
        light: dict[str, Any] = {key: value.cpu() for key, value in found.items() if key != "masks"}
        if "masks" in found:
            light["masks"] = [runs_of(mask) for mask in (found["masks"][:, 0] > 0.5).cpu().numpy()]
            light["size"] = found["masks"].shape[-2:]
        packed.append(light)
    parts = ranks.gather(packed)
    for i in range(images):
        light = parts[i % len(parts)][i // len(parts)]
        if "masks" in light:
            height, width = light.pop("size")
            drawn = [draw(mask, height, width) for mask in light["masks"]]
            light["masks"] = np.stack(drawn) if drawn else np.zeros((0, height, width), bool)
        yield light


def headline(numbers: dict[str, Any]) -> float:
    """The error in percent that the best weights have least of: what is missing of AP."""
    return 100 - (numbers["AP"] or 0.0)
