"""Speed and agreement of COCO's twelve metrics from reslearn, pycocotools and faster-coco-eval on the same detections.

    python benchmarks/detection_ap.py --out benchmarks/results/detection_ap.json

Needs pycocotools; also measures faster-coco-eval if it is installed. Boxes and detections are random, about 10 objects and 30
detections per image. Each program starts from the same arrays in memory, which for the others includes building their dicts and
index. Rounds alternate; medians are printed.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.boxes.box_set import Objects
from reslearn.evaluation.average_precision import coco
from reslearn.evaluation.matching import match

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def random_scene(images: int, classes: int, seed: int) -> tuple[list[Objects], list[dict[str, np.ndarray]]]:
    """Objects and detections in images of 640 x 480 px; about half of the detections are near an object."""
    rng = np.random.default_rng(seed)
    truth, detections = [], []
    for _ in range(images):
        n = rng.integers(0, 21)
        corner, size = rng.uniform(0, 400, (n, 2)), rng.lognormal(4, 0.8, (n, 2)).clip(4, 400)
        truth.append(Objects.of(np.hstack([corner, corner + size]), rng.integers(1, classes + 1, n)))
        near = rng.integers(0, n, 15) if n else np.zeros(0, int)
        size = truth[-1].boxes[near, 2:] - truth[-1].boxes[near, :2]
        shifted = truth[-1].boxes[near] + rng.normal(0, 0.08, (len(near), 4)) * np.hstack([size, size])
        corner = rng.uniform(0, 400, (15, 2))
        boxes = np.vstack([shifted, np.hstack([corner, corner + rng.lognormal(4, 0.8, (15, 2)).clip(4, 400)])])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.concatenate([truth[-1].labels[near], rng.integers(1, classes + 1, 15)])
        detections.append({"boxes": boxes, "labels": labels, "scores": rng.uniform(0.05, 1, len(boxes))})
    return truth, detections


def ours(truth: list[Objects], detections: list[dict[str, np.ndarray]], classes: int) -> list[float | None]:
    return list(coco(match(truth, detections, [str(k) for k in range(classes)])).values())


def theirs(COCO: Any, Eval: Any) -> Callable[..., list[float | None]]:
    def run(truth: list[Objects], detections: list[dict[str, np.ndarray]], classes: int) -> list[float | None]:
        def rows(boxes: np.ndarray, labels: np.ndarray, image: int) -> list[dict[str, Any]]:
            corners = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
            ids = labels.tolist()
            return [{"image_id": image, "category_id": k, "bbox": box} for box, k in zip(corners, ids, strict=True)]

        annotations, results = [], []
        for i, (objects, image) in enumerate(zip(truth, detections, strict=True), 1):
            for row, area in zip(rows(objects.boxes, objects.labels, i), objects.areas.tolist(), strict=True):
                annotations.append(row | {"id": len(annotations) + 1, "area": area, "iscrowd": 0})
            for row, score in zip(rows(image["boxes"], image["labels"], i), image["scores"].tolist(), strict=True):
                results.append(row | {"score": score})
        with contextlib.redirect_stdout(io.StringIO()):
            dataset = COCO()
            dataset.dataset = {
                "info": {},
                "images": [{"id": i + 1, "height": 480, "width": 640} for i in range(len(truth))],
                "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
                "annotations": annotations,
            }
            dataset.createIndex()
            evaluation = Eval(dataset, dataset.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return [None if value == -1 else 100 * float(value) for value in evaluation.stats[:12]]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 80])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    programs = {"reslearn": ours, "pycocotools": theirs(COCO, COCOeval)}
    try:
        import faster_coco_eval
    except ImportError:
        print("faster-coco-eval is not installed: skipped")
    else:
        programs["faster-coco-eval"] = theirs(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
    results = []
    for classes in options.classes:
        truth, detections = random_scene(options.images, classes, seed=0)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        processor: dict[str, list[float]] = {name: [] for name in programs}
        metrics = {}
        for _ in range(options.rounds):
            for name, program in programs.items():
                started, cpu_started = time.perf_counter(), time.process_time()
                metrics[name] = program(truth, detections, classes)
                seconds[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - cpu_started)
        objects, count = sum(map(len, truth)), sum(len(image["labels"]) for image in detections)
        print(f"{options.images} images, {objects} objects, {count} detections, {classes} classes")
        reference = metrics["pycocotools"]
        for name in programs:
            difference = max(abs(a - b) for a, b in zip(metrics[name], reference, strict=True) if a is not None and b is not None)
            same = [a is None for a in metrics[name]] == [b is None for b in reference]
            row = {
                "classes": classes,
                "program": name,
                "cpu_seconds": statistics.median(processor[name]),
                "seconds": statistics.median(seconds[name]),
                "times_pycocotools": statistics.median(processor["pycocotools"]) / statistics.median(processor[name]),
                "largest_difference": difference,
                "same_without_a_number": same,
            }
            results.append(row)
            speed = f"{row['cpu_seconds']:6.2f} CPU-s  {row['times_pycocotools']:5.2f}x"
            print(f"  {name:<17} {speed}  largest difference {difference:.1e}")
    if options.out:
        facts = {"images": options.images, "rounds": options.rounds, "machine": platform.machine()}
        facts |= {"python": platform.python_version(), "numpy": np.__version__, "names": NAMES, "results": results}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
