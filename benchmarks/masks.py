"""Trains a Mask R-CNN on two CPU cores on clothes pasted onto photos (tests/pasting.py); reports mask AP and saves a figure.

    reslearn train cifar10 --model resnet18 --recipe cifar10-fast --set schedule.steps=2000 --out backbone
    python benchmarks/masks.py FOLDER-OF-PHOTOS --init backbone --work masks

Photos are read from class folders, FOLDER/*/*.jpg. Train, val and test share neither clothes nor photos. With --work, an
interrupted run is resumed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from reslearn import resume, train
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.read import open_boxes
from reslearn.data.boxes.source import to_tensor
from reslearn.detect import detect, load_detector

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import pasting

IMAGES = {"train": 400, "val": 24, "test": 100}
SIDE = 128  # px
SETTINGS = [
    "detector.masks=true",
    "detector.batch_norm=live",
    "detector.regions=16",
    "detector.anchors=[32,48,72]",
    "detector.min_size=128",
    "detector.max_size=128",
    "detector.ranked=[500,300]",
    "detector.proposals=[300,60]",
    "detector.detections=20",
    "batch.size=2",
    "schedule.steps=800",
    "schedule.lr=0.03",
    "schedule.shape=cosine",
    "schedule.warmup=0.05",
    "data.workers=1",
    "log.every=25",
    "evaluate.every=200",
]
COLORS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
SHOWN, MIN_SCORE = 15, 0.5  # test images in the figure; minimum score of the detections shown


def fit(data: Path, folder: Path, init: Path | None) -> dict[str, Any]:
    """Trains in a folder, or resumes its run. Returns the result, with the CPU seconds of all processes."""
    file, started = folder.with_name("cpu_seconds"), time.process_time()
    earlier = float(file.read_text()) if file.exists() else 0.0
    try:
        source = {"model": "resnet18"} if init is None else {"init": init}
        run = resume(folder) if folder.exists() else train(data, settings=SETTINGS, out=folder, task="detect", **source)
    finally:
        file.write_text(str(earlier + time.process_time() - started))
    return {**run.result, "cpu_seconds": round(float(file.read_text()))}


def picture(split: BoxSet, model: Path, file: Path, dpi: int = 100) -> None:
    """Draws the first images of a split with the masks, boxes, classes and scores of confident detections."""
    detector = load_detector(model).eval()
    figure, axes = plt.subplots(3, SHOWN // 3, figsize=(15, 9.3), layout="constrained")
    for axis, image in zip(axes.flat, split.images[:SHOWN], strict=True):
        shown = to_tensor(image.pixels())
        with torch.no_grad():
            (detections,) = detect(detector, [shown])
        axis.imshow(shown.permute(1, 2, 0), interpolation="bicubic", extent=(0, image.width, image.height, 0))
        axis.axis("off")
        columns = (detections[key].cpu() for key in ("boxes", "labels", "scores", "masks"))
        for box, label, score, mask in zip(*columns, strict=True):
            if score < MIN_SCORE:
                continue
            color = COLORS[int(label) - 1]
            layer = np.zeros((image.height, image.width, 4))
            layer[mask[0] > 0.5] = (*color, 0.5)
            axis.imshow(layer, interpolation="nearest", extent=(0, image.width, image.height, 0))
            x1, y1, x2, y2 = box.tolist()
            axis.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.5))
            text = f"{split.classes[int(label) - 1]} {100 * float(score):.0f}%"
            axis.text(
                x1 + 1, max(y1, 6), text, fontsize=8, color="white", va="bottom", backgroundcolor=(*color, 0.9)
            ).get_bbox_patch().set_boxstyle("square,pad=0.15")
    figure.savefig(file, dpi=dpi, pil_kwargs={"quality": 85})
    plt.close(figure)


def short(numbers: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a split that are saved."""
    keys = ("n", "objects", "AP", "AP50", "AP75", "intervals", "per_class")
    return {key: numbers[key] for key in keys} | ({"masks": short(numbers["masks"])} if "masks" in numbers else {})


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 2) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--init", type=Path, help="ResNet-18 classifier for the backbone [default: from scratch]")
    parser.add_argument("--work", type=Path, help="folder for the data set and the run [default: a temporary folder]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/masks.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/masks.jpg"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        data = work / "set"
        if not data.exists():
            photos = sorted(options.photos.glob("*/*.jpg"))
            if len(photos) < 4:
                sys.exit(f"{options.photos}: {len(photos)} photos in class folders; at least 4 are needed")
            pasting.paste(data, photos, IMAGES, side=SIDE)
        result = fit(data, work / "run", options.init)
        facts = json.loads((work / "run" / "recipe.json").read_text())
        record = {
            "command": f"python benchmarks/masks.py FOLDER-OF-PHOTOS{' --init backbone' if options.init else ''}",
            "settings": SETTINGS,
            "images": IMAGES,
            "training_objects": facts["data"]["objects"],
            "machine": {key: facts["machine"][key] for key in ("device", "precision", "torch") if key in facts["machine"]},
            "threads": torch.get_num_threads(),
            "seconds": result["seconds"],
            "cpu_seconds": result["cpu_seconds"],
            "test": short(result["last"]["test"]),
            "val": short(result["last"]["val"]),
        }
        options.out.write_text(json.dumps(rounded(record), indent=1) + "\n")
        picture(open_boxes(data)["test"], work / "run" / "model.safetensors", options.picture)
    test = record["test"]
    print(f"test: boxes AP50 {test['AP50']:.1f}, masks AP50 {test['masks']['AP50']:.1f}, AP {test['masks']['AP']:.1f}")


if __name__ == "__main__":
    main()
