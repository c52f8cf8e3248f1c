"""How strongly each layer responds: the standard deviations of DRL Figure 7."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reslearn.errors import UserError


@dataclass(frozen=True)
class Response:
    """One 3x3 layer: its state-dict name, and the standard deviation of what it puts out over images, channels and places."""

    layer: str
    std: float


def _convolution_hook(name: str, then: Callable[[str, Tensor], None]) -> Callable[..., None]:
    return lambda *seen: then(name, seen[2])


@torch.no_grad()
def responses(model: nn.Module, images: Tensor) -> list[Response]:
    """Of each 3x3 layer in order, after the BN that takes the layer's output and before the non-linearity or addition.

    Where BN stands before the convolution (pre-activation) or is missing, of the convolution itself. images: (N, C, H, W),
    normalised. Raises UserError where there is no 3x3 layer.
    """
    found: dict[str, float] = {}
    last: tuple[str, Tensor] | None = None

    def convolved(name: str, out: Tensor) -> None:
        nonlocal last
        found[name] = out.float().std().item()
        last = name, out

    def normalised(inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if last is not None and inputs[0] is last[1]:
            found[last[0]] = out.float().std().item()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            handles.append(module.register_forward_hook(_convolution_hook(name, convolved)))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(lambda *seen: normalised(seen[1], seen[2])))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UserError("this network has no 3x3 layer")
    return [Response(name, std) for name, std in found.items()]
