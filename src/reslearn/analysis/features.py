"""What a network knows of images before it names them: the input of its last linear layer."""

import torch
from torch import Tensor, nn

from reslearn.analysis.subject import BATCH
from reslearn.errors import UserError


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """float32 (N, features). Raises UserError where the network has no linear layer."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("this network has no linear layer")
    kept: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda *seen: kept.append(seen[1][0].float().cpu()))
    try:
        for part in images.split(BATCH):
            model(part)
    finally:
        handle.remove()
    return torch.cat(kept)


def in_two_dimensions(rows: Tensor, seed: int = 0) -> Tensor:
    """The first two principal components: float32 (N, 2)."""
    centred = rows - rows.mean(0)
    torch.manual_seed(seed)
    _, _, directions = torch.pca_lowrank(centred, q=min(6, *rows.shape), center=False)
    return centred @ directions[:, :2]
