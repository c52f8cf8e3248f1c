"""Blocks: every order and merge of Identity Mappings against its figure, stochastic depth, option A shortcuts, baselines."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reslearn
from reslearn.nets.block import Block
from reslearn.nets.options import NetOptions
from reslearn.nets.shortcuts import make_shortcut
from reslearn.nets.variants import StochasticDepth, make_block

PARAMETERS = {
    "preact-resnet164": 1_703_258,
    "preact-resnet1001": 10_327_706,
    "resnet200": 64_673_832,
    "vgg16": 138_357_544,
}
# as printed in the papers
ROUNDED = {"densenet-40-12": 1.0e6, "densenet-bc-100-12": 0.8e6, "highway-19": 2.3e6, "highway-32": 1.25e6, "resnet164": 1.7e6}


@pytest.mark.parametrize("name", PARAMETERS | ROUNDED)
def test_parameters_are_the_papers(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in reslearn.create(name).parameters())
    assert count == PARAMETERS[name] if name in PARAMETERS else count == pytest.approx(ROUNDED[name], rel=0.05)


def make(in_channels: int = 8, width: int = 8, stride: int = 1, *, first: bool = False, survival: float = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    block = make_block(in_channels, width, stride, options=NetOptions(**options), first=first, survival=survival)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return block.eval()


def figure_4(b: Any, x: Tensor, order: str) -> Tensor:
    """IM Figure 4, one line per order."""
    r = F.relu
    if order == "original":
        return r(x + b.bn2(b.conv2(r(b.bn1(b.conv1(x))))))
    if order == "bn-after-addition":
        return r(b.bn2(x + b.conv2(r(b.bn1(b.conv1(x))))))
    if order == "relu-before-addition":
        return x + r(b.bn2(b.conv2(r(b.bn1(b.conv1(x))))))
    if order == "relu-only":
        return x + b.bn2(b.conv2(r(b.bn1(b.conv1(r(x))))))
    assert order == "full"
    return x + b.conv2(r(b.bn2(b.conv1(r(b.bn1(x))))))


@pytest.mark.parametrize("order", ["original", "bn-after-addition", "relu-before-addition", "relu-only", "full"])
def test_orders_match_figure_4(order: str) -> None:
    block, x = make(order=order), torch.randn(2, 8, 6, 6)
    original = x.clone()
    torch.testing.assert_close(block(x), figure_4(block, original, order))
    assert torch.equal(x, original), "the input is also the shortcut, so it must not be modified in place"


def test_pre_activation_is_shared_if_the_shape_changes_and_absent_in_the_first_block() -> None:
    block, x = make(8, 16, 2, order="full", shortcut="B"), torch.randn(2, 8, 6, 6)
    activated = F.relu(block.bn1(x))
    assert len(block.downsample) == 1, "the projection has no BN"
    torch.testing.assert_close(block(x), block.downsample(activated) + block.conv2(F.relu(block.bn2(block.conv1(activated)))))
    first = make(order="full", first=True)
    assert not hasattr(first, "bn1")
    torch.testing.assert_close(first(x), x + first.conv2(F.relu(first.bn2(first.conv1(x)))))


@pytest.mark.parametrize("merge", ["constant", "exclusive-gate", "shortcut-gate", "dropout"])
def test_merges_match_figure_2(merge: str) -> None:
    block, x = make(merge=merge, gate_bias=-1.0), torch.randn(2, 8, 6, 6)
    branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    if merge in ("exclusive-gate", "shortcut-gate"):
        assert block.merge.gate.bias is not None
        gate = torch.sigmoid(block.merge.gate(x))
    expected = {
        "constant": lambda: 0.5 * x + 0.5 * branch,
        "exclusive-gate": lambda: (1 - gate) * x + gate * branch,
        "shortcut-gate": lambda: (1 - gate) * x + branch,
        "dropout": lambda: x + branch,
    }[merge]()
    torch.testing.assert_close(block(x), F.relu(expected))


def test_gates_start_with_their_bias_and_dropout_drops_half_of_the_shortcut() -> None:
    net = reslearn.create("resnet20", merge="exclusive-gate", gate_bias=-7.0)
    assert all((m.merge.gate.bias == -7).all() for m in net.modules() if isinstance(m, Block))
    block = make(merge="dropout").train()
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    out = block(torch.ones(4, 8, 32, 32))
    assert set(out.unique().tolist()) == {0.0, 2.0} and (out == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_stochastic_depth_decays_linearly_and_gates_the_batch() -> None:
    net = reslearn.create("stochastic-resnet110")
    survivals = [m.survival for m in net.modules() if isinstance(m, StochasticDepth)]
    assert survivals == pytest.approx([1 - i / 54 * 0.5 for i in range(1, 55)])
    block, x = make(survival=0.25), torch.randn(2, 8, 6, 6).abs()
    branch = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(x + 0.25 * branch))
    block.train()
    dropped = sum(torch.equal(block(x), x) for _ in range(400))
    assert 260 < dropped < 340


def test_stochastic_depth_per_sample() -> None:
    block, x = make(survival=0.5, per_sample=True).train(), torch.rand(300, 8, 4, 4) + 0.1
    same = (block(x) == x).flatten(1).all(1).sum().item()
    assert 110 < same < 190


@pytest.mark.parametrize("kind", ["A", "A-centered", "A-average", "A-average-centered"])
@pytest.mark.parametrize("size", [8, 7])
def test_option_a_conventions(kind: str, size: int) -> None:
    x = torch.randn(2, 4, size, size)
    got = make_shortcut(kind, 4, 8, 2)(x)  # type: ignore[arg-type, misc]
    half = F.avg_pool2d(x, 2, ceil_mode=True) if "average" in kind else x[:, :, ::2, ::2]
    before = 2 if "centered" in kind else 0
    assert got.shape == (2, 8, (size + 1) // 2, (size + 1) // 2)
    assert torch.equal(got[:, before : before + 4], half)
    assert not got[:, :before].any() and not got[:, before + 4 :].any()


@pytest.mark.parametrize("name", ["vgg11", "vgg16-bn", "alexnet", "googlenet", "densenet121"])
def test_baselines_are_torchvisions(name: str) -> None:
    import torchvision

    extra = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name.replace("-", "_"))(**extra).state_dict()
        ours = reslearn.create(name).state_dict()
        gray = reslearn.create(name, 5, 1)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert next(m for m in gray.modules() if isinstance(m, nn.Conv2d)).in_channels == 1


def test_ceil_pooling_matches_caffe() -> None:
    with torch.device("meta"):
        pool = reslearn.create("resnet50", pool="ceil").maxpool
    assert (pool.padding, pool.ceil_mode) == (0, True)
    assert pool(torch.zeros(1, 1, 112, 112)).shape[-1] == 56


def test_highway_block_matches_its_formula() -> None:
    torch.manual_seed(0)
    options = NetOptions(merge="exclusive-gate", gate_bias=-1.0)
    block: Any = make_block(8, 8, block="highway", options=options)
    x = torch.randn(2, 8, 6, 6)
    gate = torch.sigmoid(F.conv2d(x, block.merge.gate.weight, block.merge.gate.bias, padding=1))
    h = F.relu(F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1))
    torch.testing.assert_close(block(x), h * gate + x * (1 - gate))
    assert block.merge.gate.weight.shape == (8, 8, 3, 3)
