"""Average precision: VOC's two and COCO's twelve metrics from one call of `match`, with bootstrap intervals over the images.

All values are percentages. VOC07's AP is the mean of the interpolated precision at 11 recalls, VOC10's the area below its curve
(Everingham et al. 2015, section 2.2); they can differ by several points. COCO's is the mean at 101 recalls.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from reslearn.evaluation.matching import ALL_IOUS, AREAS, IOUS, Matches

Rule = Literal["coco", "voc-11", "voc-area"]
RESAMPLES = 1000
_RECALLS = np.linspace(0, 1, 101)
_CHUNK = 4_000_000  # values in memory at a time


def class_ap(
    matches: Matches, rule: Rule, *, ious: tuple[int, ...] = (0,), area: str = "all", weights: np.ndarray | None = None
) -> np.ndarray:
    """AP per class in 0..1: float64 (B, len(ious), K), NaN for a class without objects.

    ious: indices into matching.IOUS. area: key of matching.AREAS. weights: (B, I), count of each image in each of B resamples;
    default: ones (B = 1). COCO's rule counts the best 100 detections per image and class; VOC's counts all.
    """
    weights = np.ones((1, len(matches.truth))) if weights is None else weights
    result = np.full((len(weights), len(ious), len(matches.classes)), np.nan)
    column = list(AREAS).index(area)
    for k, order in enumerate(_orders(matches, 100 if rule == "coco" else None)):
        positives = matches.positives[:, k, column] if rule == "coco" else matches.voc_positives[:, k]
        if not positives.any():
            continue
        rows = max(1, _CHUNK // max(1, len(order)))
        for start in range(0, len(weights), rows):
            chunk = weights[start : start + rows]
            detection_weights, total = chunk[:, matches.image[order]], chunk @ positives
            for j, t in enumerate(ious):
                if rule == "coco":
                    hit, counted = matches.hit[order, column, t], ~matches.ignored[order, column, t]
                else:
                    hit, counted = matches.voc_hit[order, t], ~matches.voc_ignored[order, t]
                result[start : start + rows, j, k] = _ap(hit & counted, counted, detection_weights, total, rule)
    return result


def class_recall(matches: Matches, *, limit: int = 100, area: str = "all") -> np.ndarray:
    """Recall of the best `limit` detections per image and class: float64 (T, K) in 0..1, NaN for a class without objects."""
    column = list(AREAS).index(area)
    right = (matches.hit & ~matches.ignored)[:, column][matches.rank < limit]
    hits = np.zeros((len(matches.classes), len(IOUS)))
    np.add.at(hits, matches.label[matches.rank < limit] - 1, right)
    positives = matches.positives[:, :, column].sum(axis=0)[:, None]
    return np.divide(hits, positives, out=np.full(hits.shape, np.nan), where=positives > 0).T


def class_curves(matches: Matches, *, ious: tuple[int, ...] = (0, 5)) -> np.ndarray:
    """Interpolated precision at COCO's 101 recalls, in 0..1: float64 (K, len(ious), 101).

    0 for a recall that is not reached, NaN for a class without objects. The means over recalls equal COCO's `class_ap`.
    """
    result = np.full((len(matches.classes), len(ious), len(_RECALLS)), np.nan)
    for k, order in enumerate(_orders(matches, 100)):
        positives = matches.positives[:, k, 0].sum(keepdims=True)
        for j, t in enumerate(ious if positives.any() else ()):
            counted = ~matches.ignored[order, 0, t]
            right = matches.hit[order, 0, t] & counted
            precision = right.cumsum() / np.maximum(counted.cumsum(), 1)
            best = np.maximum.accumulate(precision[right][::-1])[::-1]
            at = np.searchsorted(np.arange(1, len(best) + 1), _at_least(positives)[0])
            result[k, j] = np.append(best, 0)[at]
    return result


def _orders(matches: Matches, limit: int | None) -> Iterator[np.ndarray]:
    """Yields, per class, the indices of its detections by descending score; ties keep the order of the images."""
    for label in range(1, len(matches.classes) + 1):
        indices = np.flatnonzero((matches.label == label) & (matches.rank < (limit or np.inf)))
        yield indices[np.argsort(-matches.score[indices], kind="stable")]


def _ap(right: np.ndarray, counted: np.ndarray, weights: np.ndarray, positives: np.ndarray, rule: Rule) -> np.ndarray:
    """AP (B,) from sorted detections: `right` and `counted` bool (D,), weights (B, D), positives (B,).

    Only true positives raise the recall, so the curve is computed at those alone. Recalls are compared as integer counts of
    objects.
    """
    hits = np.flatnonzero(right)
    detected = np.cumsum(weights * counted, axis=1)[:, hits]
    recalled = np.cumsum(weights[:, hits], axis=1)
    precision = recalled / np.maximum(detected, 1)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or above
    with np.errstate(divide="ignore", invalid="ignore"):
        if rule == "voc-area":
            result = (weights[:, hits] * best).sum(axis=1) / positives
        else:
            need = _at_least(positives) if rule == "coco" else np.ceil(np.arange(11) * positives[:, None] / 10)
            step = positives.max() + 2  # offset between the rows of `recalled`, so that one search serves all
            rows = step * np.arange(len(recalled))[:, None]
            at = np.searchsorted((recalled + rows).ravel(), (need + rows).ravel()).reshape(need.shape)
            at -= len(hits) * np.arange(len(recalled))[:, None]
            best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
            result = np.take_along_axis(best, at, axis=1).mean(axis=1)
    return np.where(positives > 0, result, np.nan)


def _at_least(positives: np.ndarray) -> np.ndarray:
    """(B, 101): the smallest count k with k / positives >= each recall, compared in floating point like pycocotools."""
    total = np.maximum(positives, 1)[:, None]
    k = np.ceil(_RECALLS * total)
    k -= (k > 0) & ((k - 1) / total >= _RECALLS)
    return k + (k / total < _RECALLS)


def coco(matches: Matches) -> dict[str, float | None]:
    """COCO's twelve metrics in percent; None (pycocotools: -1) if no object is in the area range.

    AP over all ten IoU thresholds, at 0.5 and 0.75, and by area; average recall of 1, 10 and 100 detections, and by area.
    """
    ap = class_ap(matches, "coco", ious=ALL_IOUS)
    result = {"AP": _mean(ap), "AP50": _mean(ap[:, 0]), "AP75": _mean(ap[:, 5])}
    ranges = [area for area in AREAS if area != "all"]
    result |= {f"AP_{area}": _mean(class_ap(matches, "coco", ious=ALL_IOUS, area=area)) for area in ranges}
    result |= {f"AR{limit}": _mean(class_recall(matches, limit=limit)) for limit in (1, 10, 100)}
    return result | {f"AR_{area}": _mean(class_recall(matches, area=area)) for area in ranges}


def voc(matches: Matches) -> dict[str, float | None]:
    """VOC's mean AP at IoU 0.5 in percent: `VOC07` (11 recalls) and `VOC10` (area)."""
    return {"VOC07": _mean(class_ap(matches, "voc-11")), "VOC10": _mean(class_ap(matches, "voc-area"))}


