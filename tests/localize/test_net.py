"""The per-class network against slow implementations: anchors, scores, boxes, losses; and files."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reslearn
from reslearn import UserError
from reslearn.data.preprocess import Preprocessing
from reslearn.detect import create_detector, load_detector, save_detector
from reslearn.localize.losses import EXAMPLES, losses, match
from reslearn.localize.net import Localizer, LocalizerSettings, create_localizer, flat, load_localizer, save_localizer
from reslearn.weights.store import read_card

VIEW = Preprocessing(channels=3, size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
CLASSES = ("a", "b", "c")


def localizer(net: str = "resnet8", anchors: tuple[tuple[float, float], ...] = ((8, 8), (16, 10)), seed: int = 0) -> Localizer:
    """A localizer in evaluation mode, with predictions that differ between positions."""
    torch.manual_seed(seed)
    model = create_localizer(net, CLASSES, LocalizerSettings(anchors=anchors, hidden=16), VIEW)
    for layer in (model.hidden, model.scores, model.deltas):
        nn.init.normal_(layer.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize(("net", "stride"), [("resnet8", 4), ("plain8", 4), ("resnet18", 32), ("vgg11-bn", 16)])
def test_anchors_and_output_shapes(net: str, stride: int) -> None:
    model = localizer(net)
    with torch.no_grad():
        logits, deltas, anchors = model(torch.randn(2, 3, 64, 96))
    h, w = 64 // stride, 96 // stride
    assert logits.shape == (2, h * w * 2, 3) and deltas.shape == (2, h * w * 2, 3, 4)
    slow = []
    for row in range(h):
        for column in range(w):
            y, x = (row + 0.5) * stride, (column + 0.5) * stride
            slow += [[x - a / 2, y - b / 2, x + a / 2, y + b / 2] for a, b in ((8, 8), (16, 10))]
    torch.testing.assert_close(anchors, torch.tensor(slow))


def test_outputs_are_ordered_by_anchor_and_class() -> None:
    """A bias of the 1x1 layers changes only the outputs of one anchor and class."""
    model = localizer()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        model.scores.bias[1 * 3 + 2] += 1  # type: ignore[index]
        model.deltas.bias[(1 * 3 + 2) * 4 + 3] += 1  # type: ignore[index]
        after = model(x)
    moved, turned = (after[0] - before[0])[0], (after[1] - before[1])[0]
    expected = torch.zeros_like(moved)
    expected[1::2, 2] = 1
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    expected = torch.zeros_like(turned)
    expected[1::2, 2, 3] = 1
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def slow_best(logits: Tensor, deltas: Tensor, anchors: Tensor, side: int) -> tuple[list, list]:
    """The highest score and its box for each class, computed with scalars (Girshick et al., 2014, appendix C)."""
    scores, boxes = [], []
    for k in range(logits.shape[1]):
        p = max(range(len(anchors)), key=lambda p: float(logits[p, k]))
        x1, y1, x2, y2 = anchors[p].tolist()
        dx, dy, dw, dh = deltas[p, k].tolist()
        w, h, x, y = x2 - x1, y2 - y1, (x1 + x2) / 2, (y1 + y2) / 2
        x, y, w, h = x + dx * w, y + dy * h, w * math.exp(dw), h * math.exp(dh)
        scores.append(float(logits[p, k]))
        boxes.append([min(max(v, 0), side) for v in (x - w / 2, y - h / 2, x + w / 2, y + h / 2)])
    return scores, boxes


def test_the_best_box_of_each_class() -> None:
    model = localizer()
    x = torch.randn(3, 3, 32, 32)
    top, boxes = model.best(x)
    with torch.no_grad():
        logits, deltas, anchors = model(x)
    for i in range(3):
        scores, slow = slow_best(logits[i], deltas[i], anchors, 32)
        assert top[i].tolist() == pytest.approx(scores)
        torch.testing.assert_close(boxes[i], torch.tensor(slow), atol=1e-4, rtol=1e-4)
    assert len({tuple(box) for box in boxes.reshape(-1, 4).tolist()}) == 9, "boxes of classes and images differ"


def slow_iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.mark.parametrize("seed", range(5))
def test_anchor_matching(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    anchors = localizer().anchors_of(8, 8)
    corner = torch.rand(2, 2, generator=generator) * 16
    boxes = torch.cat([corner, corner + 6 + torch.rand(2, 2, generator=generator) * 8], 1)
    found = match(anchors, boxes, (0.3, 0.5))
    table = [[slow_iou(a, b) for a in anchors.tolist()] for b in boxes.tolist()]
    for p in range(len(anchors)):
        column = [row[p] for row in table]
        best = max(range(2), key=column.__getitem__)
        forced = any(row[p] > max(row) - 1e-6 for row in table)  # the best anchor of a box
        expected = best if column[best] >= 0.5 or forced else -1 if column[best] < 0.3 else -2
        assert found[p] == expected
    assert {-1, -2} < set(found.tolist())


def test_losses_match_scalar_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """All eligible anchors are sampled: at most 2 positive and 6 negative ones per image."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [30, 30, 40, 40], [50, 50, 60, 60], [4, 0, 14, 10]])
    boxes = [torch.tensor([[0.0, 0, 10, 11]]), torch.tensor([[30.0, 31, 41, 40]])]
    labels, generator = torch.tensor([2, 0]), torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 3, 4, generator=generator)
    found = losses(logits, deltas, anchors, boxes, labels, (0.3, 0.7))
    sampled = {
        (0, 0): 1,
        (0, 1): 1,
        (0, 2): 0,
        (0, 3): 0,
        (1, 0): 0,
        (1, 1): 0,
        (1, 2): 1,
        (1, 3): 0,
        (1, 4): 0,
    }  # (0, 4) is ignored
    scores = regression = 0.0
    for (i, p), positive in sampled.items():
        for k in range(3):
            sigmoid = 1 / (1 + math.exp(-float(logits[i, p, k])))
            scores -= math.log(sigmoid if positive and k == labels[i] else 1 - sigmoid)
        if positive:
            (x1, y1, x2, y2), (a1, b1, a2, b2) = boxes[i][0].tolist(), anchors[p].tolist()
            w, h, aw, ah = x2 - x1, y2 - y1, a2 - a1, b2 - b1
            wanted = [(x1 + x2 - a1 - a2) / 2 / aw, (y1 + y2 - b1 - b2) / 2 / ah, math.log(w / aw), math.log(h / ah)]
            for have, want in zip(deltas[i, p, labels[i]].tolist(), wanted, strict=True):
                d = abs(have - want)
                regression += d - 0.5 / 9 if d >= 1 / 9 else 0.5 * 9 * d * d
    assert found["scores"].item() == pytest.approx(scores / len(sampled), rel=1e-5)
    assert found["boxes"].item() == pytest.approx(regression / len(sampled), rel=1e-5)


