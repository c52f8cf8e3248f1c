"""Identifying the network of a state dict, with torchvision and timm as references, on the meta device."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from reslearn import UserError, create
from reslearn.weights.head import adapt_head
from reslearn.weights.read.recognize import recognize

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
TORCHVISION = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50-v1.5",
    "resnet101": "resnet101-v1.5",
    "resnet152": "resnet152-v1.5",
    "alexnet": "alexnet",
    "googlenet": "googlenet",
    **{f"vgg{depth}": f"vgg{depth}" for depth in (11, 13, 16, 19)},
    **{f"vgg{depth}_bn": f"vgg{depth}-bn" for depth in (11, 13, 16, 19)},
    "densenet121": "densenet121",
    "densenet161": "densenet161",
    "densenet169": "densenet169",
    "densenet201": "densenet201",
}


def meta(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """A state dict on the meta device."""
    with torch.device("meta"):
        return dict(make(*args, **kwargs).state_dict())


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("theirs", TORCHVISION)
def test_torchvision_networks_are_recognized(theirs: str) -> None:
    extra = {"init_weights": False} if theirs == "googlenet" else {}
    known = recognize(meta(getattr(torchvision.models, theirs), num_classes=7, **extra))
    assert (known.net, known.options, known.classes, known.channels) == (TORCHVISION[theirs], {}, 7, 3)
    assert shapes(known.tensors) == shapes(meta(create, known.net, 7))
    assert ("auxiliary heads" in known.why) == (theirs == "googlenet")
    assert ("stride in the 3x3" in known.why) == known.net.endswith("-v1.5")


@pytest.mark.parametrize("theirs", [*RESNETS, "densenet121", "densenet201"])
def test_timm_networks_are_recognized(theirs: str) -> None:
    known = recognize(meta(timm.create_model, theirs, num_classes=7, in_chans=1))
    assert (known.net, known.classes, known.channels) == (TORCHVISION[theirs], 7, 1)


@pytest.mark.parametrize(
    "theirs", ["resnet50d", "resnet18d", "resnext50_32x4d", "seresnet50", "wide_resnet50_2", "resnet26", "vgg11"]
)
def test_other_timm_networks_are_rejected_with_the_first_difference(theirs: str) -> None:
    tensors = meta(timm.create_model, theirs)
    with pytest.raises(UserError, match="matches no known network; the nearest is") as caught:
        recognize(tensors)
    if theirs.endswith("d"):
        assert "'conv1.0.weight'" in str(caught.value) or theirs.startswith("resnext")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_tensors_unlike_any_network_are_rejected() -> None:
    with pytest.raises(UserError, match=r"none has tensors such as 'a\.weight' 3x4"):
        recognize({"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(3)})


ZOO = [
    ("resnet50", {}, "resnet50-v1.5"),
    ("resnet200", {}, "resnet200"),
    ("resnet34", {"shortcut": "C"}, "resnet34"),
    ("resnet34", {"shortcut": "A"}, "resnet34"),
    ("resnet8", {}, "resnet8"),
    ("resnet14", {"shortcut": "B"}, "resnet14"),
    ("resnet56", {"shortcut": "C"}, "resnet56"),
    ("resnet1202", {}, "resnet1202"),
    ("preact-resnet164", {}, "preact-resnet164"),
    ("highway-19", {}, "highway-19"),
    ("densenet-bc-100-12", {}, "densenet-bc-100-12"),
]


@pytest.mark.parametrize(("net", "options", "recognized_as"), ZOO)
def test_our_networks_are_recognized(net: str, options: dict[str, Any], recognized_as: str) -> None:
    known = recognize(meta(create, net, **options))
    assert (known.net, known.options) == (recognized_as, options)
    assert shapes(known.tensors) == shapes(meta(create, net, **options))


def test_wrappers_and_prefixes_are_removed() -> None:
    inner = {f"module._orig_mod.{k}": v for k, v in meta(create, "resnet8").items()}
    known = recognize({"epoch": 3, "model": {"state_dict": inner}})
    assert known.net == "resnet8" and set(known.tensors) == set(shapes(meta(create, "resnet8")))
    assert "from key 'model'" in known.why and "from key 'state_dict'" in known.why and "'module.'" in known.why


def test_a_linear_head_implies_centered_padding() -> None:
    tensors = {k.replace("fc.", "linear."): v for k, v in meta(create, "resnet20").items()}
    known = recognize(tensors)
    assert (known.net, known.options) == ("resnet20", {"shortcut": "A-centered"}) and "both sides" in known.why
    assert recognize(tensors, options={"shortcut": "A-average"}).options == {"shortcut": "A-average"}
    projected = {
        k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in meta(create, "resnet20", shortcut="B").items()
    }
    assert recognize(projected).options == {"shortcut": "B"}
    assert "assuming shortcut A with the zeros at the end" in recognize(meta(create, "resnet20")).why


def test_net_and_options_override_assumptions() -> None:
    tensors = meta(torchvision.models.resnet50)
    paper = recognize(tensors, net="resnet50")
    assert paper.net == "resnet50" and "stride" not in paper.why
    assert recognize(meta(create, "resnet20"), net="plain20").net == "plain20"
    with pytest.raises(UserError, match="does not fit resnet34: "):
        recognize(tensors, net="resnet34")
    with pytest.raises(UserError, match="no network called 'resnet5o'; did you mean"):
        recognize(tensors, net="resnet5o")
    with pytest.raises(UserError, match="no option 'shortcuts'"):
        recognize(tensors, options={"shortcuts": "B"})


def test_old_densenet_names() -> None:
    tensors = meta(torchvision.models.densenet121)
    old = {k.replace("norm1", "norm.1").replace("conv2", "conv.2"): v for k, v in tensors.items() if not k.endswith("tracked")}
    assert list(old) != list(shapes(tensors))
    known = recognize(old)
    assert known.net == "densenet121" and shapes(known.tensors) == shapes(tensors) and "older names" in known.why


@pytest.mark.parametrize("net", ["resnet18", "resnet20", "vgg11"])
def test_unknown_names_are_matched_by_shapes_in_order(net: str) -> None:
    tensors = meta(create, net, 5, 1)
    foreign = {f"block{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(tensors.items())}
    known = recognize(foreign)
    assert (known.net, known.classes, known.channels) == (net, 5, 1) and "in order" in known.why
    assert all(known.tensors[k] is v for k, v in tensors.items() if not k.endswith("tracked"))
    without = {k: v for k, v in foreign.items() if not k.endswith("tracked")}
    assert recognize(without).net == net, "BN's counters may be missing"


def test_our_names_with_other_layers_are_another_network() -> None:
    with pytest.raises(UserError, match="matches no known network"):
        recognize(meta(create, "resnet20", order="full"))
    known = recognize(meta(create, "resnet20", order="full"), net="resnet20", options={"order": "full"})
    assert known.options == {"order": "full"}


def test_unknown_names_that_match_two_networks_are_rejected() -> None:
    foreign = {f"b{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(meta(create, "preact-resnet110").items())}
    with pytest.raises(UserError, match="match resnet110, preact-resnet110: choose one with net"):
        recognize(foreign)
    assert recognize(foreign, net="preact-resnet110").net == "preact-resnet110"


def test_a_bias_never_becomes_a_weight() -> None:
    tensors = list(meta(create, "resnet8").items())
    one, two = ("bn1.weight", "bn1.bias")
    swapped = {f"x.{({one: two, two: one}).get(k, k)}": v for k, v in tensors}
    with pytest.raises(UserError, match="matches no known network"):
        recognize(swapped)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "contains a list, not a state dict"),
        ({"epoch": 1, "optimizer": {}}, "contains no tensors (keys: 'epoch', 'optimizer')"),
        ({}, "contains no tensors (keys: none)"),
        ({"state_dict": 3}, "contains no tensors"),
        ({"linear.weight": torch.zeros(2, 2), "fc.weight": torch.zeros(2, 2)}, "has tensors with both names"),
        ({"": torch.zeros(())}, "matches no known network"),
    ],
)
def test_other_content_is_rejected(content: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        recognize(content)
    assert message in str(caught.value)


def test_another_number_of_classes_keeps_the_backbone() -> None:
    torch.manual_seed(0)
    source, target = create("resnet8", 10), create("resnet8", 3)
    weights, note = adapt_head(source.state_dict(), target)
    assert "10 classes" in note and "3 classes is new" in note
    head = target.fc.weight.clone()
    target.load_state_dict(weights)
    assert torch.equal(target.conv1.weight, source.conv1.weight) and torch.equal(target.fc.weight, head)
    same, note = adapt_head(source.state_dict(), create("resnet8", 10))
    assert torch.equal(same["fc.weight"], source.fc.weight) and "all weights fit" in note
    with pytest.raises(UserError, match=r"'conv1.weight' is 16x3x3x3, not 16x1x3x3"):
        adapt_head(source.state_dict(), create("resnet8", 3, 1))
