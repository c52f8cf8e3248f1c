"""How long trainings take on this machine, from one short measurement."""

import time
from functools import cache

import torch

from reslearn.device import autocast, pick_device, pick_precision
from reslearn.kernels.fuse import fuse
from reslearn.nets import create, spec
from reslearn.nets.cost import cost
from reslearn.training.recipe import Recipe, validate
from reslearn.training.step import make_criterion, make_optimizer, train_step
from reslearn.training.stepper import pick

STEPS, BATCH = 8, 128
FIXED = 0.005  # seconds of a step that do not depend on the network


@cache
def rate(device: str = "auto") -> float:
    """Multiply-adds a second that ResNet-20's training step reaches on this machine as it is at the moment."""
    on = pick_device(device)
    recipe = validate({"net": {"name": "resnet20"}, "schedule": {"steps": 1}})
    mode, _ = pick("auto", on, recipe, resident=True)
    return _measure(recipe, on, pick_precision("auto", on), mode)


def _measure(recipe: Recipe, device: torch.device, precision: str, mode: str) -> float:
    torch.manual_seed(0)
    net = create("resnet20", 10).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    net = fuse(net) if mode == "fused" else net
    images, labels = torch.randn(BATCH, 3, 32, 32, device=device), torch.randint(0, 10, (BATCH,), device=device)
    criterion, optimizer = make_criterion(recipe.loss, torch.ones(10)), make_optimizer(net, recipe.optimizer, 0.01)
    took = []
    for _ in range(STEPS):
        started = time.perf_counter()
        train_step(net, images, labels, criterion, optimizer, autocast(precision, device))
        took.append(time.perf_counter() - started)
    return BATCH * training_macs("resnet20", (3, 32, 32)) / max(min(took) - FIXED, 1e-4)


@cache
def training_macs(net: str, image: tuple[int, int, int]) -> int:
    """Multiply-adds of training on one image: forward, and twice as many backward."""
    with torch.device("meta"):
        model = create(net, spec(net).classes, image[0])
    return 3 * cost(model, image, backward=False).macs


def seconds(recipe: Recipe, image: tuple[int, int, int], steps: int, device: str = "auto") -> float:
    """An estimate of how long a training takes."""
    return steps * (recipe.batch.size * training_macs(recipe.net.name, image) / rate(device) + FIXED)
