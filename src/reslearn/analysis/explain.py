"""Heat maps of the evidence for a class: Grad-CAM (Selvaraju et al., 2017)."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError
from reslearn.nets.resnet import ResNet


def last_map(model: nn.Module) -> nn.Module:
    """The module whose output is the last feature map. Raises UserError for an unsupported network."""
    if isinstance(model, ResNet):
        return model.end  # after a pre-activation network's final BN and ReLU
    for name in ("features", "inception5b"):
        if hasattr(model, name):
            return model.get_submodule(name)
    raise UserError("Grad-CAM does not support this network: it has no known last feature map")


def grad_cam(model: nn.Module, image: Tensor, target: int) -> Tensor:
    """Evidence for a class: heat (H, W) on [0, 1] in the size of the image, all zero where no region supports the class.

    The last feature map's channels are weighted by the mean gradient of the class's logit, summed, and negative values set to 0.
    image: (1, C, H, W), normalized.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        outputs.append(out)
        return out.clone()  # the next layer may work in place

    handle = last_map(model).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logit = model(image)[0, target]
    finally:
        handle.remove()
    maps = outputs[0]
    weights = torch.autograd.grad(logit, maps)[0].mean((2, 3), keepdim=True)
    heat = F.relu((weights * maps).sum(1, keepdim=True)).detach()
    heat = F.interpolate(heat, image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    return heat / heat.max().clamp(min=1e-12)


def large_view(image: np.ndarray, preprocessing: Preprocessing, side: int = 640) -> np.ndarray:
    """The network's view of an image, uint8 (H, W, C), at the image's own resolution, up to about `side` pixels."""
    scales = (pixels / covered for pixels, covered in zip(image.shape, preprocessing.covered, strict=False))
    scale = max(1.0, min(side / max(preprocessing.size), *scales))
    height, width = (round(length * scale) for length in preprocessing.size)
    view = preprocessing.model_copy(update={"size": (height, width), "pixel_mean": None})
    return view.fit(image).permute(1, 2, 0).numpy()
