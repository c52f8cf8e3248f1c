"""Metrics against plain loops, invariances, and a bootstrap that resamples images."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reslearn.errors import UserError
from reslearn.evaluation.metrics import metrics


def outputs(n: int, k: int, seed: int, sharpness: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=generator)
    logits = torch.randn(n, k, generator=generator) * sharpness
    logits[torch.arange(n), labels] += 1.5
    return logits, labels, [f"class {i}" for i in range(k)]


def by_hand(logits: list[list[float]], labels: list[int], k: int) -> dict:
    """The definitions, one image at a time, in Python floats."""
    losses, wrong, wrong5, sums = [], 0, 0, [[0, 0.0, 0] for _ in range(15)]
    confusion = [[0] * k for _ in range(k)]
    for row, label in zip(logits, labels, strict=True):
        exps = [math.exp(value - max(row)) for value in row]
        probabilities = [value / sum(exps) for value in exps]
        losses.append(-math.log(probabilities[label]))
        order = sorted(range(k), key=lambda i: (-row[i], i))
        wrong += order[0] != label
        wrong5 += label not in order[:5]
        confusion[label][order[0]] += 1
        confidence = probabilities[order[0]]
        m = next(m for m in range(15) if confidence <= (m + 1) / 15 or m == 14)
        sums[m][0] += 1
        sums[m][1] += confidence
        sums[m][2] += order[0] == label
    n = len(labels)
    return {
        "n": n,
        "loss": sum(losses) / n,
        "top1_error": 100 * wrong / n,
        "top5_error": 100 * wrong5 / n,
        "calibration_error": 100 * sum(c / n * abs(right / c - conf / c) for c, conf, right in sums if c),
        "confusion": confusion,
    }


@pytest.mark.parametrize(("n", "k", "seed"), [(1, 7, 0), (97, 3, 1), (200, 10, 2), (50, 60, 3)])
def test_metrics_match_the_definitions(n: int, k: int, seed: int) -> None:
    logits, labels, classes = outputs(n, k, seed)
    ours, oracle = metrics(logits, labels, classes), by_hand(logits.tolist(), labels.tolist(), k)
    assert ours["n"] == n
    assert ours["confusion"] == oracle["confusion"]
    for key in ("loss", "top1_error", "calibration_error"):
        assert ours[key] == pytest.approx(oracle[key], abs=1e-9), key
    if k > 5:
        assert ours["top5_error"] == pytest.approx(oracle["top5_error"])
    for i, row in enumerate(ours["per_class"]):
        total = sum(oracle["confusion"][i])
        assert (row["class"], row["n"]) == (classes[i], total)
        assert row["accuracy"] == (pytest.approx(100 * oracle["confusion"][i][i] / total) if total else None)


def test_a_case_computed_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    result = metrics(logits, torch.tensor([0, 1, 1, 0]), ["cat", "dog"])
    confidence = 1 / (1 + math.exp(-2))
    assert result["top1_error"] == 25
    assert result["confusion"] == [[2, 0], [1, 1]]
    assert result["loss"] == pytest.approx((3 * -math.log(confidence) - math.log(1 - confidence)) / 4)
    assert result["calibration_error"] == pytest.approx(100 * (confidence - 0.75))  # all in one bin
    assert result["per_class"][1] == {"class": "dog", "n": 2, "accuracy": 50.0}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_invariances(n: int, k: int, seed: int, ties: bool) -> None:
    logits, labels, classes = outputs(n, k, seed)
    logits = logits.round() if ties else logits
    result = metrics(logits, labels, classes)
    low, high = result["top1_interval"]
    assert [sum(row) for row in result["confusion"]] == torch.bincount(labels, minlength=k).tolist()
    assert sum(result["confusion"][i][i] for i in range(k)) == n - round(result["top1_error"] * n / 100)
    assert 0 <= low <= result["top1_error"] + 1e-9 and result["top1_error"] <= high + 1e-9 and high <= 100
    assert sum(bin["n"] for bin in result["calibration_bins"]) == n
    for bin in result["calibration_bins"]:
        assert bin["n"] == 0 or bin["low"] - 1e-9 <= bin["confidence"] <= bin["high"] + 1e-9
    assert ("top5_error" in result) == (k > 5)
    assert result.get("top5_error", 0) <= result["top1_error"]
    shifted = metrics(logits + 3, labels, classes)  # softmax is invariant to a constant
    assert shifted["loss"] == pytest.approx(result["loss"], abs=1e-5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed % 1000))
    assert metrics(logits[order], labels[order], classes)["confusion"] == result["confusion"]
    json.dumps(result, allow_nan=False)


def test_the_interval_matches_resampled_images() -> None:
    logits, labels, classes = outputs(400, 10, 5)
    result = metrics(logits, labels, classes, seed=7)
    wrong = (logits.argmax(dim=1) != labels).numpy()
    generator = np.random.default_rng(1)
    errors = [100 * wrong[generator.integers(0, 400, 400)].mean() for _ in range(10_000)]
    assert result["top1_interval"] == pytest.approx(np.percentile(errors, [2.5, 97.5]), abs=0.5)  # two images of 400
    assert result["top1_interval"][0] < result["top1_error"] - 3 and result["top1_interval"][1] > result["top1_error"] + 3
    assert metrics(logits, labels, classes, seed=7) == result


def test_extreme_logits_and_other_precisions() -> None:
    logits = torch.tensor([[0.0, 5000.0, -5000.0], [80.0, 0.0, 0.0]])
    result = metrics(logits, torch.tensor([0, 0]), list("abc"))
    assert result["loss"] == pytest.approx(2500)
    assert result["calibration_error"] == pytest.approx(50)
    half = metrics(logits.to(torch.bfloat16).requires_grad_(), torch.tensor([0, 0]), list("abc"))
    assert half["top1_error"] == 50


def test_ties_go_to_the_first_class() -> None:
    result = metrics(torch.zeros(8, 8), torch.arange(8), [str(i) for i in range(8)])
    assert [row[0] for row in result["confusion"]] == [1] * 8
    assert (result["top1_error"], result["top5_error"]) == (87.5, 37.5)


def test_no_images_and_non_finite_logits_are_rejected() -> None:
    with pytest.raises(UserError, match="no images"):
        metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), list("abc"))
    logits = torch.zeros(4, 3)
    logits[1, 2], logits[3, 0] = math.nan, math.inf
    with pytest.raises(UserError, match="2 of 4 images"):
        metrics(logits, torch.zeros(4, dtype=torch.int64), list("abc"))


@pytest.mark.parametrize(
    ("logits", "labels", "classes"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), "abc"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), "abc"),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64), "abc"),
        (torch.zeros(4, 3), torch.zeros(4), "abc"),
        (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), "ab"),
        (torch.zeros(4, 3), torch.full((4,), 3), "abc"),
        (torch.zeros(4, 3), torch.full((4,), -1), "abc"),
    ],
)
def test_inconsistent_arguments_raise_value_error(logits: torch.Tensor, labels: torch.Tensor, classes: str) -> None:
    with pytest.raises(ValueError) as error:
        metrics(logits, labels, list(classes))
    assert not isinstance(error.value, UserError)
