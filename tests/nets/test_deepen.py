"""Deepening keeps the function: exactly for residual networks, up to rounding for plain ones."""

import pytest
import torch
from torch import nn

import reslearn
from reslearn import UserError
from reslearn.nets.deepen import check_family, deepen, places


def trained(name: str, **options: object) -> nn.Module:
    """A network with BN statistics and parameters other than the initial ones."""
    torch.manual_seed(0)
    net = reslearn.create(name, 10, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    net.train()
    for _ in range(30):
        net(torch.randn(16, 3, 32, 32))
    return net.eval()


CASES = [
    ("resnet20", "resnet32", {}),
    ("resnet20", "resnet56", {}),
    ("resnet20", "resnet44", {"shortcut": "B"}),
    ("resnet8", "resnet20", {"order": "relu-before-addition"}),
    ("resnet8", "resnet20", {"order": "relu-only"}),
    ("resnet8", "resnet20", {"order": "full"}),
    ("resnet18", "resnet34", {}),
    ("resnet50", "resnet101", {}),
]


@pytest.mark.parametrize("where", ["spread", "append"])
@pytest.mark.parametrize(("shallow", "deep", "options"), CASES)
def test_a_residual_network_keeps_its_function_exactly(shallow: str, deep: str, options: dict, where: str) -> None:
    check_family(shallow, deep)
    small = trained(shallow, **options)
    torch.manual_seed(1)
    large = reslearn.create(deep, 10, **options)
    deepen(small, large, where)  # type: ignore[arg-type]
    x = torch.randn(8, 3, 32, 32)
    for mode in (False, True):  # the added branches are zero in training, too
        with torch.no_grad():
            assert torch.equal(small.train(mode)(x), large.train(mode)(x))


@pytest.mark.parametrize("where", ["spread", "append"])
def test_a_plain_network_keeps_its_function_up_to_rounding_in_evaluation_and_nearly_in_training(where: str) -> None:
    small = trained("plain20")
    large = reslearn.create("plain32", 10)
    generator = torch.Generator().manual_seed(2)
    deepen(small, large, where, [torch.randn(64, 3, 32, 32, generator=generator) for _ in range(4)])  # type: ignore[arg-type]
    x = torch.randn(64, 3, 32, 32, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(large.eval()(x), small.eval()(x), rtol=0, atol=1e-4)
        difference = (large.train()(x) - small.train()(x)).abs().mean() / small.train()(x).abs().mean()
    assert difference < 0.05


def test_a_deepened_network_can_be_trained() -> None:
    small = trained("resnet8")
    large = reslearn.create("resnet20", 10)
    deepen(small, large)  # type: ignore[arg-type]
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    optimizer = torch.optim.SGD(large.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(large.train()(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert any(block.bn2.weight.abs().max() > 0 for block in [large.layer1[1], large.layer1[2]]), "the added branches learn"


def test_places() -> None:
    assert places(3, 9, "append") == [0, 1, 2]
    assert places(3, 9, "spread") == [0, 3, 6]
    assert places(3, 5, "spread") == [0, 1, 3]
    for old in range(1, 12):
        for new in range(old, 40):
            spread = places(old, new, "spread")
            assert spread[0] == 0 and len(set(spread)) == old and max(spread) < new


@pytest.mark.parametrize(
    ("shallow", "deep", "message"),
    [
        ("resnet56", "resnet20", "no stage may shrink"),
        ("resnet20", "resnet20", "one must grow"),
        ("resnet20", "plain56", "differs in block"),
        ("resnet20", "resnet18", "differs in"),
        ("resnet50", "resnet101-v1.5", "differs in stride_in"),
        ("vgg11", "vgg16", "is not made of blocks"),
        ("highway-19", "highway-32", "differs in"),
        ("resnet34", "resnet50", "differs in block"),
    ],
)
def test_other_pairs_of_networks_are_rejected(shallow: str, deep: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_family(shallow, deep)


@pytest.mark.parametrize(
    ("shallow", "deep", "options", "message"),
    [
        ("resnet8", "resnet14", {"shortcut": "C"}, "projections in every block"),
        ("resnet8", "resnet14", {"merge": "constant"}, "can be the identity"),
        ("resnet8", "resnet14", {"merge": "shortcut-gate"}, "can be the identity"),
        ("resnet8", "resnet14", {"order": "bn-after-addition"}, "can be the identity"),
        ("resnet8", "resnet14", {"last_survival": 0.5}, "stochastic depth"),
        ("plain8", "plain14", {"order": "full"}, "can be the identity"),
        ("plain8", "plain14", {"order": "bn-after-addition"}, "can be the identity"),
    ],
)
def test_options_without_an_identity_block_are_rejected(shallow: str, deep: str, options: dict, message: str) -> None:
    check_family(shallow, deep)
    with pytest.raises(UserError, match=message):
        check_family(shallow, deep, options)
