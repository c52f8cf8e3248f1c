"""Responses against a layer-by-layer forward pass."""

import pytest
import torch
from torch.nn import functional as F

from reslearn import UserError, create
from reslearn.analysis import responses as module
from reslearn.analysis.parts import convolutions
from reslearn.analysis.responses import Response, responses
from small_nets import batch, network


def test_responses_match_a_forward_pass_layer_by_layer() -> None:
    model, (images, _) = network("resnet8"), batch()
    measured = responses(model, images)
    assert [r.layer for r in measured] == ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2))]
    assert all(r.at == r.layer.replace("conv", "bn") for r in measured)
    with torch.no_grad():
        out = model.bn1(model.conv1(images))
        expected = [out.std()]
        x = F.relu(out)
        for stage in (1, 2, 3):
            block = model.get_submodule(f"layer{stage}.0")
            first = block.bn1(block.conv1(x))
            second = block.bn2(block.conv2(F.relu(first)))
            expected += [first.std(), second.std()]
            x = F.relu(second + (x if block.downsample is None else block.downsample(x)))
    assert [r.std for r in measured] == pytest.approx([e.item() for e in expected], rel=1e-5)


def test_a_preactivation_network_records_where_each_response_is_measured() -> None:
    """The first layer's output goes into the second layer's BN, the second's into the addition."""
    model, (images, _) = network("preact-resnet8"), batch()
    measured = {r.layer: r for r in responses(model, images)}
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(images)))
        block = model.get_submodule("layer1.0")  # the first block: its input is already activated
        first = block.bn2(block.conv1(x))
        second = block.conv2(F.relu(first))
    assert measured["layer1.0.conv1"] == Response("layer1.0.conv1", "layer1.0.bn2", pytest.approx(first.std().item(), rel=1e-5))
    assert measured["layer1.0.conv2"] == Response("layer1.0.conv2", "layer1.0.conv2", pytest.approx(second.std().item(), rel=1e-5))


def test_the_chunk_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, _) = network("resnet8"), batch(20)
    whole = responses(model, images)
    monkeypatch.setattr(module, "chunks", lambda tensor: ((part,) for part in tensor.split(7)))
    assert [r.std for r in responses(model, images)] == pytest.approx([r.std for r in whole], rel=1e-6)


def test_only_3x3_layers_count() -> None:
    assert len(responses(create("resnet50", 4).eval(), torch.randn(2, 3, 32, 32))) == 16
    vgg = responses(create("vgg11", 4).eval(), torch.randn(1, 3, 32, 32))
    assert [r.layer for r in vgg] == [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)], "in execution order"
    assert all(r.at == r.layer for r in vgg), "there is no BN"
    highway = responses(network("highway-19"), batch()[0])
    assert len(highway) == 18 and not any("gate" in r.layer for r in highway), "gates are not counted"
    with pytest.raises(UserError, match="has no 3x3 layer"):
        responses(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), batch()[0])


def test_each_convolution_is_paired_with_its_bn() -> None:
    pairs = convolutions(network("resnet14", shortcut="B"), batch()[0])
    assert pairs["layer2.0.downsample.0"] == "layer2.0.downsample.1" and pairs["layer2.0.conv2"] == "layer2.0.bn2"
    assert None not in pairs.values()
    assert convolutions(create("vgg11-bn", 4).eval(), torch.randn(1, 3, 32, 32))["features.0"] == "features.1"
