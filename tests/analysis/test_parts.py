"""What the analyses find, against slow or direct computations of the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn import UserError, create
from reslearn.analysis.explain import grad_cam
from reslearn.analysis.features import features, in_two_dimensions
from reslearn.analysis.landscape import direction, landscape
from reslearn.analysis.lesion import kendall_tau, lesion
from reslearn.analysis.parts import Deleted, OneWay, blocks, from_stem, keeps_shape, replaced, residual_blocks, stem
from reslearn.analysis.paths import _middle, gradient_norm, paths
from reslearn.analysis.responses import responses
from reslearn.analysis.signal import signal
from reslearn.analysis.subject import error


def network(name: str, seed: int = 0, **options: object) -> nn.Module:
    """A small network whose BN layers do something."""
    torch.manual_seed(seed)
    model = create(name, 4, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


def batch(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 4, (n,), generator=generator)


# -- responses


def test_responses_are_those_of_the_layers_one_by_one() -> None:
    model, (images, _) = network("resnet8"), batch()
    found = responses(model, images)
    assert [r.layer for r in found] == ["conv1", *(f"layer{i}.0.conv{j}" for i in (1, 2, 3) for j in (1, 2))]
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
    assert [r.std for r in found] == pytest.approx([e.item() for e in expected], rel=1e-5)


def test_responses_without_bn_behind_them_are_the_convolutions_own() -> None:
    model, (images, _) = network("resnet8", order="full"), batch()
    last = responses(model, images)[-1]
    outs: list[Tensor] = []
    model.get_submodule("layer3.0.conv2").register_forward_hook(lambda *seen: outs.append(seen[2]))
    model(images)
    assert last.layer == "layer3.0.conv2" and last.std == pytest.approx(outs[0].std().item(), rel=1e-5)
    assert len(responses(create("vgg11", 4).eval(), torch.randn(1, 3, 32, 32))) == 8
    assert len(responses(create("resnet50", 4).eval(), torch.randn(1, 3, 32, 32))) == 16


# -- signal


@hypothesis_settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), depth=st.sampled_from([20, 26, 32]), scale=st.floats(0.1, 10))
def test_the_signal_is_a_sum_in_preactivation_nets(seed: int, depth: int, scale: float) -> None:
    """IM, equation 4: x_L = x_l + sum F(x_i), to float32 rounding."""
    model = network(f"resnet{depth}", seed, order="full")
    images, labels = batch(3, seed)
    found = signal(model, images * scale, labels)
    assert [s.stage for s in found.stretches] == ["layer1", "layer2", "layer3"]
    assert all(s.difference < 2e-6 for s in found.stretches)


def test_the_signal_is_no_sum_where_relu_follows_the_addition() -> None:
    found = signal(network("resnet20"), *batch())
    assert all(s.difference > 1e-3 for s in found.stretches)
    assert not signal(network("plain20"), *batch()).stretches


def test_gradients_are_autograds_and_come_in_two_parts() -> None:
    """IM, equation 5: dE/dx_l = dE/dx_L (1 + d/dx_l sum F)."""
    model = network("resnet20", order="full").double()
    images, labels = batch(2)
    images = images.double()
    found = signal(model, images, labels)
    assert isinstance(model.layer2, nn.Sequential)
    x = model.layer2[0](model.layer1(stem(model, images))).detach().requires_grad_()
    end = model.layer2[2](model.layer2[1](x))
    end.retain_grad()
    loss = F.cross_entropy(model.fc(model.avgpool(model.end(model.layer3(end))).flatten(1)), labels)
    loss.backward()
    assert x.grad is not None and end.grad is not None
    norms = dict(found.gradients)
    assert norms["layer2.1"] == pytest.approx(x.grad.norm().item(), rel=1e-9)
    residual = x.grad - end.grad
    share = (x.grad * (x.grad - residual)).sum() / x.grad.square().sum()
    assert found.stretches[1].identity == pytest.approx(share.item(), rel=1e-9)
    # The rest is what comes back through the branches: dE/dx_L . d(sum F)/dx_l
    y = x.detach().requires_grad_()
    moved = model.layer2[2](model.layer2[1](y)) - y
    assert torch.allclose(torch.autograd.grad(moved, y, end.grad)[0], residual, atol=1e-12)


# -- lesion


def test_a_block_that_is_deleted_is_a_net_without_it() -> None:
    model, (images, labels) = network("resnet14"), batch(20)
    without = network("resnet14")
    without.layer2[1] = nn.Identity()  # type: ignore[index]
    found = lesion(model, images, labels, draws=1)
    assert found.single["layer2.1"] == error(without, images, labels)
    assert found.whole == error(model, images, labels) and list(found.single) == list(blocks(model))
    assert found.resizing == ["layer2.0", "layer3.0"]
    with replaced(model, {"layer2.1": Deleted(blocks(model)["layer2.1"])}):
        assert torch.equal(model(images), without(images))


def test_nothing_is_left_changed() -> None:
    model, (images, labels) = network("resnet20"), batch()
    before = model(images)
    lesion(model, images, labels, draws=1)
    paths(model, images, labels, draws=1)
    landscape(model, images, labels, size=3)
    assert torch.equal(model(images), before)


def test_plain_blocks_that_change_the_shape_cannot_be_left_out() -> None:
    found = lesion(network("plain14"), *batch(), draws=1)
    assert {name for name, e in found.single.items() if e is None} == {"layer2.0", "layer3.0"}
    assert not keeps_shape(blocks(network("plain14"))["layer2.0"])


def test_orders_stay_within_a_stage_and_tau_tells_how_far() -> None:
    found = lesion(network("resnet20"), *batch(), draws=2)
    assert all(-1 <= tau < 1 or tau == 1 for tau, _ in found.orders) and len(found.orders) >= 8
    assert kendall_tau("abcd", "abcd") == 1 and kendall_tau("abcd", "dcba") == -1
    assert kendall_tau("abcd", "bacd") == pytest.approx(4 / 6)


def test_networks_without_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="has no blocks"):
        lesion(create("vgg11", 4), *batch())
    with pytest.raises(UserError, match="is plain: it has no shortcuts"):
        paths(network("plain20"), *batch())


# -- paths


def test_gradients_of_all_paths_sum_to_the_gradient() -> None:
    """Without the non-linearity's masks changing, the gradient is the sum over the 2^n paths, each sampled one way."""
    model, (images, labels) = network("resnet8"), batch(4)
    every = residual_blocks(model)

    def gradient() -> Tensor:
        x = stem(model, images).detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(from_stem(model, x), labels), x)[0]

    whole = gradient()
    total = torch.zeros_like(whole)
    for choice in range(2 ** len(every)):
        ways = {name: OneWay(block, bool(choice >> i & 1)) for i, (name, block) in enumerate(every.items())}
        with replaced(model, ways):
            assert torch.equal(model(images), model(images))
            total += gradient()
    assert torch.allclose(total, whole, atol=1e-6 * whole.abs().max().item() + 1e-9)


