"""Batch normalization over the images of all ranks: torch's own on GPUs; on CPUs, where torch has none, the same."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from reslearn.training import ranks


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with each of its BN layers normalizing by all ranks' images together; names and weights stay."""
    if ranks.count() == 1:
        return model
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = OnCpu  # type: ignore[assignment]  # the state is the same, and only that
    return model


class OnCpu(_BatchNorm):
    """(N, C, H, W) -> the same, in training by the mean and variance of each channel over all ranks' (N, H, W).

    All ranks must hold as many images (Ioffe and Szegedy, 2015, algorithm 1, over the ranks' mini-batches together).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() == 4

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        each = Gathered.apply(torch.stack([mean, var]))  # (ranks, 2, C)
        mean = each[:, 0].mean(0)
        var = (each[:, 1] + (each[:, 0] - mean) ** 2).mean(0)
        self._count(mean.detach(), var.detach(), len(each) * x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(var + self.eps)
        y = (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)

    @torch.no_grad()
    def _count(self, mean: Tensor, var: Tensor, images: int) -> None:
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (images / (images - 1)), self.momentum)


class Gathered(torch.autograd.Function):
    """(...) of each rank -> (ranks, ...) on all of them; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(ranks.count())]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ranks.total(grads[0].clone())[ranks.rank()]
