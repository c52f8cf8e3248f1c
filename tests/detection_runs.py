"""Run folders of detectors as training leaves them: real photos or drawn ones, detections that err like a detector's."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.boxes.box_set import BoxImage, BoxSet, Objects
from reslearn.detect.gallery import save_gallery
from reslearn.evaluation.average_precision import detection_metrics
from reslearn.evaluation.detection_review import review
from reslearn.evaluation.matching import Matches, match

PARTS = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")


def detections(image: BoxImage, numbers: np.random.Generator, classes: int, skill: float = 1.0) -> dict[str, np.ndarray]:
    """What a detector of a middling `skill` would find: most objects, some twice, some of another class, some out of nothing."""
    boxes, labels, scores = [], [], []
    for box, label in zip(image.objects.boxes, image.objects.labels, strict=True):
        side = np.sqrt((box[2:] - box[:2]).prod())
        if numbers.random() < 0.1 / skill:
            continue
        for again in range(1 + (numbers.random() < 0.1 / skill)):
            shift = numbers.normal(0, 0.06 / skill * side, 4)
            boxes.append(box + shift)
            labels.append(label if numbers.random() > 0.04 / skill else numbers.integers(1, classes + 1))
            error = np.abs(shift).sum() / side
            scores.append(np.clip(1.02 - error - 0.4 * again - abs(numbers.normal(0, 0.1)), 0.05, 0.999))
    for _ in range(numbers.poisson(3 / skill)):
        corner, size = numbers.random(2) * [image.width, image.height] * 0.8, numbers.uniform(10, 100, 2)
        boxes.append([*corner, *(corner + size)])
        labels.append(numbers.integers(1, classes + 1))
        scores.append(0.05 + 0.75 * numbers.random() ** 3)
    found = np.clip(np.array(boxes).reshape(-1, 4), 0, [image.width, image.height] * 2)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    return {"boxes": found, "labels": np.array(labels, np.int64), "scores": np.array(scores)}


def drawn_set(folder: Path, count: int = 12) -> BoxSet:
    """Gray images with dark rectangles, and the rectangles as objects of two classes."""
    from PIL import Image

    numbers, images = np.random.default_rng(0), []
    for i in range(count):
        pixels = np.full((160, 240, 3), 210, np.uint8)
        corners = numbers.integers(0, [150, 90], (5, 2))
        boxes = np.concatenate([corners, corners + numbers.integers(12, 70, (5, 2))], axis=1)
        for x1, y1, x2, y2 in boxes:
            pixels[y1:y2, x1:x2] = numbers.integers(40, 120, 3)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append(BoxImage(folder / f"{i}.png", f"{i}", 160, 240, Objects.of(boxes, 1 + np.arange(5) % 2)))
    return BoxSet("drawn/test", ("cell", "plate"), tuple(images))


def measured(images: BoxSet, skill: float, seed: int) -> tuple[Matches, dict[str, Any]]:
    numbers = np.random.default_rng(seed)
    found = [detections(image, numbers, len(images.classes), skill) for image in images.images]
    matches = match([image.objects for image in images.images], found, images.classes)
    return matches, {
        **detection_metrics(matches, resamples=100),
        "review": review(matches, [image.name for image in images.images]),
    }


def build(
    folder: Path, val: BoxSet, test: BoxSet, *, name: str = "cells", net: str = "resnet18", skill: float = 1.0, steps: int = 600
) -> Path:
    """A whole, finished run folder."""
    folder.mkdir(parents=True)
    setup = {
        "task": "detect",
        "recipe": {
            "name": name,
            "seed": 0,
            "net": {"name": net},
            "detector": {"kind": "c4", "min_size": 240},
            "batch": {"size": 4},
        },
        "command": f"reslearn detect train bccd --model {net}",
        "source": "bccd",
        "data": {
            "name": "bccd",
            "classes": list(test.classes),
            "fingerprint": "sha256:beef",
            "n": {"train": 205, "val": len(val), "test": len(test)},
            "faults": {"no area": 2},
        },
        "machine": {"device": "cpu", "processor": "Abacus 9000", "threads": 2, "precision": "fp32"},
        "versions": {"reslearn": "0.1", "torch": "2.15"},
        "chose": ["size 240: the median box is 102 px of 480"],
    }
    numbers, lines = np.random.default_rng(3), []
    for step in range(10, steps + 1, 10):
        epoch = step / 50
        losses = {part: (0.8 - 0.15 * i) * float(np.exp(-step / 300 / skill)) + 0.1 for i, part in enumerate(PARTS)}
        noisy = {part: value * float(numbers.uniform(0.8, 1.2)) for part, value in losses.items()}
        lr = 0.02 * min(1, step / 100) * (1 if step < 0.8 * steps else 0.1)
        line = {"event": "train", "step": step, "epoch": epoch, "lr": lr, "loss": sum(noisy.values()), "losses": noisy}
        lines.append(line | {"grad_norm": 1.5, "time": step * 0.3})
        if step % 50 == 0:
            ap = 50 * skill * (1 - float(np.exp(-step / 250)))
            line = {"event": "eval", "split": "val", "step": step, "epoch": epoch, "loss": 1.1 * sum(losses.values())}
            lines.append(line | {"losses": losses, "AP": ap, "AP50": 1.7 * ap, "AP75": 0.9 * ap, "time": step * 0.3})
    _, on_val = measured(val, skill, 1)
    matches, on_test = measured(test, skill, 2)
    result = {
        "step": steps, "epochs": steps / 50, "seconds": 250.0, "images_per_s": 9.6,
        "peak_memory_mb": 1800, "parameters": 15_000_000,
        "last": {"step": steps, "val": on_val, "test": on_test},
        "best": {"step": steps - 50, "val": on_val, "test": on_test},
        "gallery": save_gallery(folder, test.images, matches),
        "gallery_split": "test",
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(setup))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps(result, allow_nan=False))
    return folder
