"""Sampled paths against autograd on networks with blocks cut by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn import UserError
from reslearn.analysis import paths as module
from reslearn.analysis.parts import head, one_way, residual_blocks, stem, through
from reslearn.analysis.paths import _Backward, _middle, paths
from small_nets import batch, network


def gradient(model: nn.Module, images: Tensor, labels: Tensor, chosen: frozenset[int] | None = None) -> Tensor:
    """The gradient at the first block's input; with `chosen`, through the branches of these blocks and the other shortcuts only."""
    start = stem(model, images).detach().requires_grad_()
    x = start
    for i, block in enumerate(residual_blocks(model).values()):
        x = block(x) if chosen is None else one_way(block, x, branch=i in chosen)
    return torch.autograd.grad(F.cross_entropy(head(model, x), labels), start)[0]


def subsets(n: int) -> list[frozenset[int]]:
    return [frozenset(i for i in range(n) if choice >> i & 1) for choice in range(2**n)]


@pytest.mark.parametrize("name", ["resnet8", "preact-resnet8"])
def test_gradients_of_all_paths_sum_to_the_gradient(name: str) -> None:
    """With fixed ReLU masks, the gradient is the sum over the 2^n paths."""
    model, (images, labels) = network(name), batch(4)
    sequence = list(residual_blocks(model).values())
    backward = _Backward(model, sequence, images, labels, len(images))
    whole = gradient(model, images, labels)
    total = torch.stack([backward.along(chosen) for chosen in subsets(len(sequence))]).sum(0)
    assert torch.allclose(total, whole, atol=1e-6 * whole.abs().max().item() + 1e-9)


def test_a_path_is_the_gradient_with_the_other_paths_cut() -> None:
    model, (images, labels) = network("resnet14", shortcut="B").double(), batch(3)
    images = images.double()
    backward = _Backward(model, list(residual_blocks(model).values()), images, labels, len(images))
    for chosen in (frozenset[int](), frozenset({0, 3}), frozenset({2}), frozenset(range(6))):
        assert torch.allclose(backward.along(chosen), gradient(model, images, labels, chosen), rtol=1e-9, atol=1e-15)


def test_the_ends_are_all_shortcuts_and_all_branches() -> None:
    model, (images, labels) = network("preact-resnet14"), batch(4)
    result = paths(model, images, labels, draws=2)
    assert result.blocks == 6 and sum(result.share) == pytest.approx(1) and sum(result.carried) == pytest.approx(1)
    assert result.share == [math.comb(6, k) / 64 for k in range(7)]
    assert [len(norms) for norms in result.sampled] == [1, 2, 2, 2, 2, 2, 1]
    assert result.norm[0] == pytest.approx(gradient(model, images, labels, frozenset()).norm().item(), rel=1e-4)
    assert result.norm[-1] == pytest.approx(gradient(model, images, labels, frozenset(range(6))).norm().item(), rel=1e-4)
    low, high = result.effective
    assert sum(result.carried[low : high + 1]) >= 0.95 and result.effective_share == sum(result.share[low : high + 1])


def test_in_a_linear_network_a_path_is_a_product() -> None:
    """With branches that double their input, a path through k branches has 2^k times the gradient of the path through none."""
    model, (images, labels) = network("preact-resnet20"), batch(2)
    for block in residual_blocks(model).values():
        block.before = lambda x: x  # type: ignore[method-assign]
        block.branch = lambda x, block=block: 2 * block.shortcut(x)  # type: ignore[method-assign,misc]
    result = paths(model, images, labels, draws=3)
    assert [norm / result.norm[0] for norm in result.norm] == pytest.approx([2.0**k for k in range(10)], rel=1e-4)
    # Binomial weights times 2^k are a binomial distribution with probability 2/3.
    expected = [math.comb(9, k) * 2**k / 3**9 for k in range(10)]
    assert result.carried == pytest.approx(expected, rel=1e-4)


def test_one_way_does_not_change_the_output() -> None:
    for name in ("resnet14", "preact-resnet14", "highway-19"):
        model, (images, _) = network(name), batch(4)
        x = stem(model, images)
        for block, state in zip(residual_blocks(model).values(), through(list(residual_blocks(model).values()), x), strict=False):
            for branch in (False, True):
                assert torch.allclose(one_way(block, state, branch), block(state), atol=1e-5)


def test_the_chunk_size_does_not_matter_and_the_seed_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = network("resnet14").double(), batch(7)
    whole = paths(model, images.double(), labels, draws=2, seed=4)
    assert paths(model, images.double(), labels, draws=2, seed=4) == whole
    assert paths(model, images.double(), labels, draws=2, seed=5).norm != whole.norm
    monkeypatch.setattr(module, "chunks", lambda *all: zip(*(tensor.split(3) for tensor in all), strict=True))
    assert paths(model, images.double(), labels, draws=2, seed=4).norm == pytest.approx(whole.norm, rel=1e-9)


def test_plain_networks_are_rejected() -> None:
    with pytest.raises(UserError, match="this network has no shortcuts"):
        paths(network("plain20"), *batch())


@pytest.mark.parametrize(
    ("carried", "range_"),
    [([0.0, 0.5, 0.5, 0.0], (1, 2)), ([0.04, 0.92, 0.04], (1, 2)), ([1.0], (0, 0)), ([0.3, 0.4, 0.3], (0, 2))],
)
def test_the_lengths_that_carry_the_gradient(carried: list[float], range_: tuple[int, int]) -> None:
    assert _middle(carried) == range_
