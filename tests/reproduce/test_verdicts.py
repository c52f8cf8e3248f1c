"""Means, intervals and verdicts, compared with numbers worked out by hand and with scipy's quantiles of Student's t."""

import pytest

from reslearn.reproduce.experiment import Comparison, Effect
from reslearn.reproduce.verdicts import T95, compare_to_paper, estimate, summarize


def test_summary_of_three_values() -> None:
    summary = summarize([1.0, 2.0, 3.0])
    assert summary["mean"] == 2 and summary["std"] == 1
    # 4.303 / sqrt(3)
    assert summary["interval"] == pytest.approx([2 - 2.4843, 2 + 2.4843], abs=1e-3)
    assert summarize([5.0])["interval"] is None


def test_students_t() -> None:
    assert [T95[n - 1] for n in (1, 2, 5, 10, 15)] == [12.706, 4.303, 2.571, 2.228, 2.131]
    assert list(T95) == sorted(T95, reverse=True)
    many = summarize([0.0, 1.0] * 20)
    assert many["interval"][1] - many["mean"] == pytest.approx(1.96 * many["std"] / 40**0.5)


@pytest.mark.parametrize(
    ("values", "verdict", "disagree"),
    [
        ([3.0, 3.1, 2.9], "holds", []),
        ([-3.0, -3.1, -2.9], "differs", []),
        ([3.0, 0.1, -1.0], "undecided", [2]),
        ([3.0], "undecided", []),
    ],
)
def test_an_effect_holds_if_its_interval_is_above_zero(values: list[float], verdict: str, disagree: list[int]) -> None:
    claim = estimate(
        Effect("a above b", {"a": 1.0, "b": -1.0}),
        {"a": {i: v + 10 for i, v in enumerate(values)}, "b": dict.fromkeys(range(len(values)), 10.0)},
    )
    assert claim["verdict"] == verdict and claim["disagree"] == disagree
    assert claim["effect"]["values"] == pytest.approx(values)


def test_a_difference_of_differences() -> None:
    terms = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    values = {"a": {0: 9.0, 4: 9.5}, "b": {0: 1.0, 4: 1.0}, "c": {0: 4.0, 4: 4.0}, "d": {0: 2.0, 4: 12.0}}
    claim = estimate(Effect("", terms), values)
    assert claim["disagree"] == [], "16.5 agrees"
    assert claim["effect"]["values"] == [6.0, 16.5]


def test_disagreeing_seeds_are_listed() -> None:
    claim = estimate(Effect("", {"a": 1.0, "b": -1.0}), {"a": {0: 3.0, 2: 1.0, 7: 3.0}, "b": {0: 1.0, 2: 1.5, 7: 1.0}})
    assert claim["disagree"] == [2]


def test_published_numbers_are_compared_only_under_the_papers_protocol() -> None:
    row = Comparison("ResNet-20", "resnet20", 8.75, tolerance=0.5)
    assert compare_to_paper(row, [30.0], False)["verdict"] == "not comparable"
    assert compare_to_paper(row, [30.0], False)["difference"] is None
    assert compare_to_paper(row, [9.2], True)["verdict"] == "holds"
    assert compare_to_paper(row, [9.3], True)["verdict"] == "differs"
    assert compare_to_paper(row, [9.3], True)["difference"] == pytest.approx(0.55)
    assert compare_to_paper(Comparison("loss", "resnet20"), [1.0], True)["verdict"] == ""
