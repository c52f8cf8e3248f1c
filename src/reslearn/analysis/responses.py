"""Layer responses: the standard deviations of DRL Figure 7."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reslearn.analysis.parts import convolutions
from reslearn.analysis.subject import chunks
from reslearn.errors import UserError


@dataclass(frozen=True)
class Response:
    """One 3x3 layer's response. layer: state-dict name. at: the BN that follows the convolution, or the convolution itself if
    none does. std: standard deviation of the output of `at`."""

    layer: str
    at: str
    std: float


class _Moments:
    """Running standard deviation over the elements of several tensors."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        x = x.double()
        self.count += x.numel()
        self.total += x.sum().item()
        self.squares += x.square().sum().item()

    def std(self) -> float:
        mean = self.total / self.count
        return math.sqrt(max(self.squares / self.count - mean * mean, 0) * self.count / max(self.count - 1, 1))


@torch.no_grad()
def responses(model: nn.Module, images: Tensor) -> list[Response]:
    """The standard deviation of each 3x3 layer's output over images, channels and positions, in layer order.

    As in DRL Figure 7: after BN, before the nonlinearity or the addition. In a pre-activation network, the first layer of a basic
    block is measured after the second layer's BN; the last layer's output goes directly into the addition and is measured without
    BN, as are all layers of a network without BN. `at` names the measured module.
    images: (N, C, H, W), normalized. Raises UserError if there is no 3x3 layer.
    """
    followed = convolutions(model, images[:2], (3, 3))
    if not followed:
        raise UserError("this network has no 3x3 layer")
    points = {layer: bn or layer for layer, bn in followed.items()}
    moments = {layer: _Moments() for layer in points}
    handles = [
        model.get_submodule(point).register_forward_hook(lambda *hook, layer=layer: moments[layer].add(hook[2]))
        for layer, point in points.items()
    ]
    try:
        for (part,) in chunks(images):
            model(part)
    finally:
        for handle in handles:
            handle.remove()
    return [Response(layer, point, moments[layer].std()) for layer, point in points.items()]
