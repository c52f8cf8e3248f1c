"""Costs against the papers' numbers and PyTorch's FLOP counter; receptive fields against gradients."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reslearn
from command_line import RunCli
from reslearn.nets.cost import by_stage, cost
from reslearn.nets.zoo import TABLE

GMACS = {  # computed from the architectures: stride in the 1x1 and in the 3x3
    "resnet18": 1.814,
    "resnet34": 3.664,
    "resnet50": 3.858,
    "resnet50-v1.5": 4.089,
    "resnet101": 7.570,
    "resnet101-v1.5": 7.801,
    "resnet152": 11.282,
    "resnet152-v1.5": 11.514,
    "resnet200": 15.007,
    "resnet20": 0.04055,
    "resnet32": 0.06886,
    "resnet44": 0.09717,
    "resnet56": 0.12549,
    "resnet110": 0.25289,
    "resnet1202": 2.829,
    "vgg19": 19.6,
}


def of(name: str, **options: object) -> tuple[nn.Module, tuple[int, ...]]:
    with torch.device("meta"):
        return reslearn.create(name, **options), (3, TABLE[name].size, TABLE[name].size)


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_match_the_papers(name: str) -> None:
    net, size = of(name)
    assert cost(net, size, backward=False).macs / 1e9 == pytest.approx(GMACS[name], rel=0.002)


@pytest.mark.parametrize("name", ["resnet18", "preact-resnet50", "highway-19", "googlenet", "densenet121", "vgg11-bn"])
def test_multiply_adds_are_half_of_pytorchs_flop_count(name: str) -> None:
    net, size = of(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, *size, device="meta"))
    assert 2 * cost(net, size, backward=False).macs == counter.get_total_flops()


def test_vgg16_matches_the_commonly_quoted_numbers() -> None:
    counted = cost(*of("vgg16"))
    rows = {row.name: row for row in counted.rows}
    assert counted.parameters == 138_357_544
    assert rows["features.0"].values == 224 * 224 * 64 == 3_211_264
    assert [rows[f"classifier.{i}"].macs for i in (0, 3, 6)] == [102_760_448, 16_777_216, 4_096_000]
    assert rows["features.28"].field == 196 and rows["classifier.0"].field is None


def test_summary_compares_the_bottleneck_with_a_3x3_convolution(run_cli: RunCli) -> None:
    out = run_cli("summary", "resnet50").out
    assert "69,632 weights" in out and "589,824" in out and "conv2_x layer1" in out and "25,557,032" in out


@pytest.mark.parametrize("net", ["resnet8", "plain14", "preact"])
def test_the_receptive_field_matches_the_gradient(net: str) -> None:
    """With positive weights and no normalization, the gradient of one output is nonzero exactly in its receptive field."""
    torch.manual_seed(0)
    model = reslearn.create("resnet8", order="full") if net == "preact" else reslearn.create(net)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.01)
    model.eval()
    size = 129
    counted = cost(model, (3, size, size), backward=False)
    last = [row for row in counted.rows if row.kind == "Conv2d"][-1]
    image = torch.rand(1, 3, size, size, requires_grad=True)
    outputs = []
    model.get_submodule(last.name).register_forward_hook(lambda m, i, out: outputs.append(out))
    model(image)
    middle = outputs[0].shape[-1] // 2
    (gradient,) = torch.autograd.grad(outputs[0][0, 0, middle, middle], image)
    assert int((gradient[0, 0].abs().sum(0) > 0).sum()) == last.field


def test_backward_memory_counts_saved_activations() -> None:
    """conv -> BN -> ReLU saves its input, the outputs of conv and ReLU, and small BN statistics."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    counted = cost(net, (3, 16, 16))
    assert counted.backward_bytes == pytest.approx(4 * 16 * 16 * (3 + 8 + 8), rel=0.01)
    assert counted.values == 16 * 16 * (3 + 8 + 8 + 8)


def test_any_module_and_folding_into_stages() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    counted = cost(net, (3, 2, 2))
    assert counted.macs == 12 * 5 + 5 * 2 and counted.values == 12 + 5 + 2
    assert next(net.parameters()).device.type == "cpu", "the network itself stays on its device"
    whole = cost(*of("resnet50"), backward=False)
    assert sum(row.macs for row in by_stage(whole)) == whole.macs


def test_models_and_summary_as_json(run_cli: RunCli) -> None:
    (row,) = json.loads(run_cli("models", "resnet[23]0", "--json").out)
    assert (row["name"], row["parameters"], row["flops"]) == ("resnet20", 269_722, 2 * row["macs"])
    assert row["published_error"] == {"CIFAR-10": 8.75}
    summary = json.loads(run_cli("summary", "plain20", "--input", "3x64x64", "--json").out)
    assert summary["input"] == [3, 64, 64] and summary["parameters"] == 269_722 and len(summary["rows"]) > 40
