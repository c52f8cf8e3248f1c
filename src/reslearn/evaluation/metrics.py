"""Classification metrics: loss, error rates with confidence interval, calibration, confusion matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from reslearn.errors import UserError

RESAMPLES = 10_000
BINS = 15  # as in the tables of Guo et al. 2017


def metrics(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Metrics of one network on one set of images, as a JSON-compatible dict.

    Args:
        logits: (N, K) floating point, any device; the outputs before the softmax.
        labels: (N,) int64 in [0, K); the true classes.
        classes: the K names, in the order of the logits.
        seed: of the bootstrap; the same seed gives the same interval.

    Returns:
        A dict with

        - `n`: the number of images;
        - `loss`: mean cross-entropy, in nats;
        - `top1_error`: percent of images whose largest logit is not the true class's (the lower index wins a tie);
        - `top1_interval`: `[low, high]`, percent: the 95% percentile bootstrap over the images (Efron and Tibshirani
          1993, section 13.3); `[0, 0]` if no image is wrong;
        - `top5_error`: percent of images whose true class is not among the five largest; omitted below 6 classes;
        - `calibration_error`: expected calibration error, percent (Guo et al. 2017, equation 3): over 15 equal-width
          bins of the top-1 confidence, the mean absolute difference of accuracy and confidence, weighted by images;
        - `calibration_bins`: those bins, `[{"low", "high", "n", "confidence", "accuracy"}]` in percent, the last two
          None in an empty bin;
        - `per_class`: `[{"class", "n", "accuracy"}]`, percent, None if the set has no image of the class;
        - `confusion`: K lists of K ints; rows are the true class, columns the predicted class.

    Raises:
        UserError: there are no images, or some logits are NaN or infinite.
        ValueError: shapes, dtypes, labels and classes are inconsistent.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be (N, K) floating point, not {tuple(logits.shape)} {logits.dtype}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({len(logits)},) int64, not {tuple(labels.shape)} {labels.dtype}")
    n, k = logits.shape
    if k != len(classes) or k == 0:
        raise ValueError(f"{k} columns of logits for {len(classes)} classes")
    if n == 0:
        raise UserError("there are no images to evaluate")
    scores = logits.detach().cpu().double()
    truth = labels.cpu()
    lowest, highest = int(truth.min()), int(truth.max())
    if lowest < 0 or highest >= k:
        raise ValueError(f"labels must lie in [0, {k}), not [{lowest}, {highest}]")
    broken = int((~scores.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(
            f"the network's outputs are NaN or infinite for {broken} of {n} images: "
            "its training diverged; try a lower learning rate or a longer warm-up"
        )

    # argmax and topk can break ties differently. This rank breaks them by index, so top-5 error <= top-1 error.
    own = scores.gather(1, truth[:, None])
    earlier = torch.arange(k) < truth[:, None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
    predicted = torch.from_numpy(scores.numpy().argmax(axis=1))  # unlike torch, numpy guarantees the first of equals
    wrong = int((rank > 0).sum())

    log_probability = torch.log_softmax(scores, dim=1)
    confidence = log_probability.amax(dim=1).exp().numpy()
    bins = _calibration_bins(confidence, (rank == 0).numpy())
    confusion = torch.bincount(truth * k + predicted, minlength=k * k).reshape(k, k)
    counts = confusion.sum(dim=1).tolist()
    hits = confusion.diagonal().tolist()

    result: dict[str, Any] = {
        "n": n,
        "loss": -float(log_probability.gather(1, truth[:, None]).mean()),
        "top1_error": 100 * wrong / n,
        "top1_interval": interval(wrong, n, seed),
    }
    if k > 5:
        result["top5_error"] = 100 * int((rank > 4).sum()) / n
    gaps = (bin["n"] * abs(bin["accuracy"] - bin["confidence"]) for bin in bins if bin["n"])
    result["calibration_error"] = sum(gaps) / n
    result["calibration_bins"] = bins
    result["per_class"] = [
        {"class": name, "n": count, "accuracy": 100 * hit / count if count else None}
        for name, count, hit in zip(classes, counts, hits, strict=True)
    ]
    result["confusion"] = confusion.tolist()
    return result


def interval(wrong: int, n: int, seed: int) -> list[float]:
    """95% percentile bootstrap interval of `100 * wrong / n`, percent.

    The number of wrong images in a resample of n images has the distribution Binomial(n, wrong / n).
    """
    resamples = np.random.default_rng(seed).binomial(n, wrong / n, size=RESAMPLES)
    low, high = np.percentile(100 * resamples / n, [2.5, 97.5])
    return [float(low), float(high)]


def _calibration_bins(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Bins `(m / 15, (m + 1) / 15]` of the confidence (Guo et al. 2017, section 2).

    confidence: (N,) float64 in (0, 1]; right: (N,) bool.
    """
    indices = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for m in range(BINS):
        inside = indices == m
        n = int(inside.sum())
        bins.append(
            {
                "low": 100 * m / BINS,
                "high": 100 * (m + 1) / BINS,
                "n": n,
                "confidence": 100 * float(confidence[inside].mean()) if n else None,
                "accuracy": 100 * float(right[inside].mean()) if n else None,
            }
        )
    return bins
