"""Localization errors of a model with the true class given and with predicted classes, on one crop and dense (DRL Table 13)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from reslearn.data.boxes.box_set import BoxSet
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.evaluation.metrics import interval
from reslearn.localize.error import ASKED, best_overlaps, localization_errors
from reslearn.localize.net import Localizer, load_localizer
from reslearn.localize.predict import Progress, pixels_of, predict, propose, refine, silent
from reslearn.localize.sources import open_to_test
from reslearn.localize.views import Single, of_one_kind
from reslearn.weights.store import Card, load

VIEWS = {"1-crop": "1 crop", "dense": "dense", "refined": "R-CNN"}


@torch.inference_mode()
def classify(classifier: str | Path, data: BoxSet, device: torch.device, progress: Progress = silent) -> np.ndarray:
    """Scores float64 (N, K) of a classification model on the middle of each image, in the order of the set's classes.

    Raises UserError where it does not know one of them.
    """
    net = load(classifier, device)
    card: Card = net.card  # type: ignore[assignment]
    look, known = card.preprocessing, card.classes
    if missing := next((name for name in data.classes if name not in known), None):
        raise UserError(f"{classifier} has no class '{missing}'; its classes are {', '.join(known[:20])}")
    normalize, scores = look.normalizer(device), []
    for start in range(0, len(data), 64):
        views = [look.fit(pixels_of(data, i, look)) for i in range(start, min(start + 64, len(data)))]
        scores.append(net(normalize(torch.stack(views).to(device))).double().cpu())
        progress("classes", start + len(views), len(data))
    return torch.cat(scores).numpy()[:, [known.index(name) for name in data.classes]]


def evaluate(
    model: str | Path | Localizer,
    data: str | Path | BoxSet,
    *,
    split: str | None = None,
    scales: Sequence[int] = (),
    classifier: str | Path | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> dict[str, Any]:
    """The localization errors of a model on a split, by default test, else val, ready for JSON.

    scales: of "dense"; by default the one that crops are taken from. classifier: a model file or run folder whose predictions are
    the classes; without one, the class is that of the highest-scored box. Returns n, split, data, and for "1-crop" and "dense" a
    dict of localization errors in percent with 95% bootstrap intervals over the images: `true_class`, the class being given;
    `top1` and, from 6 classes on, `top5` guesses of predicted classes; `classification`, the class alone, first guess; and
    `per_class`, of true_class. `right_by_iou` of true_class and top1 is the percentage of images that are right where an overlap
    of 0, 0.05, ... 1 is asked. Where the model has a second stage, "refined" is what that makes of the dense proposals.
    Raises UserError for what cannot be read or does not fit.
    """
    model = load_localizer(model, pick_device(device)) if isinstance(model, str | Path) else model
    if isinstance(data, BoxSet):
        chosen, used = data, split or data.name
    else:
        used, chosen = open_to_test(data, model.classes, split)
    look = model.card.preprocessing
    if bad := [scale for scale in scales if not min(look.size) <= scale <= 4096]:
        raise UserError(f"scale {bad[0]}: must be from {min(look.size)} (the model's input size) to 4096 px")
    truth = of_one_kind(chosen)
    said = None
    if classifier is not None:
        said = classify(classifier, chosen, next(model.parameters()).device, progress)
    dense = tuple(scales) or (min(look.covered),)
    result: dict[str, Any] = {"data": chosen.name, "split": used, "n": len(chosen), "classes": list(model.classes)}
    result |= {"classes_from": "its own scores" if classifier is None else str(classifier), "scales": list(dense)}
    found = views(model, chosen, truth.labels, dense, said, progress)
    for name, view in found.items():
        result[name] = errors(view.order, view.boxes, truth, model.classes)
    return result


class View(NamedTuple):
    """One way of looking at N images. order: int (N, K), their classes, the likeliest first. By class: the box that is guessed,
    boxes (N, K, 4), and its score (N, K).
    """

    order: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, boxes: np.ndarray, class_scores: np.ndarray | None = None) -> "View":
        """A view whose classes are ordered by class_scores (N, K), or by the scores of the boxes."""
        by = scores if class_scores is None else class_scores
        return cls(np.argsort(-by, axis=1, kind="stable"), scores, boxes)


def views(
    model: Localizer, data: BoxSet, labels: np.ndarray, dense: Sequence[int], said: np.ndarray | None, progress: Progress = silent
) -> dict[str, View]:
    """By name: "1-crop", "dense", and "refined" where there is a second stage.

    labels: true classes (N,). said: scores of classes (N, K); None: those of the boxes. Refined are the boxes of the true class
    and of the first five guesses, of the first one where there are no six classes; others stay, with a score of -inf.
    """
    found = {}
    for name, seen in (("1-crop", None), ("dense", dense)):
        found[name] = View.of(*predict(model, data, seen, progress), said)
    if model.regions is not None:
        order, _, boxes = found["dense"]
        wanted = np.concatenate([labels[:, None], order[:, : guesses(order.shape[1])]], 1)
        wanted = np.stack([_distinct(row) for row in wanted])
        proposals = propose(model, data, wanted, model.settings.proposals or 1, dense, progress)
        scores, moved = refine(model, data, wanted, proposals, progress)
        found["refined"] = View(order, scores, np.where(np.isfinite(scores)[..., None], moved, boxes))
    return found


def guesses(classes: int) -> int:
    """Predicted classes that count: 5 as in ILSVRC with more than 5 classes, otherwise 1."""
    return 5 if classes > 5 else 1


def _distinct(classes: np.ndarray) -> np.ndarray:
    """Without repetitions, padded with the last one to the same length."""
    once = list(dict.fromkeys(classes.tolist()))
    return np.array(once + once[-1:] * (len(classes) - len(once)))


def wrong(order: np.ndarray, boxes: np.ndarray, truth: Single) -> dict[str, np.ndarray]:
    """Which images are wrong, bool (N,), by what is asked; the arguments are those of errors."""
    found = {"true_class": localization_errors(order, boxes, truth.labels, truth.boxes, None)}
    for count in sorted({1, guesses(order.shape[1])}):
        found[f"top{count}"] = localization_errors(order, boxes, truth.labels, truth.boxes, count)
    return found | {"classification": order[:, 0] != truth.labels}


def errors(order: np.ndarray, boxes: np.ndarray, truth: Single, classes: Sequence[str]) -> dict[str, Any]:
    """One view's numbers, as evaluate describes them. order: int (N, K), the likeliest class first; boxes (N, K, 4) by class."""
    judged = wrong(order, boxes, truth)
    found: dict[str, Any] = {
        key: {"error": 100 * float(each.mean()), "interval": interval(int(each.sum()), len(each), 0)}
        for key, each in judged.items()
    }
    given = judged["true_class"]
    of = [given[truth.labels == k] for k in range(len(classes))]
    found["per_class"] = [
        {
            "class": name,
            "n": len(each),
            "error": 100 * float(each.mean()) if len(each) else None,
            "interval": interval(int(each.sum()), len(each), 0) if len(each) else None,
        }
        for name, each in zip(classes, of, strict=True)
    ]
    overlaps = best_overlaps(boxes, truth.labels, truth.boxes)
    for key, named in (("true_class", np.ones(len(overlaps), bool)), ("top1", ~judged["classification"])):
        found[key]["right_by_iou"] = [100 * float((named & (overlaps >= iou)).mean()) for iou in ASKED]
    return found
