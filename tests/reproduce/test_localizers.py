"""Tables 13 and 14: shared runs, numbers equal to those of localize eval, ensembles and intervals worked out by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boxed
from reslearn import UserError
from reslearn.localize.evaluate import evaluate
from reslearn.localize.views import Single
from reslearn.reproduce import localizers
from reslearn.reproduce.catalog import EXPERIMENTS
from reslearn.reproduce.experiment import ExperimentOptions
from reslearn.reproduce.localizers import SETUPS, SeedPredictions, _claim
from reslearn.reproduce.run import reproduce


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    return boxed.shapes(boxed.shapes(root / "set", images=8), images=4, split="test")


def test_both_tables_share_runs(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": str(data), "out": tmp_path / "out", "quiet": True, "device": "cpu"}
    with pytest.raises(UserError, match="not all networks of this experiment are trained"):
        reproduce(EXPERIMENTS["table13"], "smoke", training=False, **options)
    result = reproduce(EXPERIMENTS["table13"], "smoke", seeds=1, **options)
    ours = {row["what"]: row["ours"] and row["ours"]["mean"] for row in result["rows"]}
    published = [row["published"] for row in result["rows"]]
    assert published == [33.1, 13.3, 11.7, None, 14.4, 10.6, 4.6] and ours["VGG-16, 1 crop, true class given"] is None
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    seed = folder / "seed-0"
    expected = evaluate(seed / "regions", folder / "windows", scales=SETUPS["smoke"].dense, classifier=seed / "classes")
    for what, view, key in (
        ("Boxes, 1 crop, true class given", "1-crop", "true_class"),
        ("Boxes, dense, true class given", "dense", "true_class"),
        ("Boxes, dense, then R-CNN, predicted class", "refined", "top1"),
        ("Class only", "refined", "classification"),
    ):
        assert ours[what] == pytest.approx(expected[view][key]["error"])
    assert (tmp_path / "out" / result["picture"]).read_bytes().startswith(b"\x89PNG") and len(result["claims"]) == 3
    assert {claim["verdict"] for claim in result["claims"]} == {"undecided"}, "two steps decide nothing"
    with pytest.raises(UserError, match="use --seeds 2 or more"):
        reproduce(EXPERIMENTS["table14"], "smoke", seeds=1, **options)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}

    before = times()
    (folder / "seed-1" / "regions").mkdir(parents=True)  # an empty folder is not a run
    other = reproduce(EXPERIMENTS["table14"], "smoke", **options)
    assert [row["published"] for row in other["rows"]] == [29.9, 26.7, 25.3, 10.6, 8.9, 9.0]
    assert other["rows"][3]["ours"]["n"] == 2 and other["claims"][0]["effect"]["n"] == 2 and other["seeds"] == 2
    assert before.items() <= times().items(), "seed 0 is not trained or tested again"
    again = reproduce(EXPERIMENTS["table14"], "smoke", training=False, **options)
    assert again["rows"] == other["rows"]


def test_ensemble_by_hand(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    """Two networks and three images: the mean of the class scores gives the class, the higher box score the box."""
    good, bad = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    truth = Single(np.array([0, 1, 1]), (np.array([good]),) * 3)

    def predictions(class_0: list[float], scores: list[list[float]], right: list[list[int]]) -> SeedPredictions:
        chances = np.stack([class_0, 1 - np.array(class_0)], 1)
        boxes = np.array([[good if correct else bad for correct in row] for row in right])
        return SeedPredictions(chances, {"refined": np.argsort(-chances, 1)}, {"refined": np.array(scores)}, {"refined": boxes})

    first = predictions([0.9, 0.6, 0.3], [[1.0, -9], [0, 2], [0, -1]], [[1, 0], [0, 1], [0, 1]])
    second = predictions([0.4, 0.1, 0.4], [[2.0, -9], [0, 1], [0, 3]], [[0, 0], [0, 0], [0, 0]])
    monkeypatch.setattr(localizers, "_predict", lambda options, setup: (truth, [first, second]))
    options = ExperimentOptions(str(data), str(data), 2, tmp_path, "cpu", lambda line: None)
    monkeypatch.setattr(localizers, "_measured", lambda rows, claims, options, images: (rows, claims))
    rows, claims = localizers.measure_ensemble(SETUPS["small"], options)  # type: ignore[misc]
    # Image 0: class 0 (mean 0.65), the second's box, wrong. 1: class 1, the first's box. 2: class 1, the second's box, wrong.
    assert rows[-1]["ours"]["mean"] == pytest.approx(200 / 3)
    # By itself, the first is wrong on image 1 (class 0) and the second on all three.
    assert rows[3]["ours"]["values"] == pytest.approx([100 / 3, 100])
    assert claims[0]["effect"]["mean"] == pytest.approx(0) and claims[0]["verdict"] == "undecided"


def test_intervals_are_paired_over_the_images() -> None:
    before = [np.array([True] * 30 + [False] * 70)] * 2
    same = _claim("", before, before)
    assert same["effect"]["interval"] == [0, 0] and same["verdict"] == "undecided"
    after = [np.array([False] * 20 + [True] * 10 + [False] * 70)] * 2
    claim = _claim("", before, after)
    samples = 100 * np.random.default_rng(1).binomial(100, 0.2, 20_000) / 100  # 20 images differ, in one direction
    assert claim["effect"]["mean"] == pytest.approx(20) and claim["verdict"] == "holds"
    assert claim["effect"]["interval"] == pytest.approx(np.percentile(samples, [2.5, 97.5]).tolist(), abs=1)
    assert _claim("", after, before)["verdict"] == "differs"
