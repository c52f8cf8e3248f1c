"""Detection error analysis: classifies false positives and missed objects by kind, as in TIDE (Bolya et al. 2020)."""

from collections import Counter
from typing import Literal, NamedTuple, get_args

import numpy as np

from reslearn.evaluation.matching import IOUS, Matches, overlaps

Kind = Literal["class", "location", "both", "duplicate", "background", "missed"]
_HIGH, _LOW = float(IOUS[0]), 0.1  # t_f and t_b of the paper


class Mistake(NamedTuple):
    """A false positive or a missed object.

    image: index of the image. detection: index in the image, None for a missed object (score 0). object: index of the missed
    or nearest object, None for "background". iou: of detection and object, else 0.
    """

    kind: Kind
    image: int
    detection: int | None
    object: int | None
    score: float
    iou: float


def mistakes(matches: Matches) -> list[Mistake]:
    """Mistakes at IoU 0.5 by COCO's rule for boxes: false positives by descending score, then missed objects.

    Kinds of false positives (section 2.2, checked in the order of the authors' program):
    "location": 0.1 <= IoU < 0.5 with an object of its class; "class": IoU >= 0.5 with an object of another class;
    "duplicate": IoU >= 0.5 with an object of its class that another detection has matched; "background": IoU < 0.1 with all
    objects; "both": the rest, 0.1 <= IoU < 0.5 with an object of another class. "missed": an object without a match or a
    class or location mistake. Difficult objects, crowds and ignored detections are excluded.
    """
    false = ~matches.hit[:, 0, 0] & ~matches.ignored[:, 0, 0] & (matches.rank < 100)
    false_positives: list[Mistake] = []
    missed: list[Mistake] = []
    for i, (objects, detections) in enumerate(zip(matches.truth, matches.detections, strict=True)):
        here = matches.image == i
        real = np.flatnonzero(~(objects.difficult | objects.crowd))
        labels = objects.labels[real]
        explained = set(matches.matched[here & (matches.rank < 100), 0].tolist())
        wrong = matches.index[here & false]
        iou = overlaps(detections.boxes[wrong], objects.boxes[real], np.zeros(len(real), bool))[0]
        for d, row in zip(wrong, iou, strict=True):
            kind, nearest, value = _kind(row, labels == detections.labels[d])
            target = None if nearest is None else int(real[nearest])
            if kind in ("class", "location"):
                explained.add(target)
            false_positives.append(Mistake(kind, i, int(d), target, float(detections.scores[d]), value))
        missed += [Mistake("missed", i, None, int(g), 0.0, 0.0) for g in real if g not in explained]
    return sorted(false_positives, key=lambda mistake: -mistake.score) + missed


def count_mistakes(mistakes: list[Mistake]) -> dict[str, int]:
    """Number of mistakes of each kind."""
    counts = Counter(mistake.kind for mistake in mistakes)
    return {kind: counts[kind] for kind in get_args(Kind)}


def _kind(iou: np.ndarray, same: np.ndarray) -> tuple[Kind, int | None, float]:
    """(kind, nearest object, IoU with it) of a false positive. iou: (G,) with each object. same: (G,), objects of its class."""
    own, others = np.where(same, iou, -1), np.where(same, -1, iou)
    best_own, best_other = own.max(initial=-1), others.max(initial=-1)
    if _LOW <= best_own < _HIGH:
        return "location", int(own.argmax()), float(best_own)
    if best_other >= _HIGH:
        return "class", int(others.argmax()), float(best_other)
    if best_own >= _HIGH:
        return "duplicate", int(own.argmax()), float(best_own)
    if max(best_own, best_other) < _LOW:
        return "background", None, 0.0
    return "both", int(others.argmax()), float(best_other)
