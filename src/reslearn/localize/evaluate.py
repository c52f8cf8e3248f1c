"""Localization errors with the true class given and with predicted classes, on one crop and dense (DRL Table 13)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from reslearn.data.boxes.box_set import BoxSet
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.evaluation.metrics import interval
from reslearn.localize.error import THRESHOLDS, best_overlaps, localization_errors
from reslearn.localize.net import Localizer, load_localizer
from reslearn.localize.predict import pixels_of, predict, propose, refine
from reslearn.localize.sources import open_to_test
from reslearn.localize.views import Single, of_one_kind
from reslearn.progress import Progress, silent
from reslearn.weights.store import Card, load

VIEWS = {"1-crop": "1 crop", "dense": "dense", "refined": "R-CNN"}


@torch.inference_mode()
def classify(classifier: str | Path, data: BoxSet, device: torch.device, progress: Progress = silent) -> np.ndarray:
    """Scores, float64 (N, K), of a classification model on the center crop of each image, in the order of the set's classes.

    Raises UserError if the model lacks one of the classes.
    """
    net = load(classifier, device)
    card: Card = net.card  # type: ignore[assignment]
    view, known = card.preprocessing, card.classes
    if missing := next((name for name in data.classes if name not in known), None):
        raise UserError(f"{classifier} has no class '{missing}'; its classes are {', '.join(known[:20])}")
    normalize, scores = view.normalizer(device), []
    for start in range(0, len(data), 64):
        views = [view.fit(pixels_of(data, i, view)) for i in range(start, min(start + 64, len(data)))]
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
    """The localization errors of a model on a split (by default test, otherwise val), ready for JSON.

    scales: shorter sides, px, of "dense"; by default the scale of the center crop. classifier: a model file or run folder that
    predicts the classes; by default the class of the highest-scored box. Returns n, split, data and, for "1-crop" and "dense", a
    dict of localization errors in percent with 95% bootstrap intervals over the images: `true_class`, with the class given;
    `top1` and, with 6 or more classes, `top5`, with predicted classes; `classification`, the top-1 error of the class alone; and
    `per_class`, the true_class errors by class. `right_by_iou` of true_class and top1 is the percentage of correct images at IoU
    thresholds 0, 0.05, ..., 1. With a second stage, "refined" is its result on the dense proposals.
    Raises UserError for unreadable or incompatible models and data.
    """
    model = load_localizer(model, pick_device(device)) if isinstance(model, str | Path) else model
    if isinstance(data, BoxSet):
        split = split or data.name
    else:
        split, data = open_to_test(data, model.classes, split)
    view = model.card.preprocessing
    if bad := [scale for scale in scales if not min(view.size) <= scale <= 4096]:
        raise UserError(f"scale {bad[0]}: must be from {min(view.size)} (the model's input size) to 4096 px")
    truth = of_one_kind(data)
    scores = None if classifier is None else classify(classifier, data, next(model.parameters()).device, progress)
    dense = tuple(scales) or (min(view.covered),)
    result: dict[str, Any] = {"data": data.name, "split": split, "n": len(data), "classes": list(model.classes)}
    result |= {"classes_from": "its own scores" if classifier is None else str(classifier), "scales": list(dense)}
    by_name = views(model, data, truth.labels, dense, scores, progress)
    return result | {name: errors(one.order, one.boxes, truth, model.classes) for name, one in by_name.items()}


class View(NamedTuple):
    """Predictions for N images in one evaluation mode. order: int (N, K), classes, most likely first. scores (N, K), boxes
    (N, K, 4): by class.
    """

    order: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, boxes: np.ndarray, class_scores: np.ndarray | None = None) -> "View":
        """A view with classes ordered by class_scores (N, K), by default the scores of the boxes."""
        by = scores if class_scores is None else class_scores
        return cls(np.argsort(-by, axis=1, kind="stable"), scores, boxes)


def views(
    model: Localizer,
    data: BoxSet,
    labels: np.ndarray,
    dense: Sequence[int],
    class_scores: np.ndarray | None,
    progress: Progress = silent,
    *,
    crop: bool = True,
) -> dict[str, View]:
    """Views by name: "1-crop" (if `crop`), "dense" and, with a second stage, "refined".

    labels: true classes (N,). class_scores: (N, K), by default the scores of the boxes. The second stage refines the boxes of the
    true class and of the classes that count (see guesses); others keep their dense box, with a score of -inf.
    """
    by_name = {"1-crop": View.of(*predict(model, data, None, progress), class_scores)} if crop else {}
    by_name["dense"] = View.of(*predict(model, data, dense, progress), class_scores)
    if model.regions is not None:
        order, _, boxes = by_name["dense"]
        classes = np.concatenate([labels[:, None], order[:, : guesses(order.shape[1])]], 1)
        classes = np.stack([_distinct(row) for row in classes])
        proposals = propose(model, data, classes, model.settings.proposals or 1, dense, progress)
        scores, refined = refine(model, data, classes, proposals, progress)
        by_name["refined"] = View(order, scores, np.where(np.isfinite(scores)[..., None], refined, boxes))
    return by_name


def guesses(classes: int) -> int:
    """Number of predicted classes that count: 5 as in ILSVRC with more than 5 classes, otherwise 1."""
    return 5 if classes > 5 else 1


def _distinct(classes: np.ndarray) -> np.ndarray:
    """Removes repetitions and pads with the last class to the same length."""
    once = list(dict.fromkeys(classes.tolist()))
    return np.array(once + once[-1:] * (len(classes) - len(once)))


def wrong(order: np.ndarray, boxes: np.ndarray, truth: Single) -> dict[str, np.ndarray]:
    """Whether each image is wrong, bool (N,), by kind of error; arguments as for errors."""
    kinds = {"true_class": localization_errors(order, boxes, truth.labels, truth.boxes, None)}
    for count in sorted({1, guesses(order.shape[1])}):
        kinds[f"top{count}"] = localization_errors(order, boxes, truth.labels, truth.boxes, count)
    return kinds | {"classification": order[:, 0] != truth.labels}


def errors(order: np.ndarray, boxes: np.ndarray, truth: Single, classes: Sequence[str]) -> dict[str, Any]:
    """One view's errors (see evaluate). order: int (N, K), classes, most likely first. boxes: (N, K, 4), by class."""

    def error(wrong: np.ndarray) -> dict[str, Any]:
        if not len(wrong):
            return {"error": None, "interval": None}
        return {"error": 100 * float(wrong.mean()), "interval": interval(int(wrong.sum()), len(wrong), 0)}

    kinds = wrong(order, boxes, truth)
    result: dict[str, Any] = {kind: error(images) for kind, images in kinds.items()}
    by_class = [kinds["true_class"][truth.labels == k] for k in range(len(classes))]
    rows = zip(classes, by_class, strict=True)
    result["per_class"] = [{"class": name, "n": len(images), **error(images)} for name, images in rows]
    overlaps = best_overlaps(boxes, truth.labels, truth.boxes)
    for key, counted in (("true_class", np.ones(len(overlaps), bool)), ("top1", ~kinds["classification"])):
        result[key]["right_by_iou"] = [100 * float((counted & (overlaps >= iou)).mean()) for iou in THRESHOLDS]
    return result
