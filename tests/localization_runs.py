"""Run folders of localizers as `reslearn localize` leaves them: painted images, guesses that err like a localizer's."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from painted_sets import TINY, write_set
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.read import open_boxes
from reslearn.localize.evaluate import View, errors
from reslearn.localize.gallery import save_examples, save_gallery
from reslearn.localize.views import Single, of_one_kind


def guesses(truth: Single, classes: int, skill: float, seed: int) -> View:
    """What a localizer of a middling `skill` would find: most boxes near, some elsewhere; most classes right."""
    numbers, n = np.random.default_rng(seed), len(truth.labels)
    scores = numbers.normal(0, 1, (n, classes))
    scores[np.arange(n), truth.labels] += 2 * skill
    near = np.stack([boxes[0] + numbers.normal(0, 2.5 / skill, 4) for boxes in truth.boxes])
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 3)
    astray = numbers.random(n) < 0.15 / skill
    near[astray] = [0, 0, 8, 8]
    boxes = np.tile(np.array([5.0, 5, 20, 20]), (n, classes, 1))
    boxes[np.arange(n), truth.labels] = np.clip(near, 0, [52, 40, 52, 40])
    return View(np.argsort(-scores, axis=1), scores, boxes)


def measured(data: BoxSet, skill: float, stage: str) -> tuple[dict[str, Any], Single, dict[str, View]]:
    """Numbers as evaluate's, the truth, and what was found."""
    truth = of_one_kind(data)
    names = ("1-crop", "dense", "refined")[: 3 if stage == "regions" else 2]
    found = {name: guesses(truth, len(data.classes), skill * (1 + 0.3 * i), i) for i, name in enumerate(names)}
    numbers = {name: errors(view.order, view.boxes, truth, data.classes) for name, view in found.items()}
    return {"n": len(data), "scales": [37], "classes": list(data.classes), **numbers}, truth, found


def build(
    folder: Path, data: Path, *, stage: str = "proposals", skill: float = 1.0, seed: int = 0, classes: tuple[str, ...] = ()
) -> Path:
    """A whole, finished run folder on a painted set."""
    if not data.exists():
        write_set(data, {"train": 16, "val": 10, "test": 40})
    sets = open_boxes(data)
    if classes:
        sets = {name: BoxSet(each.name, classes, each.images) for name, each in sets.items()}
    folder.mkdir(parents=True)
    setup = {
        "task": "localize",
        "recipe": {
            "name": None,
            "seed": seed,
            "net": {"name": TINY["net.name"], "init": None},
            "stage": stage,
            "localizer": {"anchors": 9, "iou": [0.3, 0.5]},
            "data": {"size": TINY["data.size"], "jitter": TINY["data.jitter"]},
            "batch": {"size": TINY["batch.size"]},
            "schedule": {"epochs": TINY["schedule.epochs"], "lr": TINY["schedule.lr"]},
        },
        "command": "reslearn.train() in Python",
        "source": str(data),
        "data": {
            "name": data.name,
            "classes": list(sets["train"].classes),
            "n": {name: len(each) for name, each in sets.items()},
            "objects": sets["train"].counts(),
            "fingerprint": sets["train"].fingerprint(),
        },
        "machine": {"device": "cpu", "processor": "Abacus 9000"},
        "versions": {"reslearn": "0.1"},
        "chose": ["9 anchors: fitted to the boxes"],
    }
    (folder / "recipe.json").write_text(json.dumps(setup))
    lines = []
    for step in range(1, 97):
        parts = {"scores": float(np.exp(-step / 30)) + 0.1, "boxes": 0.3 * float(np.exp(-step / 40))}
        line = {"event": "train", "step": step, "epoch": step / 8, "lr": 0.03 * (1 - step / 97)}
        lines.append(line | {"loss": sum(parts.values()), "losses": parts, "grad_norm": 1.5, "time": step * 0.3})
        if step % 24 == 0:
            line = {"event": "eval", "split": "val", "step": step, "epoch": step / 8, "loss": 1.1 * sum(parts.values())}
            lines.append(line | {"losses": parts, "localization_error": 80 * float(np.exp(-step / 60 / skill))})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    val = measured(sets["val"], skill, stage)[0]
    test, truth, found = measured(sets["test"], skill, stage)
    result = {
        "step": 96, "epochs": 12.0, "seconds": 250.0, "images_per_s": 3.1, "peak_memory_mb": 900, "parameters": 1_234_567,
        "last": {"step": 96, "val": val, "test": test},
        "best": {"step": 96, "val": val, "test": test},
        **save_gallery(folder, sets["test"], truth, found),
        "gallery_split": "test",
    }  # fmt: skip
    save_examples(folder, ((image.pixels(), image.objects.boxes, ()) for image in sets["train"].images))
    (folder / "result.json").write_text(json.dumps(result, allow_nan=False))
    return folder
