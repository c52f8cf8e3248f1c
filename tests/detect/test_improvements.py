"""The test-time improvements, each against a slow version with loops over regions and classes."""

import pytest
import torch
from torch import Tensor

from detect.small import detector, pictures
from reslearn import UserError
from reslearn.detect import Detector, detect, improvements
from reslearn.detect.heads import box_voting
from reslearn.detect.improvements import adjacent, propose, scaled_view

SIZES = ((40, 56), (48, 32))
SCALES = (24, 32, 48)
REGION = 20  # px: the regions of these tests are small
SIDE = 48  # px: the shorter side that REGION refers to


def iou(a: list[float], b: list[float]) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(wide, 0) * max(high, 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inside / (sum(areas) - inside)


def voted(box: list[float], all_: list[tuple[float, list[float]]]) -> list[float]:
    voters = [(score, other) for score, other in all_ if iou(box, other) >= 0.5]
    weight = sum(score for score, _ in voters)
    return [sum(score * other[i] for score, other in voters) / weight for i in range(4)]


def one_view(model: Detector, image: Tensor, side: int, box: Tensor) -> Tensor:
    """The features of one region at one scale, pooled alone; with context, the whole image's features are appended."""
    view, heads = scaled_view(model, image, side), model.roi_heads
    (h, w), (height, width) = view.shape, view.original
    here = box * torch.tensor([w / width, h / height, w / width, h / height])
    own = heads.box_head(heads.box_roi_pool(view.features, [here[None]], [view.shape]))
    if not heads.context:
        return own[0]
    whole = heads.box_head(heads.box_roi_pool(view.features, [torch.tensor([[0.0, 0, w, h]])], [view.shape]))
    return torch.cat([own[0], whole[0]])


def feature(model: Detector, image: Tensor, box: Tensor, scales: tuple[int, ...]) -> Tensor:
    if not scales:
        return one_view(model, image, model.settings.min_size, box)
    side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt()
    height, width = image.shape[-2:]
    sizes = []
    for scale in scales:  # actual sizes, rounded down to whole pixels
        h, w = scaled_view(model, image, scale).shape
        sizes.append(side * (h * w / (height * width)) ** 0.5)
    nearest = REGION * model.settings.min_size / SIDE
    lower = max([i for i, size in enumerate(sizes[:-1]) if size < nearest], default=0)
    pair = [one_view(model, image, scales[i], box) for i in (lower, lower + 1)]
    return torch.tensor([max(a, b) for a, b in zip(*(p.tolist() for p in pair), strict=True)])


def slow(models: list[Detector], image: Tensor, refinement: bool, scales: tuple[int, ...]) -> list[tuple[int, float, list[float]]]:
    """(label, score, box), best first."""
    height, width = image.shape[-2:]

    def predict(box: Tensor) -> tuple[Tensor, Tensor]:
        each = []
        for model in models:
            logits, deltas = model.roi_heads.box_predictor(feature(model, image, box, scales)[None])
            center, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            dx, dy, dw, dh = (deltas.reshape(-1, 4) / torch.tensor([10.0, 10, 5, 5])).unbind(1)
            middle = center + torch.stack([dx, dy], 1) * size
            sides = torch.stack([dw, dh], 1).clamp(max=4.135166556742356).exp() * size  # torchvision's limit, log(1000 / 16)
            each.append((logits.softmax(-1)[0], torch.cat([middle - sides / 2, middle + sides / 2], 1)))
        return sum(s for s, _ in each) / len(each), sum(b for _, b in each) / len(each)  # type: ignore[return-value]

    def clipped(box: Tensor) -> Tensor:
        return torch.tensor([min(max(v, 0), limit) for v, limit in zip(box.tolist(), (width, height) * 2, strict=True)])

    proposals = [box for model in models for box in propose(model, scaled_view(model, image))]
    predictions = [predict(box) for box in proposals]
    if refinement:
        predictions += [predict(clipped(boxes[scores[1:].argmax() + 1])) for scores, boxes in predictions]
    found = []
    for label in range(1, len(predictions[0][0])):
        of_class = [(scores[label].item(), clipped(boxes[label]).tolist()) for scores, boxes in predictions]
        of_class = [(s, b) for s, b in of_class if s > models[0].settings.score and b[2] - b[0] >= 0.01 and b[3] - b[1] >= 0.01]
        kept: list[tuple[float, list[float]]] = []
        for score, box in sorted(of_class, reverse=True):
            if all(iou(box, other) <= models[0].settings.nms for _, other in kept):
                kept.append((score, box))
        found += [(label, score, voted(box, of_class) if refinement else box) for score, box in kept]
    return sorted(found, key=lambda each: -each[1])[: models[0].settings.detections]


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize(
    ("refinement", "scales", "ensemble"),
    [(False, (), 1), (True, (), 1), (False, SCALES, 1), (False, (), 2), (True, SCALES, 2)],
    ids=["plain", "refinement", "scales", "ensemble", "all"],
)
@torch.no_grad()
def test_each_improvement_equals_a_slow_version(
    refinement: bool, scales: tuple[int, ...], ensemble: int, context: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(improvements, "REGION", REGION)
    monkeypatch.setattr(improvements, "PAPER_SIDE", SIDE)
    models = [detector(seed=seed, context=context, proposals=(60, 6)) for seed in range(ensemble)]
    for image in pictures(*SIZES):
        (found,) = detect(models, [image], refinement=refinement, scales=scales)
        expected = slow(models, image, refinement, scales)
        assert len(expected) > 2 and len(found["scores"]) == len(expected)
        assert found["labels"].tolist() == [label for label, _, _ in expected]
        torch.testing.assert_close(found["scores"], torch.tensor([score for _, score, _ in expected]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found["boxes"], torch.tensor([box for _, _, box in expected]), rtol=1e-3, atol=1e-2)


def test_regions_use_the_scales_next_to_the_ideal() -> None:
    sides = torch.tensor([1000.0, 300.0, 150.0, 100.0, 10.0])
    boxes = torch.stack([sides * 0, sides * 0, sides * 2, sides / 2], 1)
    assert adjacent([0.5, 1.0, 2.0, 4.0], boxes).tolist() == [0, 0, 1, 2, 2]


def test_box_voting_is_the_weighted_mean_of_overlapping_boxes_of_the_class() -> None:
    torch.manual_seed(0)
    corner = torch.rand(40, 2) * 20
    boxes = torch.cat([corner, corner + 10 + torch.rand(40, 2) * 10], 1)
    scores, labels, kept = torch.rand(40), torch.randint(1, 3, (40,)), torch.tensor([3, 0, 17])
    found = box_voting(kept, boxes, scores, labels)
    assert not torch.allclose(found, boxes[kept], atol=0.5)
    for index, box in zip(kept.tolist(), found, strict=True):
        same = [(scores[i].item(), boxes[i].tolist()) for i in range(40) if labels[i] == labels[index]]
        assert box.tolist() == pytest.approx(voted(boxes[index].tolist(), same), rel=1e-5)


@torch.no_grad()
def test_an_ensemble_of_twins_equals_the_single_model() -> None:
    """The detector's own path against that of the improvements, with duplicate proposals."""
    for options in ({}, {"masks": True}, {"kind": "fpn", "masks": True}):
        model = detector(**options)
        for image in pictures((64, 96), (64, 64)):  # one by one: in a batch, padding changes the border
            (one,), (two,) = model([image]), detect([model, model], [image])
            assert one.keys() == two.keys() and len(one["boxes"]) > 3
            for key in one:
                torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_ensembles_of_different_mask_heads_and_images_without_detections() -> None:
    models = [detector(masks=True), detector(masks=True, kind="fpn", seed=1)]
    (found,) = detect(models, pictures((40, 56)), refinement=True)
    assert found["masks"].shape == (len(found["boxes"]), 1, 40, 56) and 0 < found["masks"].max() <= 1
    nothing = detector(masks=True, score=0.999)
    for options in ({}, {"refinement": True}, {"scales": SCALES}):
        (found,) = detect(nothing, pictures((40, 56)), **options)
        assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, 40, 56)


def test_incompatible_models_and_scales_are_rejected() -> None:
    model, images = detector(), pictures((32, 32))
    with pytest.raises(UserError, match="must have the same classes"):
        detect([model, detector(classes=2)], images)
    with pytest.raises(UserError, match="must all have masks, or none"):
        detect([model, detector(masks=True)], images)
    with pytest.raises(UserError, match=r"scales=\(32,\): must be two or more"):
        detect(model, images, scales=(32,))
    with pytest.raises(UserError, match="ascending"):
        detect(model, images, scales=(48, 32))
    with pytest.raises(UserError, match=r"call model\.eval\(\) first"):
        detect(detector().train(), images)
    with pytest.raises(UserError, match="at least one model"):
        detect([], images)
