"""Estimates of training time on this machine from one short measurement."""

import time
from functools import cache

import torch

from reslearn.data.sets import DataSet
from reslearn.nets import create, spec
from reslearn.nets.cost import cost
from reslearn.training.recipe import Recipe
from reslearn.training.request import parse
from reslearn.training.run import make_state, prepare
from reslearn.training.stepper import make_stepper

STEPS, BATCH = 8, 128
IMAGES = 45_000  # assumed for a data set without a train split
FIXED = 0.005  # seconds per step that do not depend on the network


@cache
def rate(device: str = "auto") -> float:
    """Multiply-adds per second of ResNet-20's training step on this machine."""
    settings = {"batch.size": BATCH, "schedule.steps": STEPS}
    job = prepare(parse("fashion-sample", "default", model="resnet20", settings=settings, device=device, quiet=True))
    state = make_state(job)
    state.model.train()
    stepper, times = make_stepper(job, state), []
    for step in range(STEPS):
        batch = stepper.prepare(step)
        start = time.perf_counter()
        stepper(batch)
        stepper.collect()  # waits for the device
        times.append(time.perf_counter() - start)
    return BATCH * training_macs("resnet20", (job.data.channels, *job.data.sizes)) / max(min(times) - FIXED, 1e-4)


@cache
def training_macs(net: str, image: tuple[int, ...]) -> int:
    """Multiply-adds of training on one image (C, H, W): the forward pass, and twice as many for the backward pass."""
    channels, height, width = image
    with torch.device("meta"):
        model = create(net, spec(net).classes, channels)
    return 3 * cost(model, (channels, height, width), backward=False).macs


def seconds(recipe: Recipe, data: DataSet, device: str = "auto") -> float:
    """The estimated time of a training."""
    images = len(data.splits["train"]) if "train" in data.splits else IMAGES
    per_step = recipe.batch.size * training_macs(recipe.net.name, (data.channels, *data.sizes)) / rate(device) + FIXED
    return recipe.schedule.total(images, recipe.batch.size) * per_step
