"""Findings state the right numbers."""

from reslearn.analysis.findings import of_lesion, of_paths
from reslearn.analysis.lesion import Lesion
from reslearn.analysis.paths import Paths


def test_lesion_findings_give_medians_extremes_and_means() -> None:
    single: dict[str, float | None] = {"a": 12.0, "b": 70.0, "c": 11.0, "d": None}
    several, orders = {1: [20.0, 30.0], 2: [50.0]}, [(0.9, 30.0), (0.5, 80.0), (0.9, 10.0), (1.0, 10.0)]
    assert of_lesion(Lesion(10.0, single, several, orders, ["b", "d"], {"a": 40.0, "b": 90.0, "c": 20.0, "d": 90.0})) == [
        "Test error of the whole network: 10.00%.",
        "Removing one block that keeps the shape increases the error by 1.50 points (median).",
        "Removing one block that changes the shape increases it by 60.00 points (median).",
        "The most important block is b: +60.00 points; the least, c: +1.00.",
        "Shuffling the weights of a block that keeps the shape increases it by 20.00 points (median).",
        "Mean error without k random blocks: 1: 25.0%, 2: 50.0%.",
        "Mean error with reordered blocks, by Kendall's tau: 20.0% at 0.90, 80.0% at 0.50.",
    ]


def test_path_findings_give_the_range_the_mean_and_the_ends() -> None:
    lines = of_paths(Paths(2, [0.25, 0.5, 0.25], [4.0, 2.0, 1.0], [0.4, 0.5, 0.1], (0, 2), 1.0, [[4.0], [2.0], [1.0]]))
    assert "Paths of 0 to 2 blocks, 100% of all, carry 95% of the gradient." in lines
    assert "The gradient comes through 0.7 blocks on average." in lines
    assert "The path through all branches has 0.25 times the gradient norm of that through none." in lines
