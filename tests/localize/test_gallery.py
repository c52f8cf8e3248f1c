"""The pictures of a run against painted pixels, and the shares by IoU against a loop over images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localization_runs import guesses
from painted_sets import write_set
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.read import open_boxes
from reslearn.detect.gallery import FOUND, TRUTH
from reslearn.localize.error import THRESHOLDS, best_overlaps, is_right
from reslearn.localize.evaluate import View, errors
from reslearn.localize.gallery import RIGHT, WORST, save_examples, save_gallery
from reslearn.localize.views import Single, of_one_kind


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[BoxSet, Single]:
    data = open_boxes(write_set(tmp_path_factory.mktemp("gallery") / "set", {"test": 60}))["test"]
    return data, of_one_kind(data)


def test_shares_by_iou_match_a_loop_over_images(painted: tuple[BoxSet, Single]) -> None:
    data, truth = painted
    view = guesses(truth, 2, 0.8, 4)
    found = errors(view.order, view.boxes, truth, data.classes)
    for at, iou in enumerate(THRESHOLDS):
        given = [is_right([k], view.boxes[i, [k]], k, truth.boxes[i], iou) for i, k in enumerate(truth.labels)]
        first = [int(each) for each in view.order[:, 0]]
        pairs = enumerate(zip(first, truth.labels, strict=True))
        top1 = [is_right([c], view.boxes[i, [c]], k, truth.boxes[i], iou) for i, (c, k) in pairs]
        assert found["true_class"]["right_by_iou"][at] == pytest.approx(100 * np.mean(given))
        assert found["top1"]["right_by_iou"][at] == pytest.approx(100 * np.mean(top1))
    assert found["true_class"]["right_by_iou"][10] == pytest.approx(100 - found["true_class"]["error"])
    assert 0 < found["top1"]["right_by_iou"][10] < found["true_class"]["right_by_iou"][10] < 100


def has(path: Path, color: tuple[int, int, int], box: np.ndarray) -> bool:
    """Whether most of a box's edge has a color, in a picture of a 52 x 40 px image."""
    pixels = np.asarray(Image.open(path)).astype(int)
    assert pixels.shape[1] == 320
    x1, y1, x2, y2 = (box * 320 / 52).round().astype(int)
    near = np.abs(pixels - color).max(axis=2) < 60
    edge = np.concatenate([near[y1:y2, x1 + 2], near[y1:y2, x2 - 3], near[y1 + 2, x1:x2], near[y2 - 3, x1:x2]])
    return bool(edge.mean() > 0.6)


def test_the_worst_images_of_each_class_and_correct_ones(painted: tuple[BoxSet, Single], tmp_path: Path) -> None:
    data, truth = painted
    view, other = guesses(truth, 2, 0.6, 1), guesses(truth, 2, 2.0, 2)
    said = save_gallery(tmp_path, data, truth, {"1-crop": other, "dense": view})
    assert said["gallery_view"] == "dense" and json.loads(json.dumps(said)) == said
    overlaps = best_overlaps(view.boxes, truth.labels, truth.boxes)
    place = {image.name: i for i, image in enumerate(data.images)}
    worst, right = ([one for one in said["gallery"] if one["kind"] == kind] for kind in ("worst", "right"))
    assert len(worst) == WORST and len(right) == RIGHT and len({one["image"] for one in said["gallery"]}) == WORST + RIGHT
    for label, name in enumerate(data.classes):
        mine = sorted(overlaps[truth.labels == label])
        assert [one["iou"] for one in worst if one["label"] == name] == pytest.approx(mine[: WORST // 2], abs=1e-4)
    assert [one["label"] for one in worst[::2]] != [one["label"] for one in worst[1::2]], "alternating classes"
    ious = [one["iou"] for one in right]
    good = overlaps[overlaps >= 0.5]
    assert ious == sorted(ious) and [ious[0], ious[-1]] == pytest.approx([good.min(), good.max()], abs=1e-4)
    for one in said["gallery"]:
        i = place[one["name"]]
        assert one["iou"] == pytest.approx(overlaps[i], abs=1e-4) and one["predicted"] == data.classes[view.order[i, 0]]
        guess = view.boxes[i, truth.labels[i]]
        assert has(tmp_path / one["image"], FOUND, guess)
        if one["iou"] < 0.3:  # the boxes do not cover each other
            assert has(tmp_path / one["image"], TRUTH, truth.boxes[i][0])


def test_all_images_correct_or_all_wrong(painted: tuple[BoxSet, Single], tmp_path: Path) -> None:
    data, truth = painted
    exact = np.stack([np.tile(boxes[0], (2, 1)) for boxes in truth.boxes])
    for boxes, kind in ((exact, "right"), (exact * 0, "worst")):
        scores = np.random.default_rng(0).normal(size=(60, 2))
        rows = save_gallery(tmp_path, data, truth, {"1-crop": View(np.argsort(-scores), scores, boxes)})["gallery"]
        assert {one["kind"] for one in rows} == {kind}
    own = scores[np.arange(60), truth.labels]
    by_score = [data.images[i].name for i in np.argsort(-own)]
    assert [one["name"] for one in rows if one["label"] == "disc"] == [n for n in by_score if int(Path(n).stem) % 2 == 0][:6]


def test_a_sheet_of_examples(painted: tuple[BoxSet, Single], tmp_path: Path) -> None:
    data, _ = painted
    save_examples(tmp_path, [(data.images[i].pixels()[:40, :40], [np.array([4.0, 4, 30, 30])], []) for i in range(11)])
    sheet = np.asarray(Image.open(tmp_path / "images" / "examples.jpg")).astype(int)
    assert sheet.shape == (2 * 130 - 2, 8 * 130 - 2, 3)
    assert np.abs(sheet[30:80, 14] - TRUTH).max(axis=1).mean() < 80 and (sheet[135:, 3 * 130 + 5 :] > 240).all()
    save_examples(tmp_path, [(data.images[0].pixels()[:40, :40], [], [])] * 99)
    with Image.open(tmp_path / "images" / "examples.jpg") as most:
        assert most.size == (8 * 130 - 2, 3 * 130 - 2)
