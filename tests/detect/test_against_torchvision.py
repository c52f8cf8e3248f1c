"""Pyramids against torchvision's models with the same weights; precise and frozen BN against PyTorch's."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from detect.small import pictures, target
from reslearn.detect import create_detector
from reslearn.detect.backbone import FixedBatchNorm, freeze_batch_norm
from reslearn.training.precise_bn import precise_bn
from small_nets import batch, network


@pytest.mark.parametrize("masks", [False, True], ids=["faster", "mask"])
def test_a_pyramid_equals_torchvisions_model(masks: bool) -> None:
    torch.manual_seed(0)
    theirs = (maskrcnn_resnet50_fpn if masks else fasterrcnn_resnet50_fpn)(
        weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=160, box_score_thresh=0.3
    ).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 1, 4)
            nn.init.normal_(module.running_mean, std=0.1)
    nn.init.normal_(theirs.roi_heads.box_predictor.cls_score.weight, std=0.1)
    options = {"kind": "fpn", "masks": masks, "min_size": 96, "max_size": 160, "score": 0.3}
    live, frozen = (create_detector("resnet50-v1.5", 3, batch_norm=kind, **options).eval() for kind in ("live", "frozen"))
    state = theirs.state_dict()
    live.load_state_dict(state)
    frozen.load_state_dict({key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")})
    images = pictures((96, 128), (104, 80))
    with torch.no_grad():
        expected = theirs(images)
        for ours in (live, frozen):
            for mine, one in zip(ours(images), expected, strict=True):
                assert len(one["boxes"]) > 3 and mine.keys() == one.keys()
                for key, tensor in one.items():
                    torch.testing.assert_close(mine[key], tensor, rtol=1e-4, atol=1e-4)
    targets = [target(images[0], (10, 10, 60, 60), (30, 20, 120, 90)), target(images[1])]
    live.eval()
    torch.manual_seed(1)
    losses = live.losses(images, targets)
    for part in (theirs, theirs.rpn, theirs.roi_heads):
        part.training = True
    torch.manual_seed(1)
    expected = theirs(images, targets)
    assert set(losses) == set(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-4, atol=1e-4)
    assert not any(module.training for module in live.modules())


def test_frozen_batch_norm_is_a_fixed_function() -> None:
    net = network("resnet8")
    x, _ = batch()
    with torch.no_grad():
        before = net(x)
        freeze_batch_norm(net)
        torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
        net.train()(x * 9)
        torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_batch_norm_equals_torchvisions_and_keeps_the_dtype(precision: str) -> None:
    torch.manual_seed(0)
    theirs, mine = FrozenBatchNorm2d(16), FixedBatchNorm(16)
    for buffer in theirs.buffers():
        nn.init.uniform_(buffer, 0.5, 2)
    mine.load_state_dict(theirs.state_dict())
    x, kind = torch.randn(2, 16, 5, 6), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x = x.to(memory_format=torch.channels_last).to(kind)
    outputs, gradients = [], []
    for layer in (theirs, mine):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = layer(leaf)
        (y * torch.arange(y.numel()).reshape(y.shape).sin()).sum().backward()
        outputs.append(y)
        gradients.append(leaf.grad)
    limit = {"rtol": 1e-5, "atol": 1e-5} if precision == "fp32" else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(outputs[1], outputs[0].to(kind), **limit)
    torch.testing.assert_close(gradients[1], gradients[0], **limit)
    assert outputs[1].dtype == gradients[1].dtype == kind and outputs[1].is_contiguous(memory_format=torch.channels_last)


def test_precise_bn_averages_over_all_batches() -> None:
    net = network("resnet8")
    batches = [batch(seed=seed)[0] for seed in range(3)]
    precise_bn(net, batches)
    first = torch.stack([net.conv1(x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(net.bn1.running_mean, first, rtol=1e-4, atol=1e-5)
    assert net.bn1.momentum == 0.1 and not any(module.training for module in net.modules())
