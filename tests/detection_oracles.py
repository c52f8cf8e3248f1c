"""Average precision by others: pycocotools, and VOC's rule written down once more in exact fractions."""

import contextlib
import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from reslearn.data.boxes.box_set import Objects
from reslearn.data.boxes.masks import runs_of

NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]


def pycocotools(truth: Sequence[Objects], found: Sequence[dict[str, Any]], classes: int, kind: str = "bbox") -> dict[str, float]:
    """The twelve numbers in percent, -100 where there is none."""
    return dict(zip(NAMES, (100 * evaluated(truth, found, classes, kind).stats).tolist(), strict=True))


def evaluated(truth: Sequence[Objects], found: Sequence[dict[str, Any]], classes: int, kind: str = "bbox") -> Any:
    """pycocotools' COCOeval, after all its steps.

    It knows no difficult objects; one with an area outside every range is ignored, which is what is meant.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for i, (objects, given) in enumerate(zip(truth, found, strict=True)):
        for g, (box, label, hard, crowd, area) in enumerate(
            zip(objects.boxes, objects.labels, objects.difficult, objects.crowd, objects.areas, strict=True)
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": int(label),
                    "bbox": xywh(box),
                    "area": 1e11 if hard else float(area),
                    "iscrowd": int(crowd),
                }
            )
            if kind == "segm":
                annotations[-1]["segmentation"] = runs((objects.segmentations or ())[g])
        for box, label, score in zip(given["boxes"], given["labels"], given["scores"], strict=True):
            results.append({"image_id": i + 1, "category_id": int(label), "bbox": xywh(box), "score": float(score)})
        if kind == "segm" and len(given["labels"]):
            for result, mask in zip(results[-len(given["labels"]) :], given["masks"], strict=True):
                del result["bbox"]
                result["segmentation"] = runs(runs_of(np.asarray(mask)))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i + 1, "height": 1, "width": 1} for i in range(len(truth))],
            "categories": [{"id": k + 1} for k in range(classes)],
            "annotations": annotations,
        }
        coco.createIndex()
        theirs = coco.loadRes(results) if results else COCO()
        if not results:
            theirs.dataset = {**coco.dataset, "annotations": []}
            theirs.createIndex()
        run = COCOeval(coco, theirs, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def runs(segmentation: Any) -> dict[str, Any]:
    """Our runs as theirs."""
    from pycocotools import mask

    size = [segmentation.height, segmentation.width]
    return mask.frPyObjects({"size": size, "counts": segmentation.counts.tolist()}, *size)


def xywh(box: Any) -> list[float]:
    x1, y1, x2, y2 = (float(number) for number in box)
    return [x1, y1, x2 - x1, y2 - y1]


def voc(truth: Sequence[Objects], found: Sequence[dict[str, Any]], label: int, limit: float = 0.5) -> tuple[float, float] | None:
    """(AP of VOC07, of VOC10) in percent of one class, from boxes in whole pixels; None without objects."""
    ranked = sorted(
        (-float(score), i, k)
        for i, given in enumerate(found)
        for k, score in enumerate(given["scores"])
        if given["labels"][k] == label
    )
    positives = sum(1 for o in truth for k, hard in zip(o.labels, o.difficult | o.crowd, strict=True) if k == label and not hard)
    if not positives:
        return None
    used: set[tuple[int, int]] = set()
    right = wrong = 0
    curve = []
    for _, i, k in ranked:
        objects = truth[i]
        best, whom = Fraction(-1), -1
        for g in range(len(objects)):
            if objects.labels[g] == label and (iou := exact_iou(found[i]["boxes"][k], objects.boxes[g])) > best:
                best, whom = iou, g
        if whom >= 0 and best >= Fraction(limit):
            if objects.difficult[whom] or objects.crowd[whom]:
                continue
            right, wrong = (right, wrong + 1) if (i, whom) in used else (right + 1, wrong)
            used.add((i, whom))
        else:
            wrong += 1
        curve.append((Fraction(right, positives), Fraction(right, right + wrong)))
    above = lambda recall: max((p for r, p in curve if r >= recall), default=Fraction(0))  # noqa: E731
    eleven = sum(above(Fraction(j, 10)) for j in range(11)) / 11
    area = sum(above(Fraction(n, positives)) for n in range(1, positives + 1)) / positives
    return 100 * float(eleven), 100 * float(area)


def exact_iou(one: Any, other: Any) -> Fraction:
    (a, b, c, d), (e, f, g, h) = ([Fraction(float(number)) for number in box] for box in (one, other))
    width, height = min(c, g) - max(a, e), min(d, h) - max(b, f)
    shared = width * height if width > 0 and height > 0 else Fraction(0)
    return shared / ((c - a) * (d - b) + (g - e) * (h - f) - shared)


def scene(
    numbers: np.random.Generator,
    images: int = 6,
    classes: int = 3,
    *,
    side: int = 200,
    crowds: float = 0.0,
    hard: float = 0.0,
    ties: bool = False,
    most: int = 12,
    false: int = 8,
    empty: float = 0.2,
) -> tuple[list[Objects], list[dict[str, Any]]]:
    """Random images: objects of all sizes in whole pixels, detections near them, some twice or of another class, and off them."""
    truth, found = [], []
    for _ in range(images):
        n = 0 if numbers.random() < empty else int(numbers.integers(1, most))
        corner = numbers.integers(0, side // 2, (n, 2))
        boxes = np.concatenate([corner, corner + numbers.integers(4, side // 2, (n, 2))], axis=1)
        labels = numbers.integers(1, classes + 1, n)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) * numbers.uniform(0.5, 1, n)
        truth.append(Objects.of(boxes, labels, areas=areas, crowd=numbers.random(n) < crowds, difficult=numbers.random(n) < hard))
        again = numbers.integers(0, n, int(1.5 * n)) if n else np.zeros(0, int)
        jitter = numbers.integers(-6, 7, (len(again), 4)) * (numbers.random((len(again), 1)) < 0.8)
        start = numbers.integers(0, side // 2, (int(numbers.integers(0, false + 1)), 2))
        near, off = boxes[again] + jitter, np.concatenate([start, start + numbers.integers(2, side // 2, start.shape)], axis=1)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        kinds = np.where(numbers.random(len(again)) < 0.8, labels[again], numbers.integers(1, classes + 1, len(again)))
        given = np.concatenate([near, off])
        scores = numbers.random(len(given))
        found.append(
            {
                "boxes": given,
                "labels": np.concatenate([kinds, numbers.integers(1, classes + 1, len(off))]),
                "scores": np.round(scores, 1) if ties else scores,
            }
        )
    return truth, found
