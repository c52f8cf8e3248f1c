"""The middle of the landscape is the network, and it comes back whole."""

import pytest
import torch
from torch.nn import functional as F

from reslearn.analysis.landscape import direction, landscape
from reslearn.analysis.subject import error
from small_nets import batch, network


def test_the_middle_of_the_landscape_is_the_net_and_its_rim_is_not() -> None:
    model, (images, labels) = network("resnet8"), batch(8)
    found = landscape(model, images, labels, size=3, seed=2)
    with torch.no_grad():
        assert found.loss[1][1] == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert found.steps == [-1, 0, 1] and found.error[1][1] == error(model, images, labels)
    again = landscape(model, images, labels, size=3, seed=2)
    assert again == found and landscape(model, images, labels, size=3, seed=3) != found
    assert found.loss[0][0] != found.loss[1][1]


def test_a_corner_is_the_net_moved_there() -> None:
    model, (images, labels) = network("resnet8"), batch(8)
    found = landscape(model, images, labels, size=3, reach=0.5, seed=2)
    generator = torch.Generator().manual_seed(2)
    moved, one, two = network("resnet8"), direction(model, generator), direction(model, generator)
    with torch.no_grad():
        for parameter, first, second in zip(moved.parameters(), one, two, strict=True):
            parameter += -0.5 * first + 0.5 * second
        assert found.loss[0][2] == pytest.approx(F.cross_entropy(moved(images), labels).item(), rel=1e-5)


def test_the_weights_come_back_bit_for_bit() -> None:
    model, (images, labels) = network("resnet14"), batch(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def same() -> bool:
        return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    landscape(model, images, labels, size=3, reach=0.3)
    assert same()

    def stop(what: str, done: int, total: int) -> None:
        assert not same(), "it is on its way"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape(model, images, labels, size=3, progress=stop)
    assert same()


def test_directions_have_the_filters_norms() -> None:
    model = network("resnet8")
    for parameter, step in zip(model.parameters(), direction(model, torch.Generator().manual_seed(0)), strict=True):
        if parameter.ndim < 2:
            assert not step.any(), "biases, and weights of BN"
        else:
            assert torch.allclose(step.flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1), rtol=1e-4)
