"""Average precision against pycocotools and a direct implementation, to 1e-9; intervals against actual resampling."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detection_oracles as oracles
from reslearn.data.boxes.box_set import Objects
from reslearn.data.boxes.masks import runs_of
from reslearn.errors import UserError
from reslearn.evaluation.average_precision import class_ap, coco, compare, detection_metrics, voc
from reslearn.evaluation.matching import match

Scene = tuple[list[Objects], list[dict[str, Any]]]
NONE = {"boxes": [], "labels": [], "scores": []}


def check_coco(truth: list[Objects], detected: list[dict[str, Any]], classes: int = 3) -> None:
    ours = coco(match(truth, detected, [f"c{k}" for k in range(classes)]))
    theirs = oracles.pycocotools(truth, detected, classes)
    assert list(ours) == oracles.NAMES
    for name, value in ours.items():
        assert (-100 if value is None else value) == pytest.approx(theirs[name], abs=1e-9), name


KINDS = {
    "plain": {},
    "crowds": {"crowds": 0.3},
    "difficult": {"hard": 0.3},
    "crowds and difficult": {"crowds": 0.2, "hard": 0.2},
    "ties": {"ties": True},
    "all": {"crowds": 0.2, "hard": 0.2, "ties": True},
    "small": {"side": 40},
    "large": {"side": 500},
    "more than 100": {"images": 2, "classes": 1, "false": 400, "most": 60, "empty": 0},
    "nearly empty": {"empty": 0.8},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_coco_and_voc_on_random_scenes(options: dict[str, Any]) -> None:
    for seed in range(4):
        truth, detected = oracles.scene(np.random.default_rng(seed), **options)
        check_coco(truth, detected)
        direct = [ap for label in (1, 2, 3) if (ap := oracles.voc(truth, detected, label))]
        ours = voc(match(truth, detected, "abc"))
        if not direct:
            assert ours == {"VOC07": None, "VOC10": None}
        else:
            expected = dict(zip(("VOC07", "VOC10"), np.mean(direct, axis=0), strict=True))
            assert ours == pytest.approx(expected, abs=1e-9)


def objects(boxes: Any = (), labels: Any = None, **others: Any) -> Objects:
    return Objects.of(np.array(boxes).reshape(-1, 4), np.ones(len(boxes)) if labels is None else labels, **others)


def detections(*boxes: Any, scores: Any = None, labels: Any = None) -> dict[str, Any]:
    count = len(boxes)
    return {"boxes": boxes, "labels": labels or [1] * count, "scores": scores or [1 - 0.01 * k for k in range(count)]}


A, B = (0, 0, 50, 50), (100, 100, 150, 150)
HALF = (0, 0, 50, 25)  # IoU with A is exactly 0.5
BY_HAND: dict[str, Scene] = {
    "perfect": ([objects([A, B])], [detections(A, B)]),
    "no detections": ([objects([A])], [NONE]),
    "no detections of one class": ([objects([A, B], [1, 2])], [detections(A)]),
    "no objects": ([objects()], [detections(A)]),
    "nothing at all": ([objects()], [NONE]),
    "an empty image among others": ([objects([A]), objects()], [detections(A), detections(A)]),
    "exactly on the threshold": ([objects([A])], [detections(HALF)]),
    "twice": ([objects([A])], [detections(A, A)]),
    "two objects at the same place": ([objects([A, A])], [detections(A, A, A)]),
    "a crowd takes many": ([objects([A, B], crowd=[True, False])], [detections(A, HALF, (0, 0, 10, 10), B)]),
    "a crowd beside its object": ([objects([A, A], crowd=[True, False])], [detections(A, A, A)]),
    "difficult alone": ([objects([A], difficult=[True])], [detections(A, B)]),
    "difficult overlaps": ([objects([A, HALF], difficult=[True, False])], [detections(A, HALF, A)]),
    "ties across images": ([objects([A]), objects([A])], [detections(B, scores=[0.5]), detections(A, scores=[0.5])]),
    "ties in an image": ([objects([A])], [detections(B, A, HALF, scores=[0.5] * 3)]),
    "on the edges of the ranges": ([objects([(0, 0, 32, 32), (0, 0, 96, 96)])], [detections((0, 0, 32, 32), (0, 0, 96, 96))]),
    "no area": ([objects([A])], [detections((5, 5, 5, 5), A)]),
    "overlaps two alike": ([objects([(0, 0, 100, 100), (20, 0, 120, 100)])], [detections((10, 0, 110, 100), (20, 0, 120, 100))]),
    "the 101st is right": ([objects([A])], [detections(*[B] * 100, A, scores=[1 - 0.001 * k for k in range(101)])]),
}


@pytest.mark.parametrize("truth, detected", BY_HAND.values(), ids=BY_HAND)
def test_by_hand(truth: list[Objects], detected: list[dict[str, Any]]) -> None:
    check_coco(truth, detected, 2)
    ours = voc(match(truth, detected, "ab"))
    direct = [ap for label in (1, 2) if (ap := oracles.voc(truth, detected, label))]
    assert [ours["VOC07"], ours["VOC10"]] == (pytest.approx(np.mean(direct, axis=0).tolist()) if direct else [None, None])


def blobs(numbers: np.random.Generator, boxes: np.ndarray, side: int) -> np.ndarray:
    """bool (N, side, side): random masks that fill 90% of their boxes."""
    masks = np.zeros((len(boxes), side, side), bool)
    for mask, (x1, y1, x2, y2) in zip(masks, np.clip(boxes, 0, side).astype(int), strict=True):
        mask[y1:y2, x1:x2] = numbers.random((max(0, y2 - y1), max(0, x2 - x1))) < 0.9
    return masks


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # from pycocotools
@pytest.mark.parametrize("options", [{}, {"crowds": 0.3, "hard": 0.2}, {"side": 40, "ties": True}])
def test_coco_of_masks(options: dict[str, Any]) -> None:
    numbers = np.random.default_rng(0)
    truth, detected = oracles.scene(numbers, **options)
    side = 2 * options.get("side", 200)
    ragged = []
    for objects in truth:
        masks = blobs(numbers, objects.boxes, side)
        fields = {name: getattr(objects, name) for name in ("crowd", "difficult", "ids")}
        areas, drawn = masks.sum(axis=(1, 2)), tuple(runs_of(mask) for mask in masks)
        ragged.append(Objects.of(objects.boxes, objects.labels, areas=areas, segmentations=drawn, **fields))
    detected = [given | {"masks": blobs(numbers, given["boxes"], side)} for given in detected]
    matches = match(ragged, (given | {"masks": given["masks"][:, None] * 0.6} for given in detected), "abc", masks=True)
    assert all(given.masks is None for given in matches.detections)
    theirs = oracles.pycocotools(ragged, detected, 3, "segm")
    ours = {name: -100 if value is None else value for name, value in coco(matches).items()}
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert ours["AP50"] != coco(match(ragged, detected, "abc"))["AP50"]


def test_missing_masks_are_rejected() -> None:
    square = {"masks": np.ones((1, 60, 60), bool)}
    with pytest.raises(ValueError, match="image 0: detections without masks"):
        match([objects([A])], [detections(A)], "a", masks=True)
    with pytest.raises(ValueError, match="image 0: 2 boxes, masks"):
        match([objects([A])], [detections(A, A) | square], "a", masks=True)
    with pytest.raises(UserError, match="image 0 has objects without a segmentation"):
        match([objects([A])], [detections(A) | square], "a", masks=True)
    half = objects([A, B], segmentations=(runs_of(np.ones((60, 60), bool)), None))
    with pytest.raises(UserError, match="image 0: object 1 has no segmentation"):
        match([half], [detections(A) | square], "a", masks=True)


def test_perfect_and_half_recall() -> None:
    perfect = detection_metrics(match([objects([A, B])], [detections(A, B)], ["cell"]), resamples=10)
    assert [perfect[k] for k in ("AP", "AP50", "AP75", "VOC07", "VOC10", "AR1", "AR10")] == [100] * 5 + [50, 100]
    assert perfect["AP_small"] is None and perfect["intervals"]["AP"] == [100, 100] and perfect["objects"] == 2
    assert perfect["per_class"][0] == {
        "class": "cell", "objects": 2, "AP": 100, "AP50": 100, "AP75": 100, "VOC07": 100, "VOC10": 100,
    }  # fmt: skip
    json.dumps(perfect, allow_nan=False)
    json.dumps(detection_metrics(match([objects()], [NONE], ["cell"]), resamples=10), allow_nan=False)
    # half of the objects detected: 6 of 11 recalls, 51 of 101, half the area
    half = detection_metrics(match([objects([A, B])], [detections(A)], ["cell"]), resamples=10)
    assert [half[k] for k in ("VOC07", "AP50", "VOC10")] == pytest.approx([600 / 11, 5100 / 101, 50])


def test_only_voc_counts_more_than_100_detections() -> None:
    truth, detected = BY_HAND["the 101st is right"]
    numbers = match(truth, detected, "ab")
    assert coco(numbers)["AP50"] == 0 and voc(numbers)["VOC10"] == pytest.approx(100 / 101)


def test_weights_are_resampled_images() -> None:
    """An image of weight three counts as three images with the same objects and detections."""
    truth, detected = oracles.scene(np.random.default_rng(5), images=8, crowds=0.1, hard=0.1)
    matches = match(truth, detected, "abc")
    weights = np.random.default_rng(0).multinomial(8, np.full(8, 1 / 8), size=6).astype(float)
    for rule in ("coco", "voc-11", "voc-area"):
        quick = class_ap(matches, rule, ious=(0, 5), weights=weights)
        for row, times in zip(quick, weights.astype(int), strict=True):
            again = np.repeat(np.arange(8), times)
            slow = class_ap(match([truth[i] for i in again], [detected[i] for i in again], "abc"), rule, ious=(0, 5))[0]
            np.testing.assert_allclose(row, slow, atol=1e-12)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    matches = match(*oracles.scene(np.random.default_rng(6)), "abc")
    whole = detection_metrics(matches, resamples=50, seed=3)
    monkeypatch.setattr("reslearn.evaluation.average_precision._CHUNK", 100)
    assert detection_metrics(matches, resamples=50, seed=3) == whole
    assert detection_metrics(matches, resamples=50, seed=4)["intervals"] != whole["intervals"]
    low, high = whole["intervals"]["AP50"]
    assert low < whole["AP50"] < high


def test_comparison_is_paired() -> None:
    truth, detected = oracles.scene(np.random.default_rng(7), images=30, empty=0)
    worse = [{key: np.asarray(values)[::2] for key, values in given.items()} for given in detected]
    a, b = match(truth, worse, "abc"), match(truth, detected, "abc")
    same = compare(b, b, resamples=50)
    assert same["AP"]["difference"] == 0 and same["AP"]["interval"] == [0, 0]
    result = compare(a, b, resamples=200)
    for name, row in result.items():
        assert row["difference"] == pytest.approx(row["other"] - row["one"]) and row["one"] == pytest.approx(
            (coco(a) | voc(a))[name]
        )
    low, high = result["AP50"]["interval"]
    assert 0 < low < result["AP50"]["difference"] < high
    alone = [detection_metrics(m, resamples=200)["intervals"]["AP50"] for m in (a, b)]
    assert high - low < np.hypot(*(end - start for start, end in alone))  # paired resamples give a narrower interval
    with pytest.raises(ValueError, match="same images"):
        compare(a, match(truth[:-1], detected[:-1], "abc"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.5), st.floats(0, 0.5), st.booleans(), st.sampled_from([20, 60, 250]))
def test_coco_on_any_scene(seed: int, crowds: float, hard: float, ties: bool, side: int) -> None:
    check_coco(*oracles.scene(np.random.default_rng(seed), crowds=crowds, hard=hard, ties=ties, side=side))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN score": (detections(A, scores=[float("nan")]), UserError, "NaN or infinite for image 1"),
    "infinite box": (detections((0, 0, 1, float("inf"))), UserError, "NaN or infinite for image 1"),
    "turned box": (detections((5, 0, 1, 1)), ValueError, "image 1: a detection with x2 < x1"),
    "background": (detections(A, labels=[0]), ValueError, "image 1: labels from 0 to 0"),
    "label too large": (detections(A, labels=[3]), ValueError, "labels from 3 to 3, but classes are 1 to 2"),
    "lengths": ({"boxes": [A], "labels": [1, 1], "scores": [1]}, ValueError, "image 1: 1 boxes"),
}


@pytest.mark.parametrize("bad, error, text", BAD.values(), ids=BAD)
def test_bad_detections(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        match([objects([A])] * 2, [NONE, bad], "ab")


def test_bad_arguments() -> None:
    with pytest.raises(UserError, match="no images"):
        match([], [], "a")
    with pytest.raises(ValueError, match="2 images, but detections for 1"):
        match([objects()] * 2, [NONE], "a")
    with pytest.raises(ValueError, match="2 images, but detections for more"):
        match([objects()] * 2, [NONE] * 3, "a")
    with pytest.raises(ValueError, match="an object has label 2, but there are 1"):
        match([objects([A], [2])], [NONE], "a")


def test_tensors_are_accepted() -> None:
    import torch

    given = {"boxes": torch.tensor([A], dtype=torch.float32, requires_grad=True), "labels": torch.tensor([1])}
    assert coco(match([objects([A])], [given | {"scores": torch.tensor([0.5])}], "a"))["AP"] == 100
