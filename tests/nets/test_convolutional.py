"""A fully convolutional network gives the classifier's logits at each position."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from reslearn import UserError, create
from reslearn.nets import models, spec
from reslearn.nets.convolutional import convolutional
from small_nets import network

SMALL = [name for name in models() if not name.startswith("vgg") and not name.endswith(("200", "1001", "1202", "152", "152-v1.5"))]


@pytest.mark.parametrize("name", [*SMALL, "vgg11", "vgg16-bn"])
def test_at_the_classifiers_size_the_logits_are_equal(name: str) -> None:
    side = 32 if spec(name).stem == "cifar" else 96
    net = network(name)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, logits = net(images), convolutional(net, (side, side))(images)
    assert logits.shape == (2, 4, 1, 1)
    torch.testing.assert_close(logits[:, :, 0, 0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{"pool": "ceil"}, {"order": "full"}, {"shortcut": "A"}], ids=str)
def test_options_of_residual_networks(options: dict[str, str]) -> None:
    net = network("resnet18", **options)
    images = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(convolutional(net, (64, 80))(images)[:, :, 0, 0], net(images))


def test_converted_vgg16_equals_the_original_at_224() -> None:
    torch.manual_seed(0)
    original = torchvision.models.vgg16(num_classes=1000).eval()
    ours = create("vgg16").eval()
    ours.load_state_dict(original.state_dict())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, net = original(images), convolutional(ours, (224, 224))
        logits = net(images)
        larger = net(torch.randn(1, 3, 256, 320))
    torch.testing.assert_close(logits[:, :, 0, 0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert larger.shape == (1, 1000, 2, 4)
    kinds = [(m.in_channels, m.out_channels, m.kernel_size) for m in net[1:] if isinstance(m, nn.Conv2d)]
    assert kinds == [(512, 4096, (7, 7)), (4096, 4096, (1, 1)), (4096, 1000, (1, 1))]
    assert net[1].weight.data_ptr() == ours.classifier[0].weight.data_ptr(), "shared: fc6 alone is 411 MB"


@pytest.mark.parametrize(("name", "side"), [("resnet18", 64), ("vgg11", 96), ("alexnet", 96), ("densenet121", 64)])
def test_each_position_is_the_head_applied_to_its_window_of_features(name: str, side: int) -> None:
    net = network(name)
    features = nn.Sequential(*[*net.children()][: -2 if hasattr(net, "avgpool") else -1])
    if name == "densenet121":
        features.append(nn.ReLU())
    tail = net.fc if hasattr(net, "fc") else net.classifier
    pool = getattr(net, "avgpool", nn.AdaptiveAvgPool2d(1))
    images = torch.randn(1, 3, side + 40, side + 70, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        h, w = features(torch.zeros(1, 3, side, side)).shape[2:]
        map = features(images)
        windows = F.unfold(map, (h, w)).unflatten(1, (-1, h, w))  # (1, C, h, w, positions)
        expected = torch.stack([tail(torch.flatten(pool(windows[..., i]), 1)) for i in range(windows.shape[-1])], -1)
        logits = convolutional(net, (side, side))(images)
    assert logits.shape[2:] == (map.shape[2] - h + 1, map.shape[3] - w + 1) and logits[0, 0].numel() > 2
    torch.testing.assert_close(logits.flatten(2), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_unsupported_networks_are_rejected() -> None:
    with pytest.raises(UserError, match="Sequential cannot be applied to larger images"):
        convolutional(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)), (32, 32))
