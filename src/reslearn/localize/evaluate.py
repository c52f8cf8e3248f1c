"""The localization error of a model: with the true class given and with predicted ones, on one crop and dense (DRL Table 13)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reslearn.data.annotated import open_boxes
from reslearn.data.boxes import BoxSet, bad_boxes_left_out_by
from reslearn.data.preprocess import Preprocessing
from reslearn.data.stream import ahead
from reslearn.device import pick_device
from reslearn.errors import UserError
from reslearn.evaluation.metrics import interval
from reslearn.evaluation.views import of_one_size
from reslearn.localize.error import localization_errors
from reslearn.localize.net import Localizer, load_localizer
from reslearn.localize.views import Single, of_one_kind, view_of
from reslearn.weights.store import Card, load

PIXELS = 1 << 20  # of views that are looked at together
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody sees."""


@torch.inference_mode()
def predict(
    model: Localizer, data: BoxSet, scales: Sequence[int] | None = None, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """The highest-scored box of each class on each image: logits float64 (N, K), boxes float64 (N, K, 4) in the image's pixels.

    scales: shorter sides in px at which the whole image is seen, the best of all places and scales being taken; None: one crop,
    the middle of the image.
    """
    look = model.card.preprocessing
    device = next(model.parameters()).device
    normalise = look.normaliser(device)
    n, k = len(data), len(model.classes)
    best, boxes = np.full((n, k), -np.inf), np.zeros((n, k, 4))
    for scale in [None] if scales is None else scales:
        back = np.zeros((n, 4))

        def see(i: int, scale: int | None = scale, back: np.ndarray = back) -> tuple[int, list[np.ndarray]]:
            view, back[i] = view_of(_pixels(data, i, look), look, scale)
            return i, [view]

        done = 0
        for places, pixels in of_one_size(ahead(see, range(n), min(os.cpu_count() or 1, 8)), PIXELS):
            logits, found = model.best(normalise(pixels.to(device).permute(0, 3, 1, 2)))
            at = places.numpy()
            here = np.tile(found.cpu().double().numpy().reshape(len(at), k, 2, 2) + back[at, None, None, :2], 1)
            here = (here * back[at, None, None, 2:]).reshape(len(at), k, 4)
            scores = logits.cpu().double().numpy()
            better = scores > best[at]
            best[at] = np.where(better, scores, best[at])
            boxes[at] = np.where(better[..., None], here, boxes[at])
            done += len(at)
            progress("1 crop" if scale is None else f"{scale} px", done, n)
    return best, boxes


def _pixels(data: BoxSet, i: int, look: Preprocessing) -> np.ndarray:
    image = data.images[i].pixels()
    if look.channels == 3:
        return image
    raise UserError(f"the model sees images of {look.channels} channels; annotated images are read in colour")


@torch.inference_mode()
def classify(classifier: str | Path, data: BoxSet, device: torch.device, progress: Progress = silent) -> np.ndarray:
    """Scores float64 (N, K) of a classification model on the middle of each image, in the order of the set's classes.

    Raises UserError where it does not know one of them.
    """
    net = load(classifier, device)
    card: Card = net.card  # type: ignore[assignment]
    look, known = card.preprocessing, card.classes
    if missing := next((name for name in data.classes if name not in known), None):
        raise UserError(f"{classifier} knows no class '{missing}': it knows {', '.join(known[:20])}")
    normalise, scores = look.normaliser(device), []
    for start in range(0, len(data), 64):
        views = [look.fit(_pixels(data, i, look)) for i in range(start, min(start + 64, len(data)))]
        scores.append(net(normalise(torch.stack(views).to(device))).double().cpu())
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
    `per_class`, of true_class. Raises UserError for what cannot be read or does not fit.
    """
    model = load_localizer(model, pick_device(device)) if isinstance(model, str | Path) else model
    if isinstance(data, BoxSet):
        chosen, used = data, split or data.name
    else:
        used, chosen = _open(data, split, model.classes)
    look = model.card.preprocessing
    if wrong := [scale for scale in scales if not min(look.size) <= scale <= 4096]:
        raise UserError(f"scale {wrong[0]}: must be from {min(look.size)} (what the model sees) to 4096 px")
    truth = of_one_kind(chosen)
    said = None
    if classifier is not None:
        said = classify(classifier, chosen, next(model.parameters()).device, progress)
    dense = tuple(scales) or (min(look.covered),)
    result: dict[str, Any] = {"data": chosen.name, "split": used, "n": len(chosen), "classes": list(model.classes)}
    result |= {"classes_from": "its own scores" if classifier is None else str(classifier), "scales": list(dense)}
    for name, seen in (("1-crop", None), ("dense", dense)):
        scores, boxes = predict(model, chosen, seen, progress)
        result[name] = errors(scores if said is None else said, boxes, truth, model.classes)
    return result


def _open(data: str | Path, split: str | None, classes: tuple[str, ...]) -> tuple[str, BoxSet]:
    with bad_boxes_left_out_by(f"reslearn doctor {data} --fix COPY"):
        sets = open_boxes(data, classes=classes, only=None if split is None else (split,))
    name = split or next(name for name in ("test", "val", *sets) if name in sets)
    return name, sets[name]


def errors(scores: np.ndarray, boxes: np.ndarray, truth: Single, classes: Sequence[str]) -> dict[str, Any]:
    """One view's numbers, as evaluate describes them. scores: float (N, K), whose order is that of the guesses; boxes (N, K, 4)."""
    order = np.argsort(-scores, axis=1, kind="stable")
    given = localization_errors(order, boxes, truth.labels, truth.boxes, None)
    wrong = {"true_class": given, "top1": localization_errors(order, boxes, truth.labels, truth.boxes, 1)}
    if len(classes) > 5:  # of fewer, five guesses are all there are
        wrong["top5"] = localization_errors(order, boxes, truth.labels, truth.boxes, 5)
    wrong["classification"] = order[:, 0] != truth.labels
    found: dict[str, Any] = {
        key: {"error": 100 * float(each.mean()), "interval": interval(int(each.sum()), len(each), 0)} for key, each in wrong.items()
    }
    of = [given[truth.labels == k] for k in range(len(classes))]
    found["per_class"] = [
        {"class": name, "n": len(each), "error": 100 * float(each.mean()) if len(each) else None}
        for name, each in zip(classes, of, strict=True)
    ]
    return found
