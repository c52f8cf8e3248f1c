"""The center of the landscape is the network itself, and its weights are restored."""

import pytest
import torch
from torch.nn import functional as F

from reslearn.analysis.landscape import direction, landscape
from reslearn.analysis.subject import error
from small_nets import batch, network


def test_the_center_is_the_network_and_the_edge_is_not() -> None:
    model, (images, labels) = network("resnet8"), batch(8)
    result = landscape(model, images, labels, size=3, seed=2)
    with torch.no_grad():
        assert result.loss[1][1] == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert result.steps == [-1, 0, 1] and result.error[1][1] == error(model, images, labels)
    again = landscape(model, images, labels, size=3, seed=2)
    assert again == result and landscape(model, images, labels, size=3, seed=3) != result
    assert result.loss[0][0] != result.loss[1][1]


def test_a_corner_is_the_network_moved_there() -> None:
    model, (images, labels) = network("resnet8"), batch(8)
    result = landscape(model, images, labels, size=3, reach=0.5, seed=2)
    generator = torch.Generator().manual_seed(2)
    moved, one, two = network("resnet8"), direction(model, generator), direction(model, generator)
    with torch.no_grad():
        for parameter, first, second in zip(moved.parameters(), one, two, strict=True):
            parameter += -0.5 * first + 0.5 * second
        assert result.loss[0][2] == pytest.approx(F.cross_entropy(moved(images), labels).item(), rel=1e-5)


def test_the_weights_are_restored_exactly() -> None:
    model, (images, labels) = network("resnet14"), batch(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def same() -> bool:
        return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    landscape(model, images, labels, size=3, reach=0.3)
    assert same()

    def stop(what: str, done: int, total: int) -> None:
        assert not same(), "in progress"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape(model, images, labels, size=3, progress=stop)
    assert same()


def test_directions_have_the_filters_norms() -> None:
    model = network("resnet8")
    for parameter, step in zip(model.parameters(), direction(model, torch.Generator().manual_seed(0)), strict=True):
        if parameter.ndim < 2:
            assert not step.any(), "biases and BN weights"
        else:
            assert torch.allclose(step.flatten(1).norm(dim=1), parameter.flatten(1).norm(dim=1), rtol=1e-4)
