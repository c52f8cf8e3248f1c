"""Training examples of detectors: the papers' rules for anchors and regions, against loops over random boxes."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from detect.small import detector, pictures, target
from reslearn import UserError
from reslearn.detect import create_detector

ANCHORS = {"min_size": 96, "max_size": 160, "anchors": (12, 24, 40), "ratios": (0.5, 1.0, 2.0)}


def boxes(count: int, width: int, height: int, generator: torch.Generator) -> Tensor:
    """Random boxes of 6 to 50 px inside an image."""
    sides = 6 + 44 * torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return torch.cat([corner, corner + sides], 1)


def overlap(one: list[float], other: list[float]) -> float:
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return shared / (sum(areas) - shared)


def slow_anchors(anchors: list[list[float]], objects: list[list[float]], width: int, height: int) -> list[tuple[int, int]]:
    """(label, object) of each anchor. Faster R-CNN, section 3.1.2: an object's best anchors and those above 0.7 are positive, those
    below 0.3 with all objects negative; section 3.3: cross-boundary anchors are ignored."""
    inside = [x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height for x1, y1, x2, y2 in anchors]
    table = [
        [overlap(anchor, other) for other in objects] if fits else [-1.0] * len(objects)
        for anchor, fits in zip(anchors, inside, strict=True)
    ]
    best = [max(row[k] for row in table) for k in range(len(objects))]
    found = []
    for row, fits in zip(table, inside, strict=True):
        highest = max(row)
        chosen = highest >= 0.7 or any(math.isclose(iou, top, abs_tol=1e-7) for iou, top in zip(row, best, strict=True))
        found.append((-1 if not fits else 1 if chosen else 0 if highest < 0.3 else -1, row.index(highest)))
    return found


def test_anchors_inside_the_image_are_labeled_as_in_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    model = detector("resnet8", **ANCHORS, anchors_inside=True)
    sizes = [(96, 128), (104, 96)]  # in one batch, both padded
    batch = ImageList(torch.zeros(2, 3, 104, 128), sizes)
    with torch.no_grad():
        anchors = model.rpn.anchor_generator(batch, list(model.backbone(batch.tensors).values()))
    targets = [{"boxes": boxes(6, width, height, generator), "size": (height, width)} for height, width in sizes]
    labels, matched = model.rpn.assign_targets_to_anchors(anchors, targets)
    positive = ignored = 0
    for own, label, match, (height, width), truth in zip(anchors, labels, matched, sizes, targets, strict=True):
        expected = slow_anchors(own.tolist(), truth["boxes"].tolist(), width, height)
        assert label.tolist() == [label for label, _ in expected]
        for i, (kind, which) in enumerate(expected):
            if kind == 1:
                assert torch.equal(match[i], truth["boxes"][which])
        crossing = (own[:, :2] < 0).any(1) | (own[:, 2] > width) | (own[:, 3] > height)
        assert (label[crossing] == -1).all() and 0 < crossing.sum() < len(own)
        positive, ignored = positive + int((label == 1).sum()), ignored + int(crossing.sum())
    plain = detector("resnet8", **ANCHORS)
    usual, _ = plain.rpn.assign_targets_to_anchors(anchors, targets)
    assert positive >= 12 and ignored > 500 and not torch.equal(torch.cat(usual), torch.cat(labels))


def test_the_best_anchor_of_an_object_is_inside_the_image() -> None:
    """Anchors of 34 x 16 px at multiples of 2: the best one, from -1 to 33, crosses the border."""
    model = detector("resnet8", **{**ANCHORS, "anchors": (24,), "ratios": (0.5,)}, anchors_inside=True)
    batch = ImageList(torch.zeros(1, 3, 96, 128), [(96, 128)])
    with torch.no_grad():
        (anchors,) = model.rpn.anchor_generator(batch, list(model.backbone(batch.tensors).values()))
    (label,), _ = model.rpn.assign_targets_to_anchors([anchors], [{"boxes": torch.tensor([[0.0, 0, 33, 6]]), "size": (96, 128)}])
    assert anchors[label == 1][:, 0].tolist() == [1.0] * int((label == 1).sum()) and (label == 1).any()


def test_cross_boundary_anchors_have_no_gradient() -> None:
    """The gradient of the objectness bias is 0 for anchors too large for the image, only with anchors_inside."""
    images = pictures((96, 128))
    targets = [target(images[0], (2.0, 2.0, 40.0, 40.0))]
    grads = {}
    for inside in (True, False):
        model = detector("resnet8", **{**ANCHORS, "anchors": (12, 120)}, anchors_inside=inside).train()
        losses = model.proposal_losses(images, targets)
        (losses["loss_objectness"] + losses["loss_rpn_box_reg"]).backward()
        bias = model.rpn.head.cls_logits.bias.grad
        assert bias is not None
        grads[inside] = bias.reshape(3, 2)  # by ratio, by side
    assert (grads[True][:, 1] == 0).all() and (grads[True][:, 0] != 0).any() and (grads[False][:, 1] != 0).any()


def test_an_image_without_inside_anchors_has_no_proposal_loss() -> None:
    model = detector(
        "resnet8", **{**ANCHORS, "min_size": 48, "max_size": 160, "anchors": (44,), "ratios": (4.0,)}, anchors_inside=True
    )
    (image,) = pictures((48, 64))
    for truth in (target(image, (4.0, 4.0, 40.0, 40.0)), target(image)):
        losses = model.train()([image], [truth])
        assert losses["loss_objectness"] == 0 and losses["loss_rpn_box_reg"] == 0
        total = torch.stack([*losses.values()]).sum()
        total.backward()
        assert total.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_background_regions_are_labeled_as_in_a_loop() -> None:
    """Fast R-CNN, section 2.3: from IoU 0.5, the best object's class; from `background`, background; below, ignored."""
    generator = torch.Generator().manual_seed(4)
    regions = [boxes(200, 128, 96, generator) for _ in range(3)]
    truth = [boxes(4, 128, 96, generator), boxes(1, 128, 96, generator), torch.zeros(0, 4)]
    classes = [torch.tensor([1, 2, 3, 1]), torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]
    seen = {}
    for least in (0.1, 0.3, None):
        heads = detector("resnet8", **ANCHORS, background=least).roi_heads
        matched, labels = heads.assign_targets_to_proposals([each.clone() for each in regions], truth, classes)
        for own, objects, kinds, which, label in zip(regions, truth, classes, matched, labels, strict=True):
            for i, region in enumerate(own.tolist()):
                row = [overlap(region, other) for other in objects.tolist()]
                highest = max(row, default=0.0)
                if highest >= 0.5:
                    assert label[i] == kinds[row.index(highest)] and which[i] == row.index(highest)
                else:
                    assert label[i] == (0 if highest >= (least or 0) or not row else -1)
        seen[least] = int((torch.cat(labels) == -1).sum())
    assert 0 == seen[None] < seen[0.1] < seen[0.3] < 400


