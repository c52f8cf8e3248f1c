"""Grad-CAM against its closed form for a linear layer after average pooling."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reslearn import UserError, create
from reslearn.analysis.explain import grad_cam, large_view
from reslearn.analysis.parts import stem
from reslearn.data.preprocess import Preprocessing
from small_nets import batch, network


@pytest.mark.parametrize("name", ["resnet8", "preact-resnet8"])
def test_grad_cam_is_the_weighted_sum_of_the_last_maps(name: str) -> None:
    model, (images, _) = network(name), batch(1)
    target = int(model(images).argmax())
    heat = grad_cam(model, images, target)
    with torch.no_grad():
        maps = model.end(model.layer3(model.layer2(model.layer1(stem(model, images)))))
        # The logit is linear in the pooled maps: its gradient is the last layer's row, divided by the number of positions.
        weights = model.fc.weight[target] / maps[0, 0].numel()
        slow = F.relu((maps[0] * weights[:, None, None]).sum(0))
    slow = F.interpolate(slow[None, None], (16, 16), mode="bilinear", align_corners=False)[0, 0]
    assert slow.max() > 0 and torch.allclose(heat, slow / slow.max(), atol=1e-5)
    assert not torch.allclose(heat, grad_cam(model, images, (target + 1) % 4), atol=1e-2), "another class, another heat map"


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "densenet121", "googlenet"])
def test_baselines_have_a_last_map(name: str) -> None:
    image = torch.randn(1, 3, 64, 64)
    heat = grad_cam(create(name, 4).eval(), image, 1)
    assert heat.shape == (64, 64) and heat.min() >= 0 and heat.max() <= 1


def test_a_network_without_a_last_map_is_rejected() -> None:
    with pytest.raises(UserError, match="Grad-CAM does not support this network"):
        grad_cam(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)), torch.randn(1, 3, 4, 4), 0)


@pytest.mark.parametrize(("shape", "ratio", "expected"), [((40, 80, 3), 1.0, (40, 40)), ((300, 240, 1), 0.5, (120, 120))])
def test_the_large_view_shows_what_the_network_sees(shape: tuple[int, ...], ratio: float, expected: tuple[int, int]) -> None:
    image = np.zeros(shape, np.uint8)
    image[shape[0] // 2 :, : shape[1] // 2] = 250
    n = shape[2]
    view = Preprocessing(channels=n, size=(8, 8), crop_ratio=ratio, mean=(0.0,) * n, std=(1.0,) * n)
    large = large_view(image, view)
    assert large.shape == (*expected, n)
    small = F.interpolate(torch.from_numpy(large).permute(2, 0, 1)[None].float(), (8, 8), mode="area")[0]
    assert (small - view.fit(image).float()).abs().mean() < 8
    assert large_view(image[:4, :4], view).shape == (8, 8, n), "no smaller than the network's input"
