"""Training, sync BN and evaluation on one or several ranks: `torchrun --nproc-per-node 2 ranked.py OUT` writes OUT.0 and OUT.1."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reslearn import create
from reslearn.classify import validation
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.classify.sync_bn import synchronized
from reslearn.classify.task import ImageExamples
from reslearn.data.sampling import checksum
from reslearn.training import ranks, runtime
from reslearn.training.recipe import validate
from reslearn.training.stepper import make_stepper, pick
from training_jobs import CPU, make_job, make_state, resident

STEPS, SIZE = 10, 32
# With BN, rounding errors grow a hundredfold in these steps at lr 0.01.
RESNET = {"net": {"name": "resnet8"}, "schedule": {"steps": STEPS, "lr": 0.001}}
CASES: dict[str, dict[str, Any]] = {
    "no BN": {"net": {"name": "highway-19"}},
    "no BN, micro-batches": {"net": {"name": "highway-19"}, "batch": {"size": SIZE, "micro": 8}},
    "synchronized BN": RESNET | {"batch": {"size": SIZE, "sync_bn": True}},
    "synchronized BN, recomputed": RESNET | {"batch": {"size": SIZE, "sync_bn": True}, "recompute": True},
    "BN of micro-batches": RESNET | {"batch": {"size": SIZE, "micro": 16}, "execution": "fused"},
    "stochastic depth": RESNET | {"net": {"name": "resnet8", "last_survival": 0.3}, "batch": {"size": SIZE, "sync_bn": True}},
}


def train(changes: dict[str, Any]) -> dict[str, Any]:
    """Losses, hashes of the images that this rank trained on, and the final state."""
    values = {"data": {"pad": 2}, "batch": {"size": SIZE}, "schedule": {"steps": STEPS, "lr": 0.01}, "ema": 0.9}
    recipe = validate(values | {"precision": "fp32", "execution": "eager"} | changes, ClassifyRecipe)
    job = make_job(recipe, resident(), execution=pick(recipe, CPU, resident=True)[0])
    torch.manual_seed(0)
    model = create(recipe.net.name, 4, **recipe.net.options())
    model.recompute = recipe.recompute  # type: ignore[assignment]
    model = synchronized(model, CPU) if recipe.batch.sync_bn else model
    state = make_state(job, model.to(memory_format=torch.channels_last))
    stepper = make_stepper(job, state)
    losses, seen, stream, before = [], [], 0, 0.0
    for step in range(STEPS):
        runtime.seed_step(recipe.seed, step, ranks.seed_rank(model))
        batch, own = stepper.prepare(step), ranks.own(SIZE)
        assert isinstance(batch.examples, ImageExamples)
        seen.append([hashlib.sha256(image.numpy().tobytes()).hexdigest()[:8] for image in batch.examples.images.contiguous()])
        stream += checksum(step * SIZE + own.start, batch.epochs[own], batch.indices[own])
        stepper(batch)
        losses.append((state.progress.loss - before) / SIZE)
        before, state.progress.step = state.progress.loss, step + 1
    whole = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in state.model.state_dict().items()}
    average = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in state.evaluated.state_dict().items()}
    stream = int(ranks.total(torch.tensor(stream))) % 2**32
    return {"losses": losses, "seen": seen, "stream": stream, "state": [whole, average], "wrong": state.progress.wrong}


def normalize() -> dict[str, Any]:
    """Outputs, gradients and statistics of a BN layer on this rank's share of a batch with a large mean."""
    torch.manual_seed(1)
    shift = torch.tensor([0.0, 10, -100])[:, None, None]
    x, wanted = (torch.randn(12, 3, 5, 5, dtype=torch.float64) * 2 + shift for _ in range(2))
    layer = synchronized(nn.Sequential(nn.BatchNorm2d(3, dtype=torch.float64)), CPU)
    own = ranks.own(12)
    x = x[own].clone().requires_grad_()
    y = layer(x)
    ((y - wanted[own]) ** 2).sum().backward()
    assert x.grad is not None
    gradients = [ranks.total(p.grad.clone()).tolist() for p in layer.parameters() if p.grad is not None]
    statistics = {name: buffer.tolist() for name, buffer in layer.named_buffers()}
    return {"y": y.tolist(), "x": x.grad.tolist(), "gradients": gradients, "statistics": statistics}


def evaluate(images: int, batch: int) -> dict[str, Any]:
    """Hashes of the logits of a split that the ranks share; the second image is unreadable."""
    torch.manual_seed(2)
    split, model, calls = resident(images), create("resnet8", 4), []
    if validation.Shard(split, batch).indices[1:2].tolist() == [1]:
        split.holes, split.bad = {1}, {"1": "broken"}
    seen = validation.single_view(model, split, batch=batch, progress=calls.append)
    digests = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:8] for row in seen.logits]
    found = {"logits": digests, "labels": seen.labels.tolist(), "indices": seen.indices.tolist()}
    return found | {"bad": split.bad, "holes": sorted(split.holes), "calls": calls}


def everything() -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    found = {name: train(changes) for name, changes in CASES.items()}
    agreed = [ranks.agree(7 * ranks.rank()), ranks.by_first(lambda: 5 + ranks.rank()), ranks.gather(ranks.rank())]
    sizes = {"103 by 25": evaluate(103, 25), "10 by 25": evaluate(10, 25)}
    return {"train": found, "bn": normalize(), "agreed": agreed, "evaluate": sizes}


if __name__ == "__main__":
    with ranks.joined("cpu"):
        Path(f"{sys.argv[1]}.{ranks.rank()}").write_text(json.dumps(everything()))