def test_one_way_changes_no_value() -> None:
    model, (images, labels) = network("resnet14", order="full"), batch(4)
    before = model(images)
    every = residual_blocks(model)
    for branch in (False, True):
        with replaced(model, {name: OneWay(block, branch) for name, block in every.items()}):
            assert torch.allclose(model(images), before, atol=1e-5)
    found = paths(model, images, labels, draws=2)
    assert found.blocks == 6 and sum(found.share) == pytest.approx(1) and sum(found.carried) == pytest.approx(1)
    with replaced(model, {name: OneWay(block, True) for name, block in every.items()}):
        assert found.norm[-1] == gradient_norm(model, stem(model, images), labels)


@pytest.mark.parametrize(
    ("carried", "range_"),
    [([0.0, 0.5, 0.5, 0.0], (1, 2)), ([0.04, 0.92, 0.04], (1, 2)), ([1.0], (0, 0)), ([0.3, 0.4, 0.3], (0, 2))],
)
def test_the_lengths_that_carry_the_gradient(carried: list[float], range_: tuple[int, int]) -> None:
    assert _middle(carried) == range_


# -- landscape, explain, features


def test_the_middle_of_the_landscape_is_the_net_and_its_rim_is_not() -> None:
    model, (images, labels) = network("resnet8"), batch(8)
    found = landscape(model, images, labels, size=3, seed=2)
    with torch.no_grad():
        assert found.loss[1][1] == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert found.steps == [-1, 0, 1] and found.error[1][1] == error(model, images, labels)
    again = landscape(model, images, labels, size=3, seed=2)
    assert again == found and landscape(model, images, labels, size=3, seed=3) != found
    assert found.loss[0][0] != found.loss[1][1]


def test_directions_have_the_filters_norms() -> None:
    model = network("resnet8")
    for parameter, step in zip(model.parameters(), direction(model, torch.Generator().manual_seed(0)), strict=True):
        if parameter.ndim < 2:
            assert not step.any()
        else:
            assert torch.allclose(step.flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1), rtol=1e-4)


def test_grad_cam_is_the_weighted_sum_of_the_last_maps() -> None:
    model, (images, _) = network("resnet8"), batch(1)
    target = int(model(images).argmax())
    heat = grad_cam(model, images, target)
    with torch.no_grad():
        maps = model.layer3(model.layer2(model.layer1(stem(model, images))))
        # The logit is linear in the pooled maps: its gradient is the last layer's row over the places.
        weights = model.fc.weight[target] / maps[0, 0].numel()
        slow = F.relu((maps[0] * weights[:, None, None]).sum(0))
    slow = F.interpolate(slow[None, None], (16, 16), mode="bilinear", align_corners=False)[0, 0]
    assert slow.max() > 0 and torch.allclose(heat, slow / slow.max(), atol=1e-5)


def test_features_are_the_last_layers_input() -> None:
    model, (images, _) = network("resnet8"), batch(5)
    rows = features(model, images)
    assert rows.shape == (5, 64)
    with torch.no_grad():
        assert torch.allclose(model.fc(rows), model(images), atol=1e-5)
    flat = in_two_dimensions(rows)
    exact = torch.linalg.svd(rows - rows.mean(0)).S
    assert flat.shape == (5, 2) and flat.norm(dim=0).tolist() == pytest.approx(exact[:2].tolist(), rel=1e-3)


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "densenet121", "googlenet"])
def test_baselines_have_a_last_map(name: str) -> None:
    image = torch.randn(1, 3, 64, 64)
    assert grad_cam(create(name, 4).eval(), image, 1).shape == (64, 64)