def test_a_step_with_the_papers_rules_is_finite_with_and_without_objects() -> None:
    model = detector("resnet8", **ANCHORS, background=0.1, anchors_inside=True).train()
    images = pictures((96, 128), (104, 96))
    for truth in ([target(images[0], (8.0, 8.0, 60.0, 60.0)), target(images[1])], [target(image) for image in images]):
        assert all(loss.isfinite() for loss in model(images, truth).values())


def test_anchors_are_the_same_in_bf16() -> None:
    model, seen = detector("resnet8", **{**ANCHORS, "anchors": (128, 400)}), []
    batch = ImageList(torch.zeros(1, 3, 600, 1000), [(600, 1000)])
    for bf16 in (False, True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            seen += model.rpn.anchor_generator(batch, list(model.backbone(batch.tensors).values()))
    assert all(torch.equal(each, seen[0]) for each in seen) and seen[1].dtype == torch.float32


def test_the_papers_rules_and_pooling_work_in_bf16() -> None:
    """The losses equal those of float32 up to rounding."""
    images = pictures((96, 128), (104, 96))
    truth = [target(images[0], (8.0, 8.0, 60.0, 60.0)), target(images[1], (20.0, 30.0, 50.0, 90.0))]
    losses = {}
    for bf16 in (False, True):
        model = detector("resnet8", **ANCHORS, background=0.1, anchors_inside=True, roi="pool", regions=256).train()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses[bf16] = model(images, truth)
        torch.stack([*losses[bf16].values()]).sum().backward()
    for name, loss in losses[True].items():
        assert loss.item() == pytest.approx(losses[False][name].item(), rel=0.1), name


def test_disabled_settings_are_unset() -> None:
    """Recipes without these settings keep their hash."""
    off = detector("resnet8", background=0, anchors_inside=False).settings
    assert off == detector("resnet8").settings
    assert not {"background", "anchors_inside"} & set(off.model_dump(mode="json", exclude_none=True))
    with pytest.raises(
        UserError, match=r"detector: no anchor fits .* min_size=32: use smaller anchors, or set detector\.anchors_inside=false"
    ):
        create_detector("resnet8", 2, min_size=32, max_size=64, anchors=(32, 64), anchors_inside=True)
    with pytest.raises(UserError, match=r"detector\.background: must be less than 0\.5"):
        create_detector("resnet8", 2, background=0.5)
