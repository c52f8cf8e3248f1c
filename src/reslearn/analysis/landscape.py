"""The loss around a network's weights, along two random directions normalized by filter (Li et al., 2018)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reslearn.analysis.subject import logits
from reslearn.evaluation.protocols import error_and_loss
from reslearn.progress import Progress, silent


@dataclass(frozen=True)
class Landscape:
    """loss[i][j]: mean cross-entropy at steps[i] along the first direction and steps[j] along the second; error in percent."""

    steps: list[float]
    loss: list[list[float]]
    error: list[list[float]]


def direction(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """A Gaussian direction whose filters have the norms of the model's filters; zero for 1-dim parameters (biases, BN)."""
    steps = []
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.ndim < 2:
            steps.append(torch.zeros_like(parameter))
            continue
        dims = tuple(range(1, parameter.ndim))
        size = parameter.detach().square().sum(dims, keepdim=True).sqrt()
        steps.append(noise * size / noise.square().sum(dims, keepdim=True).sqrt().clamp(min=1e-12))
    return steps


@torch.no_grad()
def landscape(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    size: int = 15,
    reach: float = 1.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Landscape:
    """The loss on a grid of size x size points from -reach to reach, in filter norms; the center is the model itself.

    images: (N, C, H, W), labels: (N,). size: odd. BN statistics, weights and biases stay fixed. The model's weights are restored
    exactly at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    one, two = direction(model, generator), direction(model, generator)
    steps = torch.linspace(-reach, reach, size).tolist()
    steps[size // 2] = 0.0
    losses, errors = [[0.0] * size for _ in steps], [[0.0] * size for _ in steps]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        for i, a in enumerate(steps):
            for j, b in enumerate(steps):
                for parameter, value, first, second in zip(model.parameters(), weights, one, two, strict=True):
                    parameter.copy_(value + a * first + b * second)
                errors[i][j], losses[i][j] = error_and_loss(logits(model, images).cpu(), labels.cpu())
                progress("landscape", i * size + j + 1, size * size)
    finally:
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    return Landscape(steps, losses, errors)
