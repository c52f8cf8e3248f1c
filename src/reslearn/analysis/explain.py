"""Where a network looks: Grad-CAM (Selvaraju et al., 2017)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.errors import UserError


def last_map(model: nn.Module) -> nn.Module:
    """The module that puts out the last feature map. Raises UserError where the network has none that is known."""
    for name in ("stages", "features", "inception5b"):
        if name == "stages" and hasattr(model, "stages"):
            return model.get_submodule(model.stages[-1])  # type: ignore[arg-type]
        if name != "stages" and hasattr(model, name):
            return model.get_submodule(name)
    raise UserError("Grad-CAM needs a network with a last feature map")


def grad_cam(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """Heat in [0, 1], (H, W) like the image: what speaks for the class.

    The last feature map's channels, weighted by the mean gradient of the class's logit; what is negative counts as zero.
    image: (1, C, H, W), normalised.
    """
    kept: list[Tensor] = []
    handle = last_map(model).register_forward_hook(lambda *seen: kept.append(seen[2]))
    try:
        logit = model(image)[0, target]
    finally:
        handle.remove()
    maps = kept[0]
    weights = torch.autograd.grad(logit, maps)[0].mean((2, 3), keepdim=True)
    heat = F.relu((weights * maps).sum(1, keepdim=True)).detach()
    heat = F.interpolate(heat, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    return heat / heat.max().clamp(min=1e-12)
