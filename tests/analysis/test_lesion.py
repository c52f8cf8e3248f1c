"""Networks with removed blocks, against networks built without them."""

import pytest
import torch
from torch import nn

from reslearn import UserError, create
from reslearn.analysis.lesion import kendall_tau, layer_cuts, lesion, shuffled
from reslearn.analysis.parts import Deleted, blocks, replaced
from reslearn.analysis.subject import error
from small_nets import batch, network


@pytest.mark.parametrize("name", ["resnet14", "preact-resnet14", "plain14"])
def test_a_deleted_block_is_a_network_without_it(name: str) -> None:
    model, (images, labels) = network(name), batch(20)
    without = network(name)
    without.layer2[1] = nn.Identity()  # type: ignore[index]
    result = lesion(model, images, labels, draws=1)
    assert result.single["layer2.1"] == error(without, images, labels)
    assert result.whole == error(model, images, labels) and list(result.single) == list(blocks(model))
    assert result.resizing == ["layer2.0", "layer3.0"]
    with replaced(model, {"layer2.1": Deleted(blocks(model)["layer2.1"])}):
        assert torch.equal(model(images), without(images)) and not torch.equal(model(images), network(name)(images))


def test_deleting_a_block_that_changes_the_shape_leaves_its_shortcut() -> None:
    model = network("resnet8", shortcut="B")
    block = blocks(model)["layer2.0"]
    x = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        assert block.downsample is not None and torch.equal(Deleted(block)(x), block.downsample(x).relu())
        preact = blocks(network("preact-resnet8"))["layer2.0"]
        assert preact.downsample is not None
        assert torch.equal(Deleted(preact)(x), preact.downsample(preact.bn1(x).relu()))


@pytest.mark.parametrize("name", ["resnet20", "plain20", "preact-resnet20"])
def test_the_model_is_unchanged(name: str) -> None:
    model, (images, labels) = network(name), batch()
    before, weights = list(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    lesion(model, images, labels, draws=1)
    assert [(n, id(m)) for n, m in model.named_modules()] == [(n, id(m)) for n, m in before]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_modules_are_restored_after_an_error() -> None:
    model = network("resnet8")
    block = blocks(model)["layer1.0"]
    with pytest.raises(RuntimeError, match="stop"), replaced(model, {"layer1.0": nn.Identity()}):
        raise RuntimeError("stop")
    assert model.get_submodule("layer1.0") is block


def test_a_layer_removed_from_a_plain_network() -> None:
    model, (images, labels) = network("plain14"), batch(20)
    result = lesion(model, images, labels, draws=1)
    assert {name for name, e in result.single.items() if e is None} == {"layer2.0", "layer3.0"}, "they change the shape"
    fixed = {"conv1", "layer2.0.conv1", "layer3.0.conv1"}
    assert len(result.layers) == 13 and {name for name, e in result.layers.items() if e is None} == fixed
    block = network("plain14").layer2[1]  # type: ignore[index]
    other = network("plain14")
    other.layer2[1] = nn.Sequential(block.conv1, block.bn1, nn.ReLU())  # type: ignore[index,union-attr]
    with replaced(model, layer_cuts(model, images)["layer2.1.conv2"]):
        assert torch.allclose(model(images), other(images), atol=1e-6)
    assert result.layers["layer2.1.conv2"] == error(other, images, labels)
    assert lesion(network("resnet14"), images, labels, draws=1).layers == {}


def test_layers_of_vgg_can_be_removed_and_of_densenet_cannot() -> None:
    images, labels = batch(4, side=32)
    model = create("vgg11-bn", 4).eval()
    result = lesion(model, images, labels, draws=1)
    assert result.single == {} and result.orders == [] and list(result.several) == [1, 2, 3, 4]
    assert [name for name, e in result.layers.items() if e is not None] == [f"features.{i}" for i in (11, 18, 22, 25)]
    with pytest.raises(UserError, match="no block or layer that can be removed"):
        lesion(create("densenet-40-12", 4).eval(), images, labels)


def test_shuffled_weights_have_the_same_values() -> None:
    block = blocks(network("resnet14", shortcut="C"))["layer2.1"]
    other = shuffled(block, 0)
    for (name, one), two in zip(block.named_parameters(), other.parameters(), strict=True):
        if name.startswith("conv"):
            assert not torch.equal(one, two) and torch.equal(one.flatten().sort().values, two.flatten().sort().values)
        else:
            assert torch.equal(one, two), "BN and shortcut are unchanged"
    model, (images, labels) = network("resnet14"), batch(20)
    result = lesion(model, images, labels, draws=1, seed=3)
    with replaced(model, {"layer3.0": shuffled(blocks(model)["layer3.0"], 3)}):
        assert result.shuffled["layer3.0"] == error(model, images, labels)


def test_reordering_and_kendalls_tau() -> None:
    result = lesion(network("resnet20"), *batch(), draws=2)
    assert all(-1 <= tau <= 1 for tau, _ in result.orders) and len(result.orders) >= 8
    assert kendall_tau("abcd", "abcd") == 1 and kendall_tau("abcd", "dcba") == -1
    assert kendall_tau("abcd", "bacd") == pytest.approx(4 / 6)


def test_the_seed_determines_the_random_choices() -> None:
    model, (images, labels) = network("resnet20"), batch(30)
    one = lesion(model, images, labels, draws=2, seed=1)
    assert lesion(model, images, labels, draws=2, seed=1) == one and lesion(model, images, labels, draws=2, seed=2) != one
    assert list(one.several) == [1, 2, 4, 5, 7] and len(one.several[7]) == 1, "removing all is a single choice"
