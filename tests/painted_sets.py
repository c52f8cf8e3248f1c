"""Easy sets for localization: noise with one colored box in each image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reslearn import api
from reslearn.training.run import Run

TINY: dict[str, Any] = {
    "net.name": "resnet8",
    "data.size": 32,
    "data.jitter": [32, 48],
    "data.val": 0,
    "batch.size": 8,
    "schedule.epochs": 12,
    "schedule.lr": 0.03,
    "schedule.warmup": 0.1,
    "checkpoint.every": 4,
    "log.every": 1,
}
COLORS = {"disc": (220, 60, 40), "square": (40, 80, 220)}


def write_set(root: Path, counts: dict[str, int]) -> Path:
    """A COCO folder of noise with one red or blue box in each image, of random place and shape."""
    numbers = np.random.default_rng(0)
    for split, count in counts.items():
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            kind = i % 2
            pixels = numbers.integers(90, 150, (40, 52, 3)).astype(np.uint8)
            w, h = numbers.integers(14, 26, 2).tolist()
            x, y = int(numbers.integers(0, 52 - w)), int(numbers.integers(0, 40 - h))
            pixels[y : y + h, x : x + w] = [*COLORS.values()][kind]
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{i}.png", "height": 40, "width": 52})
            annotations.append({"id": i + 1, "image_id": i + 1, "category_id": kind + 1, "bbox": [x, y, w, h]})
        kinds = [{"id": i, "name": name} for i, name in enumerate(COLORS, 1)]
        document = {"images": images, "annotations": annotations, "categories": kinds}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root


def train(data: Path, out: Path, settings: dict[str, Any] | None = None, recipe: str | None = None, **options: Any) -> Run:
    """A run of a localizer, by default with the settings TINY."""
    settings = TINY if settings is None else settings
    return api.train(data, recipe, task="localize", settings=settings, out=out, device="cpu", quiet=True, **options)


def in_python(data: Path, out: Path, settings: dict[str, Any] | None = None, recipe: str | None = None, **options: Any) -> str:
    """Code that does the same as train, in a process of its own."""
    settings = TINY if settings is None else settings
    given = {"task": "localize", "settings": settings, "out": str(out), "device": "cpu", "quiet": True, **options}
    return f"from reslearn import api; api.train({str(data)!r}, {recipe!r}, **{given!r})"


def lines(folder: Path) -> list[dict[str, Any]]:
    """A run's metrics without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]
