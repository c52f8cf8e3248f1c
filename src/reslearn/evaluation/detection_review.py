"""What a report shows of a detector: curves, AP by class and size, where to cut the scores, and its worst mistakes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reslearn.data.boxes.box_set import box_areas
from reslearn.evaluation.average_precision import class_ap, class_curves
from reslearn.evaluation.detection_errors import Mistake, count_mistakes, mistakes
from reslearn.evaluation.matching import AREAS, IOUS, Matches

CURVES = (0, 5)  # of IOUS: 0.5 and 0.75
_EVERY = tuple(range(len(IOUS)))


class Threshold(NamedTuple):
    """The score from which a class's detections have the highest F1 at IoU 0.5, and what they have there, in 0..1."""

    score: float
    precision: float
    recall: float
    f1: float


def review(matches: Matches, names: Sequence[str], *, most: int = 12) -> dict[str, Any]:
    """Ready for JSON; `names` are the images'. Percent, but for scores and IoU in 0..1 and boxes in pixels.

    `curves`, `[{"class", "iou", "precision": [101]}]` at recalls of 0, 1, ..., 100%, classes without objects left out;
    `by_size`, `[{"class", "all", "small", "medium", "large", "objects": {size: n}}]`, AP over all IoUs in COCO's ranges of area,
    None where there is no object; `thresholds`, `[{"class", "score", "precision", "recall", "f1"}]`, None for a class of which
    nothing is found; `mistakes`, `{"all": {kind: n}, "kept": {kind: n}}`, of all detections and of those from the thresholds on;
    `worst`, as `worst_mistakes` gives them.
    """
    cuts = thresholds(matches)
    curves = 100 * class_curves(matches, ious=CURVES)
    sizes = {area: 100 * class_ap(matches, "coco", ious=_EVERY, area=area)[0].mean(axis=0) for area in AREAS}
    objects = matches.positives.sum(axis=0)
    found = {"all": mistakes(matches), "kept": mistakes(above(matches, cuts))}
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
        "mistakes": {which: count_mistakes(some) for which, some in found.items()},
        "worst": [describe(mistake, matches, names) for mistake in worst_mistakes(matches, most)],
    }


def thresholds(matches: Matches) -> list[Threshold | None]:
    """By class, the highest of the scores from which F1 is highest (COCO's rule, IoU 0.5); None where no detection is right."""
    found: list[Threshold | None] = []
    for k in range(len(matches.classes)):
        these = np.flatnonzero((matches.label == k + 1) & (matches.rank < 100) & ~matches.ignored[:, 0, 0])
        these = these[np.argsort(-matches.score[these], kind="stable")]
        score, right = matches.score[these], matches.hit[these, 0, 0].cumsum()
        last = np.append(score[1:] < score[:-1], True)[: len(these)]  # a cut keeps all detections of equal score, or none
        total = matches.positives[:, k, 0].sum()
        f1 = np.where(last, 2 * right / (np.arange(1, len(these) + 1) + total), 0)
        if not len(these) or not f1.max():
            found.append(None)
            continue
        i = int(f1.argmax())
        found.append(Threshold(float(score[i]), float(right[i] / (i + 1)), float(right[i] / total), float(f1[i])))
    return found


def above(matches: Matches, cuts: Sequence[Threshold | None]) -> Matches:
    """The same without detections below their class's score; none is left of a class without a threshold.

    What is left keeps its matches: those of higher score have always been matched first.
    """
    least = np.array([np.inf, *(np.inf if cut is None else cut.score for cut in cuts)])
    keep = matches.score >= least[matches.label]
    columns = ("image", "index", "label", "rank", "score", "hit", "ignored", "taken", "voc_hit", "voc_ignored")
    return replace(matches, **{name: getattr(matches, name)[keep] for name in columns})


def worst_mistakes(matches: Matches, most: int = 12) -> list[Mistake]:
    """The `most` false alarms of the highest score, then so many missed objects, the largest of each class in turn.

    Missed is what no detection from the thresholds on is about: below them there is nearly always one.
    """
    found = mistakes(above(matches, thresholds(matches)))
    alarms = [mistake for mistake in found if mistake.detection is not None]
    turns: dict[int, int] = {}
    missed: list[tuple[int, float, Mistake]] = []
    for area, mistake in sorted(
        ((_area(mistake, matches), mistake) for mistake in found if mistake.detection is None), key=lambda pair: -pair[0]
    ):
        label = int(matches.truth[mistake.image].labels[mistake.object])
        turns[label] = turns.get(label, 0) + 1
        missed.append((turns[label], -area, mistake))
    return alarms[:most] + [mistake for *_, mistake in sorted(missed, key=lambda one: one[:2])[:most]]


def _area(mistake: Mistake, matches: Matches) -> float:
    assert mistake.object is not None
    return float(box_areas(matches.truth[mistake.image].boxes[mistake.object, None])[0])


def describe(mistake: Mistake, matches: Matches, names: Sequence[str]) -> dict[str, Any]:
    """A mistake in words: `kind`, `name` of the image, `label` of the detection, `truth`, the class of the object it is about,
    `score`, `iou`, and the boxes, `box` and `object`; None for what there is not."""
    objects, found = matches.truth[mistake.image], matches.found[mistake.image]
    row: dict[str, Any] = {"kind": mistake.kind, "name": names[mistake.image]}
    row |= {"label": None, "truth": None, "score": None, "iou": None, "box": None, "object": None}
    if mistake.detection is not None:
        box = [round(x, 2) for x in found.boxes[mistake.detection].tolist()]
        row |= {"label": matches.classes[found.labels[mistake.detection] - 1], "score": mistake.score, "box": box}
    if mistake.object is not None:
        box = [round(x, 2) for x in objects.boxes[mistake.object].tolist()]
        row |= {"truth": matches.classes[objects.labels[mistake.object] - 1], "object": box}
    if mistake.detection is not None and mistake.object is not None:
        row["iou"] = mistake.iou
    return row
