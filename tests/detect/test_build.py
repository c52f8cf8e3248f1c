"""Detectors on every supported network: split, size, a training step; and rejected networks and options."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import reslearn
from detect.small import TINY, detector, pictures, target
from reslearn import Card, UserError
from reslearn.data.preprocess import Preprocessing
from reslearn.detect import Detector, create_detector
from reslearn.detect.backbone import split
from reslearn.detect.build import assemble
from reslearn.detect.settings import make_settings
from reslearn.nets.zoo import TABLE

# without the 1000-layer networks, which take half a minute each and are split like the shallower ones
STAGED = [name for name, row in TABLE.items() if row.build is None and row.depth < 400]


@pytest.mark.parametrize("name", [*STAGED, "vgg11", "vgg16", "vgg16-bn", "vgg19"])
def test_every_network_is_split_before_its_last_stage(name: str) -> None:
    with torch.device("meta"):
        model = create_detector(name, 2)
        halves = split(reslearn.create(name))
        image = torch.zeros(1, 3, 96, 128)
    row = TABLE[name]
    features = model.eval().backbone(image)["0"]
    assert features.shape == (1, halves.channels, 96 // halves.stride, 128 // halves.stride)
    if row.stem == "imagenet":
        assert halves.stride == 16, "conv1 to conv4_x, or VGG's thirteen convolutions, have a total stride of 16"
    pooled = torch.zeros(3, halves.channels, halves.roi, halves.roi, device="meta")
    assert model.roi_heads.box_head(pooled).shape == (3, model.roi_heads.box_predictor.cls_score.in_features)
    # every layer of the network except its classifier is there once, with its own name
    with torch.device("meta"):
        net = dict(reslearn.create(name).state_dict())
    own = [key.removeprefix("backbone.").removeprefix("roi_heads.box_head.") for key in model.state_dict()]
    *backbone, _, _ = net
    assert [key for key in own if key in net] == [key for key in net if key in backbone]


@pytest.mark.parametrize(("name", "millions"), [("resnet50", 33), ("resnet101", 52), ("vgg16", 137)])
def test_the_papers_detectors_have_the_right_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_detector(name, 20)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def step(model: Detector, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One step of SGD; the losses after it must be finite."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    torch.stack(list(model(images, targets).values())).sum().backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    optimizer.step()
    losses = model(images, targets)
    assert all(loss.isfinite() for loss in losses.values()), losses
    assert any(name.startswith("backbone.") for name in used) and any(name.startswith("roi_heads.box_head") for name in used)
    return losses


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "vgg16"])
def test_full_size_detectors_load_trained_weights_and_train(name: str) -> None:
    torch.manual_seed(0)
    net = reslearn.create(name)
    model = create_detector(net, 20, min_size=64, max_size=96, anchors=(16, 32), regions=8, proposals=(20, 10))
    trained = net.state_dict()
    own = {key.removeprefix("backbone.").removeprefix("roi_heads.box_head."): t for key, t in model.state_dict().items()}
    *backbone, _, _ = trained
    assert all(torch.equal(own[key], trained[key]) for key in backbone)
    del net, trained, own
    (image,) = pictures((64, 80))
    step(model, [image], [target(image, (8, 8, 40, 48), label=20)])
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert found["boxes"].shape == (len(found["labels"]), 4)


REPRESENTATIVE = ["resnet18", "plain18", "preact-resnet18", "resnet8", "plain20", "highway-19", "stochastic-resnet110", "vgg11-bn"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in REPRESENTATIVE),
        ("resnet8", {"roi": "pool"}),
        ("resnet8", {"context": True}),
        ("resnet8", {"masks": True, "context": True}),
        ("resnet18", {"kind": "fpn", "masks": True, "context": True}),
        ("resnet8", {"kind": "fpn"}),
        ("preact-resnet18", {"kind": "fpn"}),
        ("resnet8", {"channels": 1}),
    ],
    ids=str,
)
def test_every_kind_trains_with_and_without_objects(name: str, options: dict) -> None:
    model = detector(name, **{**options, "min_size": 64, "max_size": 96})
    images = pictures((64, 80), (64, 48), channels=options.get("channels", 3))
    boxes = ((8.0, 8.0, 40.0, 48.0), (30.0, 20.0, 70.0, 60.0))
    losses = step(model, images, [target(images[0], *boxes, label=3), target(images[1])])
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} <= set(losses)
    assert ("loss_mask" in losses) == bool(options.get("masks"))
    empty = model(images, [target(image) for image in images])
    assert all(loss.isfinite() for loss in empty.values())
    assert empty["loss_box_reg"] == 0 and empty.get("loss_mask", torch.zeros(())) == 0
    with torch.no_grad():
        for image, found in zip(images, model.eval()(images), strict=True):
            assert found["boxes"].isfinite().all() and found["boxes"].numel() // 4 == len(found["scores"])
            assert ("masks" in found) == bool(options.get("masks"))
            if options.get("masks"):
                assert found["masks"].shape == (len(found["boxes"]), 1, *image.shape[-2:])


def test_a_few_steps_learn_one_object() -> None:
    """A bright square on a dark background, with its mask."""
    torch.manual_seed(0)
    model = create_detector("resnet8", 1, masks=True, **{**TINY, "anchors": (8, 16), "proposals": (60, 24)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    image = torch.full((3, 32, 32), 0.1)
    image[:, 8:22, 10:26] = 0.9
    truth = target(image, (10, 8, 26, 22))
    for _ in range(40):
        optimizer.zero_grad()
        torch.stack(list(model([image, image], [truth, truth]).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert found["scores"][0] > 0.5
    assert (found["boxes"][0] - truth["boxes"][0]).abs().max() < 3
    assert ((found["masks"][0, 0] > 0.5) == truth["masks"][0].bool()).float().mean() > 0.9


def test_frozen_layers_and_frozen_batch_norm_do_not_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    view = Preprocessing(channels=3, size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    card = Card(net="resnet8", classes=tuple("abcd"), preprocessing=view)
    reslearn.save(reslearn.create("resnet8", 4), tmp_path / "c.safetensors", card)
    options = {**TINY, "anchors": (8, 16)}
    model = create_detector(tmp_path / "c.safetensors", ["x"], frozen=2, **options)
    assert model.settings.batch_norm == "frozen" and model.transform.image_mean == [0.4, 0.5, 0.6]
    live = create_detector(tmp_path / "c.safetensors", ["x"], frozen=2, batch_norm="live", **options)
    for each in (model, live):
        before = {name: tensor.clone() for name, tensor in each.state_dict().items()}
        (image,) = pictures((32, 40))
        step(each, [image], [target(image, (4, 4, 20, 24))])
        changed = {name for name, tensor in each.state_dict().items() if not torch.equal(tensor, before[name])}
        kept = ("backbone.conv1", "backbone.bn1", "backbone.layer1")
        assert not [name for name in changed if name.startswith(kept)] and "backbone.layer2.0.conv1.weight" in changed
        assert any("running_mean" in name for name in changed) == (each is live)


def test_frozen_2_freezes_conv1_and_conv2_of_vgg() -> None:
    with torch.device("meta"):
        net, view = reslearn.create("vgg16"), Preprocessing(channels=3, size=(224, 224), mean=(0.5,) * 3, std=(0.2,) * 3)
        model = assemble(net, ("a", "b"), make_settings("c4", 0, {"frozen": 2}), view, None)
    kept = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    layers = [0, 2, 5, 7]  # conv1_1, conv1_2, conv2_1, conv2_2 of VGG-16
    assert kept == [f"backbone.features.{i}.{kind}" for i in layers for kind in ("weight", "bias")]


def test_a_mean_image_becomes_channel_means(tmp_path: Path) -> None:
    mean = torch.rand(3, 8, 8)
    view = Preprocessing(channels=3, size=(8, 8), mean=(0.0,) * 3, std=(0.5,) * 3, pixel_mean=Preprocessing.encode_pixel_mean(mean))
    card = Card(net="resnet8", classes=("a", "b"), preprocessing=view)
    reslearn.save(reslearn.create("resnet8", 2), tmp_path / "c.safetensors", card)
    model = create_detector(tmp_path / "c.safetensors", 1)
    assert model.transform.image_mean == pytest.approx(mean.mean((1, 2)).tolist(), abs=1e-5)
    assert model.transform.image_std == [0.5] * 3


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ("resnt50", {}, "no network called 'resnt50'; did you mean"),
        ("densenet121", {}, "detection does not support DenseNet"),
        ("alexnet", {}, "detection does not support AlexNet"),
        ("vgg16", {"masks": True}, "masks need a network with stages: VGG has none"),
        ("vgg16", {"kind": "fpn"}, "need a network with stages"),
        ("resnet8", {"kind": "c5"}, "kind='c5': must be one of 'c4', 'fpn'"),
        ("resnet8", {"kind": "fpn", "roi": "pool"}, "roi='pool' applies to kind='c4' only"),
        ("resnet8", {"min_sizes": 8}, "a detector has no option 'min_sizes'; did you mean 'min_size'"),
        ("resnet8", {"anchors": (8, -1)}, "anchors and ratios must be above 0"),
        ("resnet8", {"kind": "fpn", "anchors": (8, 16)}, "needs 4 anchors, one per level, not 2"),
        ("resnet8", {"nms": 2}, "detector.nms: must be at most 1"),
        ("resnet8", {"min_size": 900, "max_size": 800}, "max_size=800 is below min_size=900"),
        ("resnet8", {"frozen": 1}, "frozen needs a trained backbone"),
        ("resnet8", {"classes": 0}, "at least 1 class"),
        ("resnet8", {"classes": "cat"}, "must be a list of names or a number"),
        ("resnet8", {"classes": ("a", "a")}, "'a' is given twice"),
    ],
)
def test_invalid_detectors_are_rejected(net: str, options: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError) as caught:
        create_detector(net, **{"classes": 2, **options})
    assert message in str(caught.value)