def test_eight_anchors_per_image_half_positive() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10 + i / 10] for i in range(9)] + [[50.0, 50, 60, 60 + i] for i in range(30)])
    logits = torch.zeros(1, len(anchors), 2, requires_grad=True)
    found = losses(logits, torch.zeros(*logits.shape, 4), anchors, [anchors[:1]], torch.tensor([1]), (0.3, 0.7))
    found["scores"].backward()
    used = logits.grad.abs().sum((0, 2)) > 0  # type: ignore[union-attr]
    assert used.sum() == EXAMPLES == 8 and used[:9].sum() == 4
    assert found["scores"].item() == pytest.approx(2 * math.log(2)), "sum over classes, mean over anchors"


def test_a_localizer_starts_from_a_classifier_and_loads_from_a_file(tmp_path: Path) -> None:
    card = reslearn.Card(net="resnet8", classes=("x", "y"), preprocessing=VIEW)
    torch.manual_seed(3)
    file = reslearn.save(reslearn.create("resnet8", 2), tmp_path / "c.safetensors", card)
    model = create_localizer(reslearn.load(file), CLASSES, LocalizerSettings(anchors=((8, 8),)), VIEW).eval()
    torch.testing.assert_close(model.backbone.conv1.weight, reslearn.load(file).conv1.weight)
    path = save_localizer(model, tmp_path / "l.safetensors")
    again = load_localizer(path)
    x = torch.randn(1, 3, 40, 32)
    assert all(torch.equal(one, two) for one, two in zip(model.best(x), again.best(x), strict=True))
    assert again.classes == CLASSES and not again.training
    assert save_localizer(again, tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert "localizer" not in json.loads(read_card(file).model_dump_json())


def test_other_kinds_of_files_are_rejected(tmp_path: Path) -> None:
    save_localizer(localizer(), tmp_path / "l.safetensors")
    save_detector(create_detector("resnet8", 2), tmp_path / "d.safetensors")
    with pytest.raises(UserError, match=r"l\.safetensors holds a localizer, not a classification network"):
        reslearn.load(tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=r"d\.safetensors is not a localizer"):
        load_localizer(tmp_path / "d.safetensors")
    with pytest.raises(UserError, match=r"l\.safetensors holds a localizer, not a detector: use reslearn localize eval"):
        load_detector(tmp_path / "l.safetensors")
    for name, kind in (("l", "localizer"), ("d", "detector")):
        with pytest.raises(UserError, match=rf"{name}\.safetensors holds a {kind}: a backbone must be a classification model"):
            create_detector(tmp_path / f"{name}.safetensors", 2)
    with pytest.raises(UserError, match="localization does not support CifarDenseNet"):
        create_localizer("densenet-40-12", CLASSES, LocalizerSettings(anchors=((8, 8),)), VIEW)


def test_a_mean_image_becomes_channel_means() -> None:
    mean = torch.rand(3, 32, 32)
    view = VIEW.model_copy(update={"pixel_mean": Preprocessing.encode_pixel_mean(mean)})
    assert flat(view).mean == pytest.approx(mean.mean((1, 2)).tolist(), rel=1e-5)
    assert flat(view).pixel_mean is None and flat(VIEW) is VIEW


def test_a_localizer_overfits_two_images() -> None:
    """Two images of two classes with different boxes: after some steps, the predicted boxes match."""
    torch.manual_seed(0)
    model = create_localizer("resnet8", ("a", "b"), LocalizerSettings(anchors=((10, 10), (20, 20))), VIEW)
    x = torch.zeros(2, 3, 32, 32)
    boxes = [torch.tensor([[2.0, 3, 12, 15]]), torch.tensor([[10.0, 8, 31, 28]])]
    for i, (x1, y1, x2, y2) in enumerate(b[0].int().tolist() for b in boxes):
        x[i, i, y1:y2, x1:x2] = 1
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        sum(losses(*model(x), boxes, torch.tensor([0, 1]), (0.3, 0.7)).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    scores, found = model.best(x)
    assert scores.argmax(1).tolist() == [0, 1]
    for i in range(2):
        assert slow_iou(found[i, i].tolist(), boxes[i][0].tolist()) > 0.8
    assert F.relu(scores).sum() > 0
