"""Why a detector is wrong: each false alarm and each object that was not found, by kind, after TIDE (Bolya et al. 2020)."""

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

from reslearn.evaluation.matching import IOUS, Matches, overlaps

Kind = Literal["class", "location", "both", "duplicate", "background", "missed"]
_HIGH, _LOW = float(IOUS[0]), 0.1  # tf and tb of the paper


class Mistake(NamedTuple):
    """A wrong detection (`detection`, its index in the image; `object`, the index of the one it is nearest to, if any) or a
    missed object (`detection` None, score 0). `iou` is of the two, 0 without an object."""

    kind: Kind
    image: int
    detection: int | None
    object: int | None
    score: float
    iou: float


def mistakes(matches: Matches) -> list[Mistake]:
    """The mistakes at IoU 0.5 of boxes by COCO's rule, false alarms by falling score, then missed objects.

    A false alarm is of (section 2.2, in the order of the authors' program) "location": 0.1 <= IoU < 0.5 with an object of
    its class; "class": IoU >= 0.5 with one of another; "duplicate": IoU >= 0.5 with one of its class, which another
    detection has; "background": IoU < 0.1 with all; "both": the rest, 0.1 <= IoU < 0.5 with one of another class. "Missed"
    is an object that no detection took, and that no mistake of class or location is about. Difficult objects and crowds
    are no part of this, nor are detections that count neither way.
    """
    false = ~matches.hit[:, 0, 0] & ~matches.ignored[:, 0, 0] & (matches.rank < 100)
    alarms: list[Mistake] = []
    missed: list[Mistake] = []
    for i, (objects, found) in enumerate(zip(matches.truth, matches.found, strict=True)):
        here = matches.image == i
        real = np.flatnonzero(~(objects.difficult | objects.crowd))
        labels = objects.labels[real]
        excused = set(matches.taken[here & (matches.rank < 100), 0].tolist())
        wrong = matches.index[here & false]
        iou = overlaps(found.boxes[wrong], objects.boxes[real], np.zeros(len(real), bool))[0]
        for d, row in zip(wrong, iou, strict=True):
            kind, nearest, value = _kind(row, labels == found.labels[d])
            whom = None if nearest is None else int(real[nearest])
            if kind in ("class", "location"):
                excused.add(whom)
            alarms.append(Mistake(kind, i, int(d), whom, float(found.scores[d]), value))
        missed += [Mistake("missed", i, None, int(g), 0.0, 0.0) for g in real if g not in excused]
    return sorted(alarms, key=lambda mistake: -mistake.score) + missed


def count_mistakes(found: list[Mistake]) -> dict[str, int]:
    """How many there are of each kind."""
    counts = Counter(mistake.kind for mistake in found)
    return {kind: counts[kind] for kind in ("class", "location", "both", "duplicate", "background", "missed")}


def _kind(iou: np.ndarray, same: np.ndarray) -> tuple[Kind, int | None, float]:
    """(kind, nearest object, IoU with it) of a false alarm; `iou` (G,) with each object, `same` (G,) marks its class's."""
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
