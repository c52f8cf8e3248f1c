"""Means, intervals and verdicts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from reslearn.reproduce.experiment import METRICS, Comparison, Effect

# Student's t, two-sided 95%, by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
T95 += (2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
NORMAL95 = 1.96

HOLDS, DIFFERS, UNDECIDED, NOT_COMPARABLE = "holds", "differs", "undecided", "not comparable"
NOT_RUN, FAILED = "not run", "failed"
NO_VERDICT = {"difference": None, "tolerance": None, "verdict": ""}


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and 95% interval of the mean (Student's t); the latter two are None for a single value."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return {"n": n, "mean": mean, "std": None, "interval": None, "values": list(values)}
    std = statistics.stdev(values)
    half = (T95[n - 2] if n - 2 < len(T95) else NORMAL95) * std / math.sqrt(n)
    return {"n": n, "mean": mean, "std": std, "interval": [mean - half, mean + half], "values": list(values)}


def row(what: str, metric: str, values: Sequence[float] = (), published: float | None = None, **outcome: Any) -> dict[str, Any]:
    """A row of the result. outcome: see agreement; without it, the row has no verdict."""
    ours = summarize(values) if values else None
    return {"what": what, "metric": metric, "published": published, "ours": ours, **NO_VERDICT, **outcome}


def compare_to_paper(comparison: Comparison, values: Sequence[float], comparable: bool) -> dict[str, Any]:
    """A row of the result. comparable: whether the values were measured under the paper's protocol on its data; without that there
    is no verdict on the paper's number.
    """
    published, outcome = comparison.published, {}
    if published is not None and comparable:
        outcome = agreement(statistics.fmean(values), published, comparison.tolerance)
    elif published is not None:
        outcome = {"verdict": NOT_COMPARABLE}
    return row(comparison.what, METRICS[comparison.metric], values, published, **outcome)


def agreement(ours: float, expected: float, tolerance: float) -> dict[str, Any]:
    """The difference of two values, and whether it is within the tolerance."""
    difference = ours - expected
    return {"difference": difference, "tolerance": tolerance, "verdict": HOLDS if abs(difference) <= tolerance else DIFFERS}


def estimate(effect: Effect, values: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """A claim of the result. values: label -> seed -> metric, with the same seeds for all labels. The claim holds if the effect's
    interval is above 0.
    """
    seeds = list(values[next(iter(effect.terms))])
    by_seed = [sum(weight * values[label][seed] for label, weight in effect.terms.items()) for seed in seeds]
    summary = summarize(by_seed)
    return {
        "text": effect.text,
        "metric": METRICS[effect.metric],
        "effect": summary,
        "verdict": verdict(summary["interval"]),
        "disagree": [seed for seed, value in zip(seeds, by_seed, strict=True) if value * summary["mean"] < 0 or value == 0],
    }


def verdict(interval: Sequence[float] | None) -> str:
    """HOLDS, DIFFERS or UNDECIDED: whether the interval is above, below or around 0. None is undecided."""
    low, high = interval or (0, 0)
    return HOLDS if low > 0 else DIFFERS if high < 0 else UNDECIDED
