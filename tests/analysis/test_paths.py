"""Sampled paths against autograd on networks whose blocks are cut by hand."""

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
    """At the first block's input; through the branches of the chosen blocks only, if given: slow, one whole pass each."""
    start = stem(model, images).detach().requires_grad_()
    x = start
    for i, block in enumerate(residual_blocks(model).values()):
        x = block(x) if chosen is None else one_way(block, x, branch=i in chosen)
    return torch.autograd.grad(F.cross_entropy(head(model, x), labels), start)[0]


def subsets(n: int) -> list[frozenset[int]]:
    return [frozenset(i for i in range(n) if choice >> i & 1) for choice in range(2**n)]


@pytest.mark.parametrize("name", ["resnet8", "preact-resnet8"])
def test_gradients_of_all_paths_sum_to_the_gradient(name: str) -> None:
    """With the masks of the non-linearities kept, the gradient is the sum over the 2^n paths."""
    model, (images, labels) = network(name), batch(4)
    every = list(residual_blocks(model).values())
    backward = _Backward(model, every, images, labels, len(images))
    whole = gradient(model, images, labels)
    total = torch.stack([backward.along(chosen) for chosen in subsets(len(every))]).sum(0)
    assert torch.allclose(total, whole, atol=1e-6 * whole.abs().max().item() + 1e-9)


def test_each_path_is_the_gradient_of_the_net_with_the_other_ways_cut() -> None:
    model, (images, labels) = network("resnet14", shortcut="B").double(), batch(3)
    images = images.double()
    every = list(residual_blocks(model).values())
    backward = _Backward(model, every, images, labels, len(images))
    for chosen in (frozenset[int](), frozenset({0, 3}), frozenset({2}), frozenset(range(6))):
        assert torch.allclose(backward.along(chosen), gradient(model, images, labels, chosen), rtol=1e-9, atol=1e-15)


def test_the_ends_are_all_shortcuts_and_all_branches() -> None:
    model, (images, labels) = network("preact-resnet14"), batch(4)
    found = paths(model, images, labels, draws=2)
    assert found.blocks == 6 and sum(found.share) == pytest.approx(1) and sum(found.carried) == pytest.approx(1)
    assert found.share == [math.comb(6, k) / 64 for k in range(7)]
    assert [len(each) for each in found.sampled] == [1, 2, 2, 2, 2, 2, 1]
    assert found.norm[0] == pytest.approx(gradient(model, images, labels, frozenset()).norm().item(), rel=1e-4)
    assert found.norm[-1] == pytest.approx(gradient(model, images, labels, frozenset(range(6))).norm().item(), rel=1e-4)
    low, high = found.effective
    assert sum(found.carried[low : high + 1]) >= 0.95 and found.effective_share == sum(found.share[low : high + 1])


def test_in_a_linear_net_a_path_is_a_product() -> None:
    """Branches that double what they get: a path through k of them has 2^k times the gradient of the one through none."""
    model, (images, labels) = network("preact-resnet20"), batch(2)
    for block in residual_blocks(model).values():
        block.before = lambda x: x  # type: ignore[method-assign]
        block.branch = lambda x, block=block: 2 * block.shortcut(x)  # type: ignore[method-assign,misc]
    found = paths(model, images, labels, draws=3)
    assert [norm / found.norm[0] for norm in found.norm] == pytest.approx([2.0**k for k in range(10)], rel=1e-4)
    # Binomial weights times 2^k are (1/3, 2/3)'s binomial distribution.
    expected = [math.comb(9, k) * 2**k / 3**9 for k in range(10)]
    assert found.carried == pytest.approx(expected, rel=1e-4)


def test_one_way_changes_no_value() -> None:
    for name in ("resnet14", "preact-resnet14", "highway-19"):
        model, (images, _) = network(name), batch(4)
        x = stem(model, images)
        for block, state in zip(residual_blocks(model).values(), through(list(residual_blocks(model).values()), x), strict=False):
            for branch in (False, True):
                assert torch.allclose(one_way(block, state, branch), block(state), atol=1e-5)


def test_images_in_pieces_and_the_same_seed_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, labels) = network("resnet14").double(), batch(7)
    whole = paths(model, images.double(), labels, draws=2, seed=4)
    assert paths(model, images.double(), labels, draws=2, seed=4) == whole
    assert paths(model, images.double(), labels, draws=2, seed=5).norm != whole.norm
    monkeypatch.setattr(module, "chunks", lambda *all: zip(*(tensor.split(3) for tensor in all), strict=True))
    assert paths(model, images.double(), labels, draws=2, seed=4).norm == pytest.approx(whole.norm, rel=1e-9)


def test_plain_networks_are_refused() -> None:
    with pytest.raises(UserError, match="is plain: it has no shortcuts"):
        paths(network("plain20"), *batch())


@pytest.mark.parametrize(
    ("carried", "range_"),
    [([0.0, 0.5, 0.5, 0.0], (1, 2)), ([0.04, 0.92, 0.04], (1, 2)), ([1.0], (0, 0)), ([0.3, 0.4, 0.3], (0, 2))],
)
def test_the_lengths_that_carry_the_gradient(carried: list[float], range_: tuple[int, int]) -> None:
    assert _middle(carried) == range_
