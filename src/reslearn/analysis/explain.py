"""Where a network looks: Grad-CAM (Selvaraju et al., 2017)."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError
from reslearn.nets.resnet import ResNet


def last_map(model: nn.Module) -> nn.Module:
    """The module that puts out the last feature map; of our networks, the one that is pooled for the last layer.

    Raises UserError where the network has none that is known.
    """
    if isinstance(model, ResNet):
        return model.end  # after the last BN and ReLU of a pre-activation network
    for name in ("features", "inception5b"):
        if hasattr(model, name):
            return model.get_submodule(name)
    raise UserError("Grad-CAM needs a network with a last feature map")


def grad_cam(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """Heat in [0, 1], (H, W) like the image: what speaks for the class; zero everywhere where nothing does.

    The last feature map's channels, weighted by the mean gradient of the class's logit; what is negative counts as zero.
    image: (1, C, H, W), normalized.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        kept.append(out)
        return out.clone()  # what follows may work in place

    handle = last_map(model).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logit = model(image)[0, target]
    finally:
        handle.remove()
    maps = kept[0]
    weights = torch.autograd.grad(logit, maps)[0].mean((2, 3), keepdim=True)
    heat = F.relu((weights * maps).sum(1, keepdim=True)).detach()
    heat = F.interpolate(heat, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    return heat / heat.max().clamp(min=1e-12)


def large_view(image: np.ndarray, preprocessing: Preprocessing, side: int = 640) -> np.ndarray:
    """The part of an image, uint8 (H, W, C), that a network sees, as finely as the image has it, up to `side` pixels or so."""
    fine = min(
        side / max(preprocessing.size), *(have / seen for have, seen in zip(image.shape, preprocessing.covered, strict=False))
    )
    height, width = (round(length * max(1.0, fine)) for length in preprocessing.size)
    view = preprocessing.model_copy(update={"size": (height, width), "pixel_mean": None})
    return view.fit(image).permute(1, 2, 0).numpy()
