"""The kernels against the same operations in double precision; fused networks against the originals."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reslearn import create
from reslearn.files import cache_folder
from reslearn.kernels.compiler import CannotCompile
from reslearn.kernels.fuse import WEIGHT_GRADIENT, FusedConv2d, FusedStage, FusedStem, bn_relu, fuse, library, unavailable


@pytest.fixture
def kernels_on() -> None:
    if reason := unavailable():
        pytest.skip(reason)


def tensor(*shape: int, dtype: torch.dtype, scale: float = 1, shift: float = 0) -> Tensor:
    values = (torch.randn(shape) * scale + shift).to(dtype)
    return values.contiguous(memory_format=torch.channels_last).requires_grad_()


def norm(channels: int, double: bool = False) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, dtype=torch.float64 if double else torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        bn.weight.copy_(torch.rand(channels, generator=generator) + 0.5)
        bn.bias.copy_(torch.randn(channels, generator=generator) * 0.1)
    return bn


# relative to the largest absolute value
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_shortcut", [False, True])
@pytest.mark.parametrize(("n", "channels", "size"), [(3, 16, 8), (1, 1, 16), (5, 32, 7 * 2), (2, 64, 5), (3, 256, 3), (40, 64, 1)])
def test_against_double_precision(
    kernels_on: None, dtype: torch.dtype, with_shortcut: bool, n: int, channels: int, size: int
) -> None:
    torch.manual_seed(0)
    x = tensor(n, channels, size, size, dtype=dtype, scale=3, shift=5)
    shortcut = tensor(n, channels, size, size, dtype=dtype) if with_shortcut else None
    out_grad = torch.randn(x.shape).to(dtype)
    bn, exact = norm(channels), norm(channels, double=True)
    out = bn_relu(bn, x, shortcut)[0]
    assert out.grad_fn is not None and "BnRelu" in type(out.grad_fn).__name__, "the kernels were used"
    out.backward(out_grad)
    x64 = x.detach().double().requires_grad_()
    s64 = None if shortcut is None else shortcut.detach().double().requires_grad_()
    before = exact(x64) if s64 is None else exact(x64) + s64
    # ReLU's mask depends on the rounded output
    expected = before * (out > 0)
    expected.backward(out_grad.double())
    pairs = [(out, expected), (x.grad, x64.grad), (bn.weight.grad, exact.weight.grad), (bn.bias.grad, exact.bias.grad)]
    pairs += [(bn.running_mean, exact.running_mean), (bn.running_var, exact.running_var)]
    pairs += [(shortcut.grad, s64.grad)] if shortcut is not None and s64 is not None else []
    for ours, theirs in pairs:
        assert ours is not None and theirs is not None
        assert (ours.double() - theirs).abs().max() <= TOLERANCE[dtype] * max(1, theirs.abs().max().item())
    assert bn.num_batches_tracked == 1
    assert ((before < -0.05) & (out > 0)).sum() == 0 and ((before > 0.05) & (out <= 0)).sum() == 0


def test_results_do_not_depend_on_the_number_of_threads(kernels_on: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        x, bn = tensor(33, 16, 16, 16, dtype=torch.bfloat16), norm(16)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out, _ = bn_relu(bn, x)
            out.sum().backward()
        finally:
            torch.set_num_threads(before)
        results.append([out, x.grad, bn.weight.grad, bn.running_mean, bn.running_var])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_second_derivative_raises(kernels_on: None) -> None:
    x, bn = tensor(4, 16, 8, 8, dtype=torch.float32), norm(16)
    grad = torch.autograd.grad((bn_relu(bn, x)[0] ** 2).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_nan_and_infinity_propagate(kernels_on: None) -> None:
    for dtype in TOLERANCE:
        for value in (float("nan"), float("inf"), -float("inf")):
            x = torch.randn(4, 16, 4, 4).to(dtype)
            x[1, 3, 2, 2] = value
            out, _ = bn_relu(norm(16), x.contiguous(memory_format=torch.channels_last))
            assert not out[:, 3].isfinite().any() and out[:, 4].isfinite().all()


@pytest.mark.parametrize(
    "change",
    ["48 channels", "one value per channel", "nchw", "evaluation", "float64", "another dtype", "no statistics", "cumulative"],
)
def test_unsupported_inputs_use_pytorch(kernels_on: None, change: str) -> None:
    channels = 48 if change == "48 channels" else 64
    size = 1 if change == "one value per channel" else 4
    x = torch.randn(1, channels, size, size, dtype=torch.float64 if change == "float64" else torch.float32)
    x = x if change == "nchw" else x.contiguous(memory_format=torch.channels_last)
    bn = nn.BatchNorm2d(channels, dtype=x.dtype, track_running_stats=change != "no statistics")
    bn.momentum = None if change == "cumulative" else 0.1
    bn.train(change != "evaluation")
    shortcut = torch.randn(x.shape, dtype=torch.float64) if change == "another dtype" else None
    if change == "one value per channel":
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            bn_relu(bn, x, shortcut)
        return
    out, _ = bn_relu(bn, x.requires_grad_(), shortcut)
    assert out.grad_fn is not None and "BnRelu" not in type(out.grad_fn).__name__


def test_a_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    if unavailable():
        pytest.skip("no compiler")
    first = {p: p.stat().st_mtime_ns for p in (cache_folder() / "kernels").iterdir()}
    library.cache_clear()
    assert len(first) == 1 and unavailable() is None
    assert {p: p.stat().st_mtime_ns for p in (cache_folder() / "kernels").iterdir()} == first


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    library.cache_clear()
    reason = unavailable()
    assert reason is not None and reason.endswith("false cannot compile fused.cpp")
    with pytest.raises(CannotCompile, match=r"cannot compile fused\.cpp"):
        fuse(create("resnet8", 2))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_the_gradient_of_the_twin_is_added(kernels_on: None, dtype: torch.dtype, with_shortcut: bool) -> None:
    torch.manual_seed(0)
    x, shortcut = tensor(4, 16, 8, 8, dtype=dtype), tensor(4, 16, 8, 8, dtype=dtype)
    one, two = torch.randn(x.shape).to(dtype), torch.randn(x.shape).to(dtype)
    grads = []
    for use_twin in (False, True):
        x.grad = shortcut.grad = None
        out, twin = bn_relu(norm(16), x, shortcut if with_shortcut else None)
        (out * one + (twin if use_twin else out) * two).sum().backward()
        assert x.grad is not None
        grads.append([x.grad, *([shortcut.grad] if with_shortcut else [])])
    for expected, grad in zip(*grads, strict=True):
        assert expected is not None and grad is not None
        assert (expected - grad).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    x.grad = None
    _, twin = bn_relu(norm(16), x, shortcut if with_shortcut else None)
    (twin * two).sum().backward()
    assert x.grad is not None and x.grad.any(), "also if only the twin is used"


CONVOLUTIONS = [(3, 16, 16, 8), (9, 32, 16, 12), (1, 16, 64, 8), (17, 64, 64, 8), (2, 48, 32, 9)]


def has_bf16() -> bool:
    return hasattr(library(), WEIGHT_GRADIENT)


@pytest.mark.parametrize(("n", "inputs", "outputs", "size"), CONVOLUTIONS)
def test_gradients_of_a_convolution(kernels_on: None, n: int, inputs: int, outputs: int, size: int) -> None:
    if not has_bf16():
        pytest.skip("this processor has no bf16 multiplication")
    torch.manual_seed(0)
    module = FusedConv2d(inputs, outputs, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    height, width = size, size + size % 2 + 2  # not square
    x = tensor(n, inputs, height, width, dtype=torch.bfloat16)
    grad = torch.randn(n, outputs, height, width).bfloat16()
    out = module(x)
    assert "Conv3x3" in type(out.grad_fn).__name__, "the kernel was used"
    out.backward(grad)
    assert module.weight.grad is not None and x.grad is not None
    exact = torch.nn.grad.conv2d_weight(x.detach().double(), module.weight.shape, grad.double(), padding=1)
    assert (module.weight.grad - exact).abs().max() < 2e-6 * exact.abs().max(), "bf16 products are summed in fp32"
    back = torch.nn.grad.conv2d_input(x.shape, module.weight.detach().bfloat16().double(), grad.double(), padding=1)
    assert (x.grad - back).abs().max() < 2**-7 * back.abs().max()
    first = module.weight.grad.clone()
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        module.weight.grad = None
        module(x).backward(grad)
        assert torch.equal(first, module.weight.grad), "the result does not depend on the number of threads"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("change", ["stride", "bias", "odd", "narrow", "fp32", "eval", "kernel", "frozen", "small", "circular"])
def test_other_convolutions_use_pytorch(kernels_on: None, change: str) -> None:
    inputs = 3 if change == "narrow" else 16
    padding = "circular" if change == "circular" else "zeros"
    options = {"padding_mode": padding, "stride": 2 if change == "stride" else 1, "bias": change == "bias"}
    kernel = 1 if change == "kernel" else 3
    module = FusedConv2d(inputs, 16, kernel, padding=kernel // 2, **options).to(memory_format=torch.channels_last)
    module.train(change != "eval").requires_grad_(change != "frozen")
    size = {"odd": 9, "small": 6}.get(change, 8)
    x = tensor(2, inputs, size, size, dtype=torch.float32 if change == "fp32" else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=change != "fp32"):
        out = module(x)
        assert torch.equal(out, nn.Conv2d.forward(module, x)) and "Conv3x3" not in type(out.grad_fn).__name__


NETS = {
    "resnet8": {},
    "plain8": {},
    "preact-resnet8": {},
    "highway-19": {},
    "resnet14": {"order": "bn-after-addition", "merge": "shortcut-gate"},
    "resnet20": {"order": "relu-only", "last_survival": 0.5},
}


@pytest.mark.parametrize("name", NETS)
def test_a_fused_network_has_the_same_modules_outputs_and_gradients(kernels_on: None, name: str) -> None:
    torch.manual_seed(0)
    plain: Any = create(name, 10, **NETS[name]).to(memory_format=torch.channels_last)
    net, x = copy.deepcopy(plain), torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    before = {key: id(tensor) for key, tensor in net.state_dict(keep_vars=True).items()}
    modules = list(net.named_modules())
    assert fuse(net) is net and fuse(net) is net
    assert {key: id(tensor) for key, tensor in net.state_dict(keep_vars=True).items()} == before
    assert list(before) == list(plain.state_dict()) and list(net.named_modules()) == modules
    with torch.no_grad():
        assert torch.equal(net.eval()(x), plain.eval()(x)), "evaluation uses PyTorch"
    grads = []
    for model in (plain, copy.deepcopy(net)):
        torch.manual_seed(1)
        model.train()(x).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()


def test_parts_of_a_network_are_fused_in_place(kernels_on: None) -> None:
    backbone = pytest.importorskip("reslearn.detect.backbone")
    net = create("resnet18", 10).to(memory_format=torch.channels_last)
    backbone.freeze_batch_norm(net.layer2)  # type: ignore[arg-type]
    halves = backbone.split(net)
    both = fuse(nn.ModuleList([halves.shared, halves.region])).train()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert isinstance(both[0], FusedStem)
    for stage in ("0.layer1", "0.layer2", "0.layer3", "1.layer4"):
        assert isinstance(both.get_submodule(stage), FusedStage)
    both[1](both[0](x)["0"]).sum().backward()
    assert halves.shared.layer1[0].conv1.weight.grad is not None  # type: ignore[union-attr,index]
