"""The zoo's table against the papers' numbers and torchvision's modules."""

import re

import pytest
import torch
import torchvision
from torch import nn

from reslearn import UserError, create, models
from reslearn.nets.block import BasicBlock, Block, PlainBlock
from reslearn.nets.zoo import TABLE, spec

# Counted from DRL Table 1: depth -> parameters with shortcuts A, B, C
IMAGENET = {
    18: (11_515_688, 11_689_512, 12_043_816),
    34: (21_623_848, 21_797_672, 22_716_840),
    50: (22_780_456, 25_557_032, 40_128_552),
    101: (41_772_584, 44_549_160, 76_981_288),
    152: (57_416_232, 60_192_808, 107_335_720),
}
# DRL 4.2, option A
CIFAR = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("depth", IMAGENET)
def test_imagenet_parameters(depth: int) -> None:
    with torch.device("meta"):
        counted = tuple(parameters(create(f"resnet{depth}", shortcut=kind)) for kind in "ABC")
        if f"plain{depth}" in TABLE:
            assert parameters(create(f"plain{depth}")) == IMAGENET[depth][0]
        if f"resnet{depth}-v1.5" in TABLE:
            assert parameters(create(f"resnet{depth}-v1.5")) == IMAGENET[depth][1]
    assert counted == IMAGENET[depth]


@pytest.mark.parametrize("depth", CIFAR)
def test_cifar_parameters(depth: int) -> None:
    with torch.device("meta"):
        assert parameters(create(f"resnet{depth}")) == CIFAR[depth]
        assert parameters(create(f"resnet{depth}", shortcut="B")) - CIFAR[depth] == 2752
        if f"plain{depth}" in TABLE:
            assert parameters(create(f"plain{depth}")) == CIFAR[depth]


def test_any_depth_6n_plus_2_is_a_cifar_network() -> None:
    assert spec("resnet26").blocks == (4, 4, 4)
    assert spec("plain14").blocks == (2, 2, 2)
    assert spec("resnet50").stem == "imagenet", "50 = 6 * 8 + 2 too, but the table's name wins"


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50-v1.5", "resnet101-v1.5", "resnet152-v1.5"])
def test_state_dict_names_match_torchvision(name: str) -> None:
    with torch.device("meta"):
        ours = create(name).state_dict()
        theirs = getattr(torchvision.models, name.removesuffix("-v1.5"))().state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)


@pytest.mark.parametrize("name", ["resnet18", "resnet50-v1.5"])
def test_same_weights_give_torchvisions_logits(name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name.removesuffix("-v1.5"))().eval()
    ours = create(name).eval()
    ours.load_state_dict(theirs.state_dict())
    for size in (64, 97):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


def test_the_papers_resnet50_strides_in_the_1x1() -> None:
    paper, newer = create("resnet50", 2), create("resnet50-v1.5", 2)
    strides = [[getattr(net.layer2[0], f"conv{i}").stride[0] for i in (1, 2, 3)] for net in (paper, newer)]
    assert strides == [[2, 1, 1], [1, 2, 1]]


@pytest.mark.parametrize("name", [n for n in TABLE if not re.search("1202|1001|152|101|200|201|vgg1[369]", n)])
def test_every_network_runs_forward_and_backward(name: str) -> None:
    size = 64 if TABLE[name].stem == "imagenet" else 32
    size = 96 if name == "alexnet" else size
    torch.manual_seed(0)
    net = create(name, classes=7, channels=1)
    logits = net(torch.randn(2, 1, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    grads = [p.grad for p in net.parameters()]
    if not name.startswith("stochastic"):  # dropped branches have no gradients
        assert all(g is not None for g in grads)
    assert all(g.isfinite().all() for g in grads if g is not None)


def test_stage_sizes_match_table_1() -> None:
    net, sizes = create("resnet18", 2).eval(), {}
    for name in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
        net.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: sizes.update({name: o.shape[1:]}))
    net(torch.zeros(1, 3, 224, 224))
    assert sizes == {
        "maxpool": (64, 56, 56),
        "layer1": (64, 56, 56),
        "layer2": (128, 28, 28),
        "layer3": (256, 14, 14),
        "layer4": (512, 7, 7),
    }


def test_option_a_is_the_input_subsampled_with_zeros_behind() -> None:
    block = create("resnet20").layer2[0]
    x = torch.randn(1, 16, 8, 8)
    y = block.downsample(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()


def test_a_plain_block_has_no_path_round_its_body() -> None:
    torch.manual_seed(0)
    block = PlainBlock(8, 8).eval()
    nn.init.zeros_(block.conv2.weight)
    assert not block(torch.randn(1, 8, 4, 4)).any()
    residual = BasicBlock(8, 8).eval()
    nn.init.zeros_(residual.conv2.weight)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(residual(x), x.relu())


def test_he_initialization() -> None:
    torch.manual_seed(0)
    weight = create("resnet34").layer4[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert weight.mean().abs().item() < 1e-3


def test_zero_init_makes_every_branch_zero() -> None:
    blocks = [m for m in create("resnet50", zero_init_last_gamma=True).modules() if isinstance(m, Block)]
    assert len(blocks) == 16
    assert all(not block.bn3.weight.any() for block in blocks)
    assert all(block.bn2.weight.all() for block in create("resnet20").modules() if isinstance(block, Block))


def test_models_filters_by_pattern() -> None:
    assert models("plain*") == ["plain18", "plain34", "plain20", "plain32", "plain44", "plain56", "plain110"]
    assert models() == list(TABLE)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt20", {}, "did you mean 'resnet20'"),
        ("resnet21", {}, "no network called 'resnet21'"),
        ("resnet20", {"shortcuts": "A"}, "did you mean 'shortcut'"),
        ("resnet20", {"shortcut": "D"}, "must be one of 'A', 'A-centered'"),
        ("resnet20", {"classes": 1}, "at least 2 classes"),
        ("resnet20", {"channels": 0}, "at least 1 channel"),
        ("resnet20", {"stride_in": "3x3"}, "stride_in does not apply"),
        ("resnet20", {"gate_bias": 1}, "its merge has no gate"),
        ("resnet20", {"per_sample": True}, "stochastic depth is off: set last_survival below 1"),
        ("resnet20", {"last_survival": 2}, "a number from 0 to 1"),
        ("resnet20", {"pool": "ceil"}, "it has no max pool"),
        ("preact-resnet110", {"zero_init_last_gamma": True}, "do not end in BN"),
        ("vgg16", {"shortcut": "A"}, "a baseline as published"),
        ("highway-19", {"order": "full"}, "a highway network"),
        ("plain20", {"shortcut": "A"}, "has no shortcuts"),
        ("plain20", {"zero_init_last_gamma": True}, "its output would be constant"),
    ],
)
def test_invalid_names_and_options_give_a_one_line_error(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        create(name, **options)
    assert "\n" not in str(caught.value)
