"""Batch normalization over all ranks: PyTorch's SyncBatchNorm on GPUs, and an equivalent on CPUs, where PyTorch has none."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from reslearn.training import ranks


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns the model with synchronized BN layers. Names and weights stay the same."""
    if ranks.count() == 1:
        return model
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]  # both have the same attributes
    return model


class CpuSyncBatchNorm(_BatchNorm):
    """(N, C, H, W) -> (N, C, H, W), in training with the mean and variance of each channel over (N, H, W) of all ranks.

    All ranks must have the same number of images (Ioffe and Szegedy, 2015, algorithm 1, applied to the global mini-batch).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() == 4

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        moments = AllGather.apply(torch.stack([mean, var]))  # (ranks, 2, C)
        mean = moments[:, 0].mean(0)
        var = (moments[:, 1] + (moments[:, 0] - mean) ** 2).mean(0)
        self._update_statistics(mean.detach(), var.detach(), len(moments) * x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(var + self.eps)
        y = (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)


class AllGather(torch.autograd.Function):
    """Gathers a tensor (...) of each rank into (ranks, ...) on all ranks. The gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(ranks.count())]
        dist.all_gather(parts, own.contiguous())
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ranks.total(grads[0].clone())[ranks.rank()]
