"""A task of another package: predict the brightness of an image. Its data set is a .npy file, float32 (N, 3, H, W)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.data.augment import Draws
from reslearn.data.preprocess import Preprocessing
from reslearn.nets import create
from reslearn.training.recipe import Chosen, Recipe
from reslearn.training.task import Evaluation, Job, Losses, Sources, Task


def quick(data: Any, net: str | None) -> Chosen:
    """Eight steps. That is enough."""
    values = {"name": "brightness-quick", "net": {"name": net or "resnet8"}, "batch": {"size": 8}, "schedule": {"steps": 8}}
    return Chosen(values, {})


NAMED = {"brightness-quick": quick}


@dataclass(frozen=True)
class Images:
    """A data set, a split of it, or the examples of a step."""

    images: Tensor
    name: str = "images"
    classes: tuple[str, ...] = ("brightness",)
    has_val = False

    @property
    def names(self) -> list[str]:
        return [f"{i}" for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.images)

    def split(self, size: int) -> "list[Images]":
        return [Images(part) for part in self.images.split(size)]

    def squared_error(self, model: nn.Module) -> Tensor:
        return F.mse_loss(model(self.images)[:, 0], self.images.mean((1, 2, 3)))


class Brightness(Task[Recipe, Images, Images]):
    name = "brightness"
    recipe = Recipe
    named = NAMED

    def open(self, source, given):
        return Images(torch.from_numpy(np.load(source)), Path(source).stem)

    def usual(self, data):
        return "brightness-quick"

    def choose(self, name, data, net, given):
        return self.named[name](data, net)

    def check(self, recipe, data, given):
        pass

    def sources(self, data, recipe, device, display, view):
        plain = Preprocessing(channels=3, size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
        return Sources(Images(data.images[8:]), Images(data.images[:8]), None, plain)

    def identity(self, data):
        return {"fingerprint": hashlib.sha256(data.images.numpy().tobytes()).hexdigest()}

    def describe(self, data, sources):
        return {"name": data.name, "classes": data.classes, "n": {key: len(one) for key, one in sources.named().items()}}

    def introduce(self, job):
        return [f"data     {job.data.name}"]

    def model(self, job, *, fresh):
        torch.manual_seed(job.recipe.seed)
        return create(job.recipe.net.name, 2)  # the second output is not used

    def loss(self, job):
        return lambda model, examples: Losses({"squared_error": examples.squared_error(model)})

    def examples(self, job: Job, draws: Draws):
        return Images(job.sources.train.images[draws.indices])

    def evaluate(self, job, model, source, options):
        with torch.no_grad():
            loss = source.squared_error(model.eval()).item()
        model.train()
        return Evaluation(100 * loss, {"loss": loss, "n": len(source)}, f"squared error {loss:.4f}")

    def measures(self, numbers):
        return {"squared error": (100 * numbers["loss"], None)}

    def save(self, job, model, path, numbers):
        return path.write_text(json.dumps({name: tensor.tolist() for name, tensor in model.state_dict().items()}))

    def finish(self, job, model, split, details):
        return {"shown": split}


BRIGHTNESS = Brightness()