def detection_metrics(matches: Matches, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """All metrics as a JSON-compatible dict.

    - `n`, `objects`: numbers of images and objects;
    - the metrics of `coco` and `voc`;
    - `intervals`: `{name: [low, high]}` for AP, AP50, AP75, VOC07 and VOC10: 95% percentile bootstrap over the images (Efron and
      Tibshirani 1993, section 13.3), None if undefined;
    - `per_class`: `[{"class", "objects", "AP", "AP50", "AP75", "VOC07", "VOC10"}]`.
    """
    means, per_class = _headline(matches)
    resampled = _headline(matches, _resamples(len(matches.truth), seed, resamples))[0]
    objects = matches.voc_positives.sum(axis=0).tolist()
    return {
        "n": len(matches.truth),
        "objects": sum(objects),
        **coco(matches),
        **voc(matches),
        "intervals": {name: _interval(values) for name, values in resampled.items()},
        "per_class": [
            {"class": label, "objects": objects[k], **{name: _mean(per_class[name][0, k : k + 1]) for name in means}}
            for k, label in enumerate(matches.classes)
        ],
    }


def compare(one: Matches, other: Matches, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """Compares two models: `{name: {"one", "other", "difference", "interval"}}` in percent for AP, AP50, AP75, VOC07, VOC10.

    difference: other - one. The bootstrap is paired: a resample has the same images for both. Raises ValueError unless images,
    objects and classes are the same.
    """
    if one.classes != other.classes or not np.array_equal(one.positives, other.positives):
        raise ValueError("two models can be compared only on the same images and classes")
    weights = _resamples(len(one.truth), seed, resamples)
    (a, _), (b, _) = _headline(one), _headline(other)
    (many_a, _), (many_b, _) = _headline(one, weights), _headline(other, weights)
    return {
        name: {
            "one": _mean(a[name]),
            "other": _mean(b[name]),
            "difference": _mean(b[name] - a[name]),
            "interval": _interval(many_b[name] - many_a[name]),
        }
        for name in a
    }


def _headline(matches: Matches, weights: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The five headline metrics in 0..1: means over the classes (B,), and values per class (B, K)."""
    ap = class_ap(matches, "coco", ious=ALL_IOUS, weights=weights)
    per_class = {"AP": ap.mean(axis=1), "AP50": ap[:, 0], "AP75": ap[:, 5]}
    per_class["VOC07"] = class_ap(matches, "voc-11", weights=weights)[:, 0]
    per_class["VOC10"] = class_ap(matches, "voc-area", weights=weights)[:, 0]
    means = {}
    for name, values in per_class.items():
        present = ~np.isnan(values)
        total, n = np.where(present, values, 0).sum(axis=1), present.sum(axis=1)
        means[name] = np.divide(total, n, out=np.full(len(values), np.nan), where=n > 0)
    return means, per_class


def _resamples(images: int, seed: int, resamples: int) -> np.ndarray:
    """(resamples, images): count of each image in each resample."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)]
    return 100 * float(present.mean()) if present.size else None


def _interval(values: np.ndarray) -> list[float] | None:
    present = values[~np.isnan(values)]
    return [100 * float(end) for end in np.percentile(present, [2.5, 97.5])] if present.size else None
