"""The equations of Identity Mappings, and the parts of the gradient against autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn import UserError, create
from reslearn.analysis import signal as module
from reslearn.analysis.parts import blocks, head, one_way, stem
from reslearn.analysis.signal import signal
from small_nets import batch, network


@hypothesis_settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.sampled_from([14, 20, 26]), scale=st.floats(0.1, 10), shortcut=st.sampled_from("ABC"))
def test_the_signal_is_a_sum_in_preactivation_networks(seed: int, depth: int, scale: float, shortcut: str) -> None:
    """IM, equation 4: x_L = x_l + sum F(x_i) up to float32 rounding, for identity shortcuts and for every single block."""
    model = network(f"preact-resnet{depth}", seed, shortcut=shortcut)
    images, labels = batch(3, seed)
    result = signal(model, images * scale, labels)
    assert [s.stage for s in result.stretches] == ([] if shortcut == "C" else ["layer1", "layer2", "layer3"])
    assert all(s.difference < 2e-6 for s in result.stretches)
    assert len(result.steps) == (depth - 2) // 2 and all(step.difference < 2e-6 for step in result.steps)


def test_the_signal_is_not_a_sum_if_relu_follows_the_addition() -> None:
    result = signal(network("resnet20"), *batch())
    assert all(s.difference > 1e-3 for s in result.stretches) and all(step.difference > 1e-3 for step in result.steps)


def test_a_plain_network_has_only_gradients() -> None:
    model, (images, labels) = network("plain20"), batch()
    result = signal(model, images, labels)
    assert not result.stretches and not result.steps and result.whole is None
    x = stem(model, images).detach().requires_grad_()
    loss = F.cross_entropy(_from(model, x), labels)
    assert result.gradients[0] == ("layer1.0", pytest.approx(torch.autograd.grad(loss, x)[0].norm().item(), rel=1e-4))
    assert [name for name, _ in result.gradients][-1] == "end" and len(result.gradients) == 10


def _from(model: nn.Module, x: Tensor) -> Tensor:
    return model.fc(model.avgpool(model.end(model.layer3(model.layer2(model.layer1(x))))).flatten(1))


def test_gradients_match_autograd_and_have_two_parts() -> None:
    """IM, equation 5: dE/dx_l = dE/dx_L (1 + d/dx_l sum F)."""
    model = network("preact-resnet20").double()
    images, labels = batch(2)
    images = images.double()
    result = signal(model, images, labels)
    assert isinstance(model.layer2, nn.Sequential)
    x = model.layer2[0](model.layer1(stem(model, images))).detach().requires_grad_()
    end = model.layer2[2](model.layer2[1](x))
    end.retain_grad()
    F.cross_entropy(model.fc(model.avgpool(model.end(model.layer3(end))).flatten(1)), labels).backward()
    assert x.grad is not None and end.grad is not None
    assert dict(result.gradients)["layer2.1"] == pytest.approx(x.grad.norm().item(), rel=1e-9)
    # Through the branches: dE/dx_L . d(sum F)/dx_l. Through the shortcuts: dE/dx_L itself.
    y = x.detach().requires_grad_()
    moved = model.layer2[2](model.layer2[1](y)) - y
    branches = torch.autograd.grad(moved, y, end.grad)[0]
    assert torch.allclose(branches + end.grad, x.grad, atol=1e-12)
    stretch, size = result.stretches[1], x.grad.norm()
    assert stretch.identity == pytest.approx(((x.grad * end.grad).sum() / size**2).item(), rel=1e-9)
    assert stretch.shortcuts == pytest.approx((end.grad.norm() / size).item(), rel=1e-9)
    assert stretch.branches == pytest.approx((branches.norm() / size).item(), rel=1e-9)


def test_with_zero_branches_the_shortcuts_carry_everything() -> None:
    model = network("resnet14", shortcut="B")
    for name, module_ in model.named_modules():
        if name.endswith(".bn2"):
            nn.init.zeros_(module_.weight)  # type: ignore[arg-type]
            nn.init.zeros_(module_.bias)  # type: ignore[arg-type]
    result = signal(model, *batch())
    assert result.whole is not None
    assert result.whole == pytest.approx((1, 1, 0), abs=1e-6) and all(step.branch == 0 for step in result.steps)
    assert all(s.identity == pytest.approx(1) and s.branches == pytest.approx(0, abs=1e-6) for s in result.stretches)


def test_whole_spans_all_blocks_including_projections() -> None:
    model, (images, labels) = network("resnet8", shortcut="B").double(), batch(3)
    images = images.double()
    x = stem(model, images).detach().requires_grad_()
    whole = torch.autograd.grad(F.cross_entropy(_from(model, x), labels), x)[0]
    y = x
    for block in blocks(model).values():
        y = one_way(block, y, branch=False)
    shortcuts = torch.autograd.grad(F.cross_entropy(head(model, y), labels), x)[0]
    size = whole.norm()
    expected = ((whole * shortcuts).sum() / size**2, shortcuts.norm() / size, (whole - shortcuts).norm() / size)
    assert signal(model, images, labels).whole == pytest.approx([value.item() for value in expected], rel=1e-9)


def test_the_chunk_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = network("resnet14").double(), batch(7)
    whole = signal(model, images.double(), labels)
    monkeypatch.setattr(module, "chunks", lambda *all: zip(*(tensor.split(3) for tensor in all), strict=True))
    pieces = signal(model, images.double(), labels)
    assert dict(pieces.gradients) == pytest.approx(dict(whole.gradients), rel=1e-9)
    assert [vars(s) for s in pieces.stretches] == [_near(s) for s in whole.stretches]
    assert pieces.whole == pytest.approx(whole.whole, rel=1e-9)


def _near(stretch: module.Stretch) -> dict[str, object]:
    return {key: pytest.approx(value, rel=1e-9) if isinstance(value, float) else value for key, value in vars(stretch).items()}


def test_networks_without_blocks_are_rejected() -> None:
    with pytest.raises(UserError, match="has no blocks: use a residual, plain or highway network"):
        signal(create("vgg11", 4), *batch(side=32))
