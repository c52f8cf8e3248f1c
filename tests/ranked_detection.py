"""What one rank or several do with detectors: `torchrun --nproc-per-node 2 ranked_detection.py SET OUT` writes OUT.0 and OUT.1."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from detect.small import detector
from reslearn.data.boxes.read import open_boxes
from reslearn.data.boxes.source import BoxSource
from reslearn.detect.alternating import Alternating
from reslearn.detect.recipes import DetectRecipe
from reslearn.detect.task import DETECT
from reslearn.detect.validation import validate_split
from reslearn.evaluation.average_precision import coco
from reslearn.training import ranks, runtime
from reslearn.training.recipe import validate
from reslearn.training.stepper import make_stepper
from training_jobs import make_job, make_state

STEPS, SIZE = 6, 4
# Every anchor and every region is learned from, so that nothing is drawn. Losses are means over the regions of a micro-batch, and
# BN normalizes by it: one rank takes as many images at once as each of two.
WHOLE = {"classes": ["disc", "square"], "regions": 512, "batch_norm": "frozen", "proposals": (60, 24)}
CASES: dict[str, dict[str, Any]] = {
    "C4": {},
    "single images": {"batch": {"size": SIZE, "micro": 1}},
    "FPN": {"kind": "fpn"},
    "live BN": {"batch_norm": "live"},
    "in turns": {"alternate": (1, 1, 1, 1)},
    "in turns, live BN": {"alternate": (1, 1, 1, 1), "batch_norm": "live"},
}


def train(data: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses of every step, and the state at the end, hashed."""
    options = {key: value for key, value in changes.items() if key in ("kind", "batch_norm")}
    model = detector(**{**WHOLE, **options}).train()  # type: ignore[arg-type]
    model.rpn.fg_bg_sampler.batch_size_per_image = 1_000_000  # type: ignore[union-attr]
    values = {
        "net": {"name": "resnet8"},
        "batch": {"size": SIZE, "micro": SIZE // 2},
        "schedule": {"steps": STEPS, "lr": 0.001},
        "precision": "fp32",
    }
    values |= {"detector": model.settings.model_dump()} | {key: changes[key] for key in changes if key not in options}
    recipe = validate(values, DetectRecipe)
    job = make_job(recipe, BoxSource(open_boxes(data)["train"], flip="horizontal"), DETECT)
    state = make_state(job, model if recipe.alternate is None else Alternating(model))
    stepper, found, digests = make_stepper(job, state), [], []
    for step in range(STEPS):
        runtime.seed_step(recipe.seed, step, ranks.seed_rank(model))
        before = dict(state.progress.losses)
        stepper(stepper.prepare(step))
        found.append({name: (sum_ - before.get(name, 0.0)) / SIZE for name, sum_ in state.progress.losses.items()})
        state.progress.step = step + 1
        saved = state.to_checkpoint()
        digests.append({name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in (saved.model | saved.state).items()})
        if step + 1 == state.phases[state.phase - 1].end < STEPS:
            state.enter(state.phase + 1)
            stepper.restart()
    return {"losses": found, "states": digests, "grad_norm": stepper.grad_norm}


def look(data: str, masks: bool) -> dict[str, Any]:
    """AP and losses on images of which each rank sees some: five, an odd number."""
    split, calls = open_boxes(data)["test"], list[int]()
    model = detector(classes=split.classes, masks=masks)  # type: ignore[arg-type]
    seen = validate_split(model, BoxSource(split, masks=masks), "fp32", 0, calls.append)
    scores = [found.scores.tolist() for found in seen.boxes.detections]
    return {
        "AP": coco(seen.boxes),
        "masks": seen.masks and coco(seen.masks),
        "losses": seen.losses,
        "scores": scores,
        "calls": calls,
    }


def everything(boxes: str, outlined: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    trained = {name: train(boxes, changes) for name, changes in CASES.items()}
    return {"train": trained, "boxes": look(boxes, False), "masks": look(outlined, True)}


if __name__ == "__main__":
    with ranks.joined("cpu"):
        Path(f"{sys.argv[3]}.{ranks.rank()}").write_text(json.dumps(everything(sys.argv[1], sys.argv[2])))
