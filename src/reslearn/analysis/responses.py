"""How strongly each layer responds: the standard deviations of DRL Figure 7."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reslearn.analysis.parts import convolutions
from reslearn.analysis.subject import chunks
from reslearn.errors import UserError


@dataclass(frozen=True)
class Response:
    """One 3x3 layer: its state-dict name, the module whose output is its response, and that output's standard deviation.

    at: the BN behind the convolution; or the convolution itself, where no BN takes its output.
    """

    layer: str
    at: str
    std: float


class _Moments:
    """Standard deviation of all numbers of tensors that come one after the other."""

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
    """The standard deviation of each 3x3 layer's output over images, channels and places, in layer order.

    As DRL Figure 7: after BN, before the non-linearity or the addition. Where BN stands before the convolution (pre-activation),
    the first layer of a basic block is still followed by the second one's BN, and is measured there; the last layer's output
    goes into the addition as it is, and is measured as it is. `at` says which. So it is in a net without BN.
    images: (N, C, H, W), normalized. Raises UserError where there is no 3x3 layer.
    """
    followed = convolutions(model, images[:2], (3, 3))
    if not followed:
        raise UserError("this network has no 3x3 layer")
    points = {layer: bn or layer for layer, bn in followed.items()}
    found = {layer: _Moments() for layer in points}
    handles = [model.get_submodule(point).register_forward_hook(_measuring(found[layer])) for layer, point in points.items()]
    try:
        for (part,) in chunks(images):
            model(part)
    finally:
        for handle in handles:
            handle.remove()
    return [Response(layer, points[layer], moments.std()) for layer, moments in found.items()]


def _measuring(moments: _Moments) -> Callable[..., None]:
    def hook(*seen: Any) -> None:
        moments.add(seen[2])

    return hook
