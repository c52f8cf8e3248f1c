"""Review of a detector for its report: precision-recall curves, AP by class and size, score thresholds, worst mistakes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reslearn.data.boxes.box_set import box_areas
from reslearn.evaluation.average_precision import class_ap, class_curves
from reslearn.evaluation.detection_errors import Mistake, count_mistakes, mistakes
from reslearn.evaluation.matching import ALL_IOUS, AREAS, COLUMNS, IOUS, Matches

CURVES = (0, 5)  # indices into IOUS: 0.5 and 0.75


class Threshold(NamedTuple):
    """The score threshold of a class with the highest F1 at IoU 0.5, with precision, recall and F1 there, in 0..1."""

    score: float
    precision: float
    recall: float
    f1: float


def review(matches: Matches, names: Sequence[str], *, limit: int = 12) -> dict[str, Any]:
    """Returns a JSON-compatible dict. Percentages, except scores and IoU in 0..1 and boxes in pixels. names: of the images.

    - `curves`: `[{"class", "iou", "precision": [101]}]` at recalls of 0, 1, ..., 100%, without classes that have no objects;
    - `by_size`: `[{"class", "all", "small", "medium", "large", "objects": {size: n}}]`, AP over all IoUs in COCO's area ranges,
      None without objects;
    - `thresholds`: `[{"class", "score", "precision", "recall", "f1"}]`, None for a class without true positives;
    - `mistakes`: `{"all": {kind: n}, "kept": {kind: n}}`, of all detections and of those above the thresholds;
    - `worst`: the result of `worst_mistakes`.
    """
    cuts = thresholds(matches)
    curves = 100 * class_curves(matches, ious=CURVES)
    sizes = {area: 100 * class_ap(matches, "coco", ious=ALL_IOUS, area=area)[0].mean(axis=0) for area in AREAS}
    objects = matches.positives.sum(axis=0)
    return {
        "curves": [
            {"class": label, "iou": float(IOUS[t]), "precision": np.round(curves[k, j], 3).tolist()}
            for k, label in enumerate(matches.classes)
            for j, t in enumerate(CURVES)
            if not np.isnan(curves[k, j, 0])
        ],
        "by_size": [
            {
                "class": label,
                **{area: None if np.isnan(values[k]) else float(values[k]) for area, values in sizes.items()},
                "objects": {area: int(objects[k, a]) for a, area in enumerate(AREAS)},
            }
            for k, label in enumerate(matches.classes)
        ],
        "thresholds": [
            {"class": label, "score": None, "precision": None, "recall": None, "f1": None}
            if cut is None
            else {"class": label, "score": cut.score} | {key: 100 * getattr(cut, key) for key in ("precision", "recall", "f1")}
            for label, cut in zip(matches.classes, cuts, strict=True)
        ],
        "mistakes": {"all": count_mistakes(mistakes(matches)), "kept": count_mistakes(mistakes(above(matches, cuts)))},
        "worst": [describe(mistake, matches, names) for mistake in worst_mistakes(matches, limit)],
    }


def thresholds(matches: Matches) -> list[Threshold | None]:
    """Per class, the highest score threshold with the best F1 (COCO's rule, IoU 0.5); None without true positives."""
    result: list[Threshold | None] = []
    for k in range(len(matches.classes)):
        indices = np.flatnonzero((matches.label == k + 1) & (matches.rank < 100) & ~matches.ignored[:, 0, 0])
        indices = indices[np.argsort(-matches.score[indices], kind="stable")]
        score, right = matches.score[indices], matches.hit[indices, 0, 0].cumsum()
        last = np.append(score[1:] < score[:-1], True)[: len(indices)]  # a threshold keeps all detections of equal score or none
        total = matches.positives[:, k, 0].sum()
        f1 = np.where(last, 2 * right / (np.arange(1, len(indices) + 1) + total), 0)
        if not len(indices) or not f1.max():
            result.append(None)
            continue
        i = int(f1.argmax())
        result.append(Threshold(float(score[i]), float(right[i] / (i + 1)), float(right[i] / total), float(f1[i])))
    return result


def above(matches: Matches, cuts: Sequence[Threshold | None]) -> Matches:
    """Drops detections below their class's threshold, and all detections of a class without a threshold.

    The others keep their matches, because detections are matched by descending score.
    """
    minimum = np.array([np.inf, *(np.inf if cut is None else cut.score for cut in cuts)])
    keep = matches.score >= minimum[matches.label]
    return replace(matches, **{name: getattr(matches, name)[keep] for name in COLUMNS})


def worst_mistakes(matches: Matches, limit: int = 12) -> list[Mistake]:
    """The `limit` highest-scoring false positives, then the `limit` largest missed objects, alternating between classes.

    Objects count as missed without a detection above the thresholds, because nearly every object has one below.
    """
    remaining = mistakes(above(matches, thresholds(matches)))
    false_positives = [mistake for mistake in remaining if mistake.detection is not None]
    turns: dict[int, int] = {}
    missed: list[tuple[int, float, Mistake]] = []
    for area, mistake in sorted(
        ((_area(mistake, matches), mistake) for mistake in remaining if mistake.detection is None), key=lambda pair: -pair[0]
    ):
        label = int(matches.truth[mistake.image].labels[mistake.object])
        turns[label] = turns.get(label, 0) + 1
        missed.append((turns[label], -area, mistake))
    return false_positives[:limit] + [mistake for *_, mistake in sorted(missed, key=lambda entry: entry[:2])[:limit]]


def _area(mistake: Mistake, matches: Matches) -> float:
    assert mistake.object is not None
    return float(box_areas(matches.truth[mistake.image].boxes[mistake.object, None])[0])


def describe(mistake: Mistake, matches: Matches, names: Sequence[str]) -> dict[str, Any]:
    """A mistake as a JSON-compatible dict; values that do not apply are None.

    `kind`; `name` of the image; detection: `label`, `score`, `box`; object: `truth` (its class), `object` (its box); `iou`.
    """
    objects, detections = matches.truth[mistake.image], matches.detections[mistake.image]
    row: dict[str, Any] = {"kind": mistake.kind, "name": names[mistake.image]}
    row |= {"label": None, "truth": None, "score": None, "iou": None, "box": None, "object": None}
    if mistake.detection is not None:
        box = [round(x, 2) for x in detections.boxes[mistake.detection].tolist()]
        row |= {"label": matches.classes[detections.labels[mistake.detection] - 1], "score": mistake.score, "box": box}
    if mistake.object is not None:
        box = [round(x, 2) for x in objects.boxes[mistake.object].tolist()]
        row |= {"truth": matches.classes[objects.labels[mistake.object] - 1], "object": box}
    if mistake.detection is not None and mistake.object is not None:
        row["iou"] = mistake.iou
    return row
