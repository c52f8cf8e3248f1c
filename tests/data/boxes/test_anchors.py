"""Anchor recall against torchvision's anchors, and anchor suggestions."""

from pathlib import Path

import numpy as np
import pytest

from boxed import voc, voc_object, voc_xml
from reslearn.data.boxes.anchors import AnchorLevel, anchor_recall, scaled_boxes, shape_iou, suggest_anchors
from reslearn.data.boxes.read import open_boxes


def random_boxes(n: int = 60) -> np.ndarray:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 90, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 70, (n, 2))], axis=1)


def test_recall_matches_torchvisions_anchors() -> None:
    import torch
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import box_iou

    levels = [AnchorLevel(16, (32, 50)), AnchorLevel(32, (64,), (0.5, 1.0, 2.0))]
    generator = AnchorGenerator(tuple(tuple(level.sizes) for level in levels), tuple(tuple(level.ratios) for level in levels))
    generator.cell_anchors = [anchors.double() for anchors in generator.cell_anchors]
    maps = [torch.zeros(1, 1, 128 // level.stride, 160 // level.stride, dtype=torch.float64) for level in levels]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 128, 160), [(128, 160)]), maps)
    boxes = random_boxes()
    expected = box_iou(torch.from_numpy(boxes), anchors.double()).amax(dim=1).numpy()
    fit = anchor_recall(boxes, np.repeat([[128, 160]], len(boxes), axis=0), levels)
    np.testing.assert_allclose(fit.best, expected, rtol=1e-6)
    assert 0 < fit.recall < 1 and fit.recall == (expected >= 0.5).mean()


def test_boxes_are_scaled_like_the_networks_input(tmp_path: Path) -> None:
    image = open_boxes(voc(tmp_path, {"a": voc_xml(voc_object((7, 1, 60, 40)))}))["train"].images
    boxes, sizes = scaled_boxes(image, 80, 1000)
    assert boxes.tolist() == [[12, 0, 120, 80]] and sizes.tolist() == [[80, 120]]
    boxes, sizes = scaled_boxes(image, 80, 90)
    assert boxes.tolist() == [[9, 0, 90, 60]] and sizes.tolist() == [[60, 90]]


def test_suggestions_recover_the_shapes() -> None:
    shapes = np.array([[10, 20], [40, 40], [100, 50]], np.float64)
    noise = np.random.default_rng(0).uniform(0.95, 1.05, (300, 2))
    sizes = np.repeat(shapes, 100, axis=0) * noise
    boxes = np.concatenate([np.zeros_like(sizes), sizes], axis=1) + 7
    suggested = suggest_anchors(boxes, 3)
    np.testing.assert_allclose(suggested, shapes, rtol=0.03)
    np.testing.assert_array_equal(suggested, suggest_anchors(boxes, 3, seed=0))
    assert len(suggest_anchors(np.tile([[0, 0, 5, 5]], (9, 1)), 4)) == 1
    with pytest.raises(ValueError, match="no boxes"):
        suggest_anchors(np.zeros((0, 4)))
    with pytest.raises(ValueError, match="no boxes"):
        anchor_recall(np.zeros((0, 4)), np.zeros((0, 2)), [AnchorLevel(16, (32,))])


def test_smaller_and_suggested_anchors_fit_bccd_better(real_data: Path) -> None:
    train = open_boxes(real_data / "bccd", bad="drop", only=["train"])["train"]
    boxes, sizes = scaled_boxes(train.images, 240, 400)
    paper = anchor_recall(boxes, sizes, [AnchorLevel(16, (128, 256, 512))])
    better = anchor_recall(boxes, sizes, [AnchorLevel(16, (24, 48, 96))])
    assert paper.recall < 0.5 < 0.9 < better.recall
    shapes = boxes[:, 2:] - boxes[:, :2]
    assert (
        shape_iou(shapes, suggest_anchors(boxes, 9)).max(axis=1).mean()
        > shape_iou(shapes, AnchorLevel(16, (24, 48, 96)).shapes()).max(axis=1).mean()
    )
