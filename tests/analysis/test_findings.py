"""Sentences say what the numbers are."""

from reslearn.analysis.findings import of_lesion, of_paths
from reslearn.analysis.lesion import Lesion
from reslearn.analysis.paths import Paths


def test_of_lesions_medians_extremes_and_means_are_said() -> None:
    single: dict[str, float | None] = {"a": 12.0, "b": 70.0, "c": 11.0, "d": None}
    several, orders = {1: [20.0, 30.0], 2: [50.0]}, [(0.9, 30.0), (0.5, 80.0), (0.9, 10.0), (1.0, 10.0)]
    said = of_lesion(Lesion(10.0, single, several, orders, ["b", "d"], {"a": 40.0, "b": 90.0, "c": 20.0, "d": 90.0}))
    assert said == [
        "The whole network errs on 10.00%.",
        "Without one block that keeps its shape the error grows by 1.50 points (median).",
        "Without one block that changes its shape it grows by 60.00 points (median).",
        "The block that is missed most is b: +60.00 points; least, c: +1.00.",
        "With one block's weights shuffled it grows by 20.00 points (median, shape kept).",
        "Without k blocks at random: 1: 25.0%, 2: 50.0%",
        "In another order, by Kendall's tau to the trained one, it errs on 20.0% at 0.90, 80.0% at 0.50.",
    ]


def test_of_paths_the_range_the_mean_and_the_ends_are_said() -> None:
    said = of_paths(Paths(2, [0.25, 0.5, 0.25], [4.0, 2.0, 1.0], [0.4, 0.5, 0.1], (0, 2), 1.0, [[4.0], [2.0], [1.0]]))
    assert "Paths of 0 to 2 blocks, 100% of all, carry 95% of the gradient." in said
    assert "The gradient has come through 0.7 blocks on the average." in said
    assert "A path through all branches has 0.25 times the norm of the gradient of the one through none." in said
