"""The review of a detector against pycocotools and against matching again."""

import json
from typing import Any

import numpy as np
import pytest

import detection_oracles as oracles
from reslearn.data.boxes.box_set import Objects
from reslearn.evaluation.average_precision import class_ap, coco
from reslearn.evaluation.detection_errors import count_mistakes, mistakes
from reslearn.evaluation.detection_review import Threshold, above, review, thresholds, worst_mistakes
from reslearn.evaluation.matching import Matches, match


@pytest.fixture(scope="module", params=[1, 2])
def scene(request: pytest.FixtureRequest) -> tuple[list[Objects], list[dict[str, Any]], Matches]:
    truth, given = oracles.scene(np.random.default_rng(request.param), images=20, crowds=0.1, hard=0.1)
    return truth, given, match(truth, given, "abc")


def names(matches: Matches) -> list[str]:
    return [f"{i}.jpg" for i in range(len(matches.truth))]


def test_curves_match_pycocotools(scene: tuple[list[Objects], list[dict[str, Any]], Matches]) -> None:
    truth, given, matches = scene
    theirs = oracles.evaluated(truth, given, 3).eval["precision"]  # IoU, recall, class, area, limit
    result = review(matches, names(matches))
    assert [(curve["class"], curve["iou"]) for curve in result["curves"]] == [(c, iou) for c in "abc" for iou in (0.5, 0.75)]
    for curve in result["curves"]:
        expected = 100 * theirs[{0.5: 0, 0.75: 5}[curve["iou"]], :, "abc".index(curve["class"]), 0, 2]
        assert np.allclose(curve["precision"], expected, atol=6e-4)
    ap = 100 * class_ap(matches, "coco", ious=(0, 5))[0]
    assert np.allclose([np.mean(curve["precision"]) for curve in result["curves"]], ap.T.ravel(), atol=6e-4)


def test_ap_by_size_averages_to_cocos_metrics(scene: tuple[list[Objects], list[dict[str, Any]], Matches]) -> None:
    _, _, matches = scene
    rows = review(matches, names(matches))["by_size"]
    for area, key in (("all", "AP"), ("small", "AP_small"), ("medium", "AP_medium"), ("large", "AP_large")):
        values = [row[area] for row in rows if row[area] is not None]
        assert coco(matches)[key] == (pytest.approx(np.mean(values)) if values else None)
        assert all((row[area] is None) == (row["objects"][area] == 0) for row in rows)


def test_thresholds_have_the_highest_f1(scene: tuple[list[Objects], list[dict[str, Any]], Matches]) -> None:
    truth, given, matches = scene
    for k, cut in enumerate(thresholds(matches)):
        best: tuple[float, float] = (0.0, 0.0)
        for score in {float(s) for one in given for s in one["scores"]}:
            again = match(truth, [only(one, score, k + 1) for one in given], "abc")
            right = (again.hit & ~again.ignored)[:, 0, 0].sum()
            counted, total = (~again.ignored)[:, 0, 0].sum(), again.positives[:, k, 0].sum()
            best = max(best, (2 * right / (counted + total), score))
        assert cut is not None and (cut.f1, cut.score) == best
        assert cut.f1 == pytest.approx(2 * cut.precision * cut.recall / (cut.precision + cut.recall))


def only(given: dict[str, Any], score: float, label: int | None = None) -> dict[str, Any]:
    keep = np.array(given["scores"]) >= score
    keep &= (np.array(given["labels"]) == label) | (label is None)
    return {key: np.array(given[key])[keep] for key in ("boxes", "labels", "scores")}


def test_above_equals_matching_again(scene: tuple[list[Objects], list[dict[str, Any]], Matches]) -> None:
    truth, given, matches = scene
    cut = above(matches, [Threshold(0.5, 0, 0, 0)] * 3)
    again = match(truth, [only(one, 0.5) for one in given], "abc")
    assert 0 < len(cut.score) < len(matches.score)
    for name in ("image", "label", "rank", "score", "hit", "ignored", "matched", "voc_hit"):
        assert np.array_equal(getattr(cut, name), getattr(again, name)), name
    assert count_mistakes(mistakes(cut)) == count_mistakes(mistakes(again))
    assert len(above(matches, [None] * 3).score) == 0


def test_a_review_is_json_and_lists_the_worst_mistakes(scene: tuple[list[Objects], list[dict[str, Any]], Matches]) -> None:
    _, _, matches = scene
    result = review(matches, names(matches), limit=5)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    kept = result["mistakes"]["kept"]
    assert all(kept[kind] <= n for kind, n in result["mistakes"]["all"].items() if kind != "missed")
    alarms = [row for row in result["worst"] if row["kind"] != "missed"]
    assert len(alarms) == 5 and len(result["worst"]) == 5 + min(5, kept["missed"])
    assert [row["score"] for row in alarms] == [m.score for m in mistakes(matches)[:5]]
    for row, mistake in zip(result["worst"], worst_mistakes(matches, 5), strict=True):
        assert row["name"] == f"{mistake.image}.jpg" and (row["label"] is None) == (row["kind"] == "missed")
        assert (row["truth"] is None) == (row["kind"] == "background") and (row["box"] is None) == (row["score"] is None)


def test_the_largest_missed_object_of_each_class_comes_first() -> None:
    truth = [Objects.of([(0, 0, 9, 9), (0, 0, 50, 50), (60, 60, 80, 80), (0, 60, 30, 90)], [1, 1, 2, 1])]
    nothing = {"boxes": [], "labels": [], "scores": []}
    matches = match(truth, [nothing], ["cell", "plate"])
    assert thresholds(matches) == [None, None]
    assert [m.object for m in worst_mistakes(matches)] == [1, 2, 3, 0]
    result = review(matches, ["x"])
    assert result["thresholds"][0] == {"class": "cell", "score": None, "precision": None, "recall": None, "f1": None}
    assert result["curves"][0]["precision"] == [0] * 101


def test_equal_scores_are_kept_or_dropped_together() -> None:
    truth = [Objects.of([(0, 0, 10, 10)], [1])]
    given = {"boxes": [(0, 0, 10, 10), (20, 20, 30, 30), (40, 40, 50, 50)], "labels": [1, 1, 1], "scores": [0.5, 0.5, 0.4]}
    matches = match(truth, [given], ["cell"])
    assert thresholds(matches) == [Threshold(0.5, 0.5, 1.0, 2 / 3)]
    assert above(matches, thresholds(matches)).index.tolist() == [0, 1]
