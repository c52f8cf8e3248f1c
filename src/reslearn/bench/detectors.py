"""Training steps of detectors, to be timed: those of `detect train`, and a plain loop's; see benchmarks/gpu_detection.py."""

import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as T

from reslearn.bench import limits
from reslearn.data.boxes.box_set import BoxImage, BoxSet
from reslearn.data.boxes.source import BoxSource, Target
from reslearn.data.images.stream import ahead
from reslearn.detect.task import BoxExamples
from reslearn.detect.validation import to_device
from reslearn.training import runtime
from reslearn.training.recipe import change
from reslearn.training.request import parse
from reslearn.training.run import make_state, prepare
from reslearn.training.stepper import make_stepper

NET = "resnet50-v1.5"  # torchvision's
LR = 1e-8  # so low that the weights stay where they began, and all cases have the same work
SIDE = 800 / 1333  # of the shortest to the longest side that torchvision scales to


@dataclass(frozen=True)
class BenchOptions:
    """What to measure. size: px of the shorter side; regions: per image in training, None: FPN 512, C4 128; images: of inference
    in a round; steps: of each case in a round; workers: that read, processes of the plain loop and threads of ours.
    """

    data: Path
    device: torch.device
    size: int
    regions: int | None
    images: int
    rounds: int
    steps: int
    workers: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"min_size": self.size, "max_size": round(self.size / SIDE)}


def memory(split: BoxSet, n: int) -> tuple[list[Tensor], list[Target]]:
    """The first n images and their targets."""
    source = BoxSource(split)
    images, targets = zip(*(source[i % len(source)] for i in range(n)), strict=True)
    return list(images), list(targets)


class Files(Dataset[tuple[Tensor, Target]]):
    """Files as torchvision's references read them: Pillow, a flip by chance, float32."""

    def __init__(self, images: tuple[BoxImage, ...]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        with Image.open(self.images[i].path) as file:
            image, target = T.pil_to_tensor(file.convert("RGB")), self.images[i].target()
        if torch.rand(()) < 0.5:
            left, top, right, bottom = target["boxes"].unbind(1)
            width = image.shape[2]
            image, target = T.hflip(image), target | {"boxes": torch.stack([width - right, top, width - left, bottom], 1)}
        return T.to_dtype(image, torch.float32, scale=True), target


def transposed(batch: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch as detectors take it."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


class Plain:
    """The plain loop with a model: torchvision's references' train_one_epoch with --amp, but in bf16, and without what it prints.

    held: a batch that lies on the device.
    """

    def __init__(self, options: BenchOptions, model: nn.Module, split: BoxSet, batch: int) -> None:
        self.options, self.model, self.split, self.batch = options, model.train(), split, batch
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, LR, momentum=0.9, weight_decay=1e-4)
        images, targets = to_device(options.device, *memory(split, batch))
        self.held = images, targets
        self.batches = self._endless()

    def _endless(self) -> Generator[tuple[list[Tensor], list[Target]]]:
        workers = self.options.workers
        options = {"num_workers": workers, "collate_fn": transposed, "drop_last": len(self.split) >= self.batch}
        loader = DataLoader(Files(self.split.images), self.batch, shuffle=True, persistent_workers=workers > 0, **options)
        while True:
            yield from loader

    def step(self, precision: str, reading: bool) -> None:
        """One update, in "fp32" or "bf16", from the batch that is held or, with reading, from files."""
        images, targets = next(self.batches) if reading else self.held
        device = self.options.device
        images = [image.to(device) for image in images]
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses: dict[str, Tensor] = self.model(images, targets)
            loss = sum(losses.values(), torch.zeros((), device=device))
        if not math.isfinite(loss.item()):
            sys.exit(f"the plain loop's loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        for value in losses.values():  # its logger's
            value.item()


class Ours:
    """Steps as `detect train` runs them, without a run folder. held: a batch that lies on the device."""

    def __init__(self, options: BenchOptions, kind: str, batch_norm: str, batch: int, precisions: tuple[str, ...]) -> None:
        detector = {
            "kind": kind,
            "batch_norm": batch_norm,
            **options.sizes,
            "regions": options.regions or {"fpn": 512, "c4": 128}[kind],
            "ranked": {"fpn": [2000, 1000], "c4": [12000, 6000]}[kind],  # create_detector's, not the recipe's
            "proposals": {"fpn": [2000, 1000], "c4": [2000, 300]}[kind],
        }
        settings = {
            "detector": detector,
            "batch.size": batch,
            "schedule": {"lr": LR, "warmup": 0, "steps": 1_000_000},
            "data": {"workers": options.workers, "bad": "drop"},
        }
        device = str(options.device)
        job = prepare(parse(options.data, model=NET, settings=settings, seed=0, device=device, task="detect", quiet=True))
        self.options, self.seed, self.source, self.state = options, job.recipe.seed, job.sources.train, make_state(job)
        self.model = self.state.model.train()
        self.steppers = {
            precision: make_stepper(replace(job, recipe=change(job.recipe, {"precision": precision})), self.state)
            for precision in precisions
        }
        prepare_batch = self.steppers[precisions[0]].prepare
        images, targets = to_device(job.device, *memory(self.source.split, batch))
        self.held = prepare_batch(0)._replace(examples=BoxExamples(images, targets))
        self.batches = ahead(prepare_batch, range(10**6), options.workers)

    def step(self, precision: str, reading: bool) -> None:
        """As Plain's."""
        p = self.state.progress
        runtime.seed_step(self.seed, p.step)
        self.steppers[precision](next(self.batches) if reading else self.held)
        p.step += 1


@dataclass
class Case:
    """Steps to be timed. base: the case that they are compared with; deterministic: whether in that mode, as runs are."""

    step: Callable[[], None]
    base: str
    program: Plain | Ours
    deterministic: bool

    def seconds(self, steps: int) -> float:
        """Of one step, over so many."""
        device = self.program.options.device
        with runtime.deterministic(device) if self.deterministic else nullcontext():
            limits.wait_for(device)
            started = time.perf_counter()
            for _ in range(steps):
                self.step()
            limits.wait_for(device)
        return (time.perf_counter() - started) / steps


def cases(plain: Plain, own: Ours, name: str, precisions: tuple[str, ...]) -> dict[str, Case]:
    """In each precision the network alone, our own also without determinism; in the first with reading too."""
    found = dict[str, Case]()

    def add(what: str, base: str, program: Plain | Ours, precision: str, reading: bool, deterministic: bool) -> None:
        found[what] = Case(lambda: program.step(precision, reading), base, program, deterministic)

    for precision in precisions:
        for reading in (False, True) if precision == precisions[0] else (False,):
            end = f"{precision}{', with reading' if reading else ''}"
            base = f"{name}, {end}"
            add(base, base, plain, precision, reading, False)
            add(f"reslearn, {end}", base, own, precision, reading, True)
            if not reading and precision == precisions[0]:
                add(f"reslearn, {end}, not deterministic", base, own, precision, reading, False)
    return found
