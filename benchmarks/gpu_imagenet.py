"""ResNet-50 training on a GPU: our step beside torchvision's model in a plain mixed-precision loop, and beside the device's limit.

    PYTHONPATH=src python benchmarks/gpu_imagenet.py --out benchmarks/results/gpu_imagenet

At 224 and 160 px, batch 256, on images that lie on the device: what the network alone can do; with --data, also on photos of a
folder, as they are or packed (`reslearn pack`). Steps of all cases take turns in rounds; medians. With --profile also a table of
the operations that take longest, before and after compiling. Writes OUT.json. About four minutes on one large GPU.
`--batch 4 --size 64 --device cpu` shows that it runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.bench import limits
from reslearn.bench.train import OurLoop
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.classify.task import CLASSIFY, ImageExamples, cross_entropy
from reslearn.data.images.stream import ahead
from reslearn.device import autocast, pick_device, pick_precision
from reslearn.nets import create
from reslearn.nets.cost import cost
from reslearn.training import runtime
from reslearn.training.recipe import Net, Schedule
from reslearn.training.request import parse
from reslearn.training.run import prepare
from reslearn.training.state import State
from reslearn.training.step import LossModule, Outcome, update
from reslearn.training.task import Phase

NET, CLASSES = "resnet50-v1.5", 1000
Step = Callable[[], None]


def batch(size: int, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (images, 3, size, size), dtype=torch.uint8, generator=generator)
    return pixels.to(device), torch.randint(0, CLASSES, (images,), generator=generator).to(device)


def normalized(pixels: Tensor) -> Tensor:
    return pixels.float().mul_(1 / 58.0).sub_(2.0)


def plain(pixels: Tensor, labels: Tensor, device: torch.device) -> Step:
    """torchvision's network, its usual memory layout, autocast, PyTorch's SGD."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=CLASSES).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(normalized(pixels)), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def ours(pixels: Tensor, labels: Tensor, device: torch.device, compiled: bool) -> Step:
    """Our step as `train` runs it, eager or compiled: channels last, fused SGD, the finiteness check."""
    torch.manual_seed(0)
    model: nn.Module = create(NET, CLASSES).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    recipe = ClassifyRecipe(net=Net(name=NET), schedule=Schedule(steps=1))
    state, run = State(model, recipe, [Phase(1)], CLASSIFY), torch.compile(model, dynamic=False) if compiled else model
    cast = autocast(pick_precision("auto", device), device)
    losses = LossModule(run, cross_entropy(recipe.loss, torch.ones(CLASSES)), cast)  # type: ignore[arg-type]

    def check(outcome: Outcome) -> None:
        if not torch.isfinite(outcome.loss + outcome.grad_norm):
            sys.exit("the loss is not finite")

    return lambda: update(losses, ImageExamples(normalized(pixels), labels), state, check)


def from_photos(folder: str, size: int, images: int, device: torch.device, workers: int) -> Step:
    """Our step on random resized crops of a folder of photos, or a packed one, prepared ahead by threads."""
    settings = {"batch.size": images, "data.size": size, "data.cache": "off", "execution": "eager"}
    how: dict[str, Any] = {"model": NET, "settings": settings, "device": str(device), "quiet": True}
    loop = OurLoop(prepare(parse(folder, "imagenet-classic", **how)))
    batches = ahead(loop.stepper.prepare, range(10**6), workers)
    return lambda: loop.step(next(batches))


def seconds(step: Step, steps: int, device: torch.device) -> float:
    limits.wait_for(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    limits.wait_for(device)
    return (time.perf_counter() - started) / steps


def profile(step: Step, device: torch.device) -> list[str]:
    """The operations that take longest in three steps."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(3):
            step()
        limits.wait_for(device)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=12).splitlines()


def measure(
    size: int, images: int, rounds: int, steps: int, device: torch.device, profiled: bool, folders: list[str], workers: int
) -> dict[str, Any]:
    pixels, labels = batch(size, images, device)
    cases = {
        "torchvision, plain loop": plain(pixels, labels, device),
        "reslearn, eager": ours(pixels, labels, device, False),
        "reslearn, compiled": ours(pixels, labels, device, True),
    }
    cases |= {f"reslearn, eager, from {Path(f).name}": from_photos(f, size, images, device, workers) for f in folders}
    first = {name: seconds(step, 1, device) for name, step in cases.items()}
    for step in cases.values():
        seconds(step, 3, device)
    took = {name: [] for name in cases}
    for _ in range(rounds):
        for name, step in cases.items():
            took[name].append(seconds(step, steps, device))
    speeds = {name: round(images / statistics.median(each), 1) for name, each in took.items()}
    macs = 3 * cost(create(NET), (3, size, size), backward=False).macs
    by_arithmetic = limits.matrix_rate(device, pick_precision("auto", device)) / macs
    base = speeds["torchvision, plain loop"]
    return {
        "size": size,
        "batch": images,
        "images_per_s": speeds,
        "ratio": {name: round(speed / base, 3) for name, speed in speeds.items()},
        "seconds_of_the_first_step": {name: round(s, 2) for name, s in first.items()},
        "limit_by_multiply_adds": round(by_arithmetic, 1),
        "share_of_it": {name: round(speed / by_arithmetic, 3) for name, speed in speeds.items()},
        "profile": {name: profile(step, device) for name, step in cases.items()} if profiled else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, nargs="*", default=[224, 160])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--data", nargs="*", default=[], help="folders of photos, as they are or packed")
    parser.add_argument("--workers", type=int, default=16, help="threads that prepare their batches")
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    device = pick_device(asked.device)
    rows = []
    for size in asked.size:
        rows.append(measure(size, asked.batch, asked.rounds, asked.steps, device, asked.profile, asked.data, asked.workers))
        print(f"{size} px, batch {asked.batch}:")
        for name, speed in rows[-1]["images_per_s"].items():
            ratio, share = rows[-1]["ratio"][name], rows[-1]["share_of_it"][name]
            print(f"  {name:26} {speed:10,.1f} images/s  {ratio:.2f}x  {share:.0%} of the limit")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": runtime.machine(device, pick_precision("auto", device), "eager and compiled"),
        "versions": runtime.versions(),
        "rows": rows,
    }
    asked.out.with_name(f"{asked.out.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
