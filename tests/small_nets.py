"""Small networks with non-trivial BN layers, and batches for them."""

import torch
from torch import Tensor, nn

from reslearn import create


def network(name: str, seed: int = 0, **options: object) -> nn.Module:
    """A network of four classes in evaluation mode, with random BN parameters and statistics."""
    torch.manual_seed(seed)
    model = create(name, 4, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


def batch(n: int = 6, seed: int = 1, side: int = 16) -> tuple[Tensor, Tensor]:
    """Images (n, 3, side, side) and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, side, generator=generator), torch.randint(0, 4, (n,), generator=generator)
