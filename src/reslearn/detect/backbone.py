"""Splits a classification network for detection: into layers shared by the whole image, and layers applied to each region.

Residual and plain networks: all stages but the last are shared; the last runs on each region (DRL appendix A). VGG: the
convolutions are shared, pool5 is dropped, and the fully connected layers run on each region.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchvision.models import VGG
from torchvision.ops import FrozenBatchNorm2d

from reslearn.errors import UserError
from reslearn.nets.resnet import ResNet, Stem


class Stages(Stem):
    """Stem and stages `run` of a network, with its state-dict names: (N, C, H, W) -> {"0": the map of the first of `out`, ...}."""

    def __init__(self, net: ResNet, run: tuple[str, ...], out: tuple[str, ...]) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = net.conv1, net.bn1, net.relu, net.maxpool
        self.run, self.out = run, out
        for stage in run:
            self.add_module(stage, net.get_submodule(stage))
        if run[-1] == net.stages[-1]:
            self.end = net.end

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        maps = {}
        for stage in self.run:
            x = self.get_submodule(stage)(x)
            if stage in self.out:
                maps[str(len(maps))] = x
        if hasattr(self, "end"):
            maps[str(len(maps) - 1)] = self.end(x)
        return maps


class LastStage(nn.Module):
    """The last stage on pooled regions: (R, C, 14, 14) -> features (R, D). `maps` returns them before pooling, (R, D, 7, 7)."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.stage = net.stages[-1]
        self.add_module(self.stage, net.get_submodule(self.stage))
        self.end, self.avgpool = net.end, net.avgpool

    def maps(self, x: Tensor) -> Tensor:
        return self.end(self.get_submodule(self.stage)(x))

    def flat(self, maps: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(maps), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.maps(x))


class Convolutions(nn.Module):
    """VGG's convolutions without pool5: (N, C, H, W) -> {"0": (N, 512, H / 16, W / 16)}."""

    def __init__(self, net: VGG) -> None:
        super().__init__()
        self.features = nn.Sequential(*list(net.features.children())[:-1])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.features(x)}


class FullyConnected(nn.Module):
    """VGG's fc6 and fc7, with their dropout, on pooled regions: (R, 512, 7, 7) -> (R, 4096)."""

    def __init__(self, net: VGG) -> None:
        super().__init__()
        self.classifier = net.classifier[:-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(x, 1))


@dataclass(frozen=True)
class NetHalves:
    """The two halves of a network. channels, stride (px): of the shared map. roi: side of a pooled region. features: of a region.

    parts: modules of the shared half in order, for freezing the first ones.
    """

    shared: nn.Module
    region: nn.Module
    channels: int
    stride: int
    roi: int
    features: int
    parts: list[list[nn.Module]]


def split(net: nn.Module) -> NetHalves:
    """Splits a network into two halves made of its own modules. Raises UserError for an unsupported network."""
    if isinstance(net, ResNet):
        *shared, _ = net.stages
        parts = [[net.conv1, net.bn1], *([net.get_submodule(stage)] for stage in shared)]
        backbone = Stages(net, tuple(shared), (shared[-1],))
        return NetHalves(backbone, LastStage(net), net.channels[-2], net.strides[-2], 14, net.channels[-1], parts)
    if isinstance(net, VGG):
        backbone, blocks = Convolutions(net), [[]]
        for module in backbone.features:
            blocks[-1].append(module)
            if isinstance(module, nn.MaxPool2d):
                blocks.append([])
        convolutions = [module for module in backbone.features if isinstance(module, nn.Conv2d)]
        fc = [module for module in net.classifier if isinstance(module, nn.Linear)]
        stride, channels = 2 ** (len(blocks) - 1), convolutions[-1].out_channels  # only max pooling has a stride
        side = math.isqrt(fc[0].in_features // channels)
        return NetHalves(backbone, FullyConnected(net), channels, stride, side, fc[-2].out_features, blocks)
    raise UserError(f"detection does not support {type(net).__name__}: use a residual, plain or highway net, or VGG")


def stages_of(net: nn.Module) -> ResNet:
    """The network, checked to have the stages that a pyramid and masks need. Raises UserError."""
    if not isinstance(net, ResNet):
        raise UserError(f"a pyramid (kind='fpn') and masks need a network with stages: {type(net).__name__} has none")
    return net


class FixedBatchNorm(FrozenBatchNorm2d):
    """torchvision's FrozenBatchNorm2d as one operation each way, which keeps the input's dtype and saves no map for backward.

    torchvision's multiplies and adds in float32: in bf16, every map after it would take twice the memory and time.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _Fixed.apply(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)  # type: ignore[return-value]


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(variance, gamma)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, gamma, beta, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        variance, gamma = ctx.saved_tensors
        x_grad = F.batch_norm(grads[0], torch.zeros_like(variance), variance, gamma, eps=ctx.eps)  # the same map without shift
        return x_grad, None, None, None, None, None


def freeze_batch_norm(net: nn.Module) -> None:
    """Replaces every BN of a network by the fixed affine map of its statistics (DRL appendix A). State-dict names stay the same."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                fixed = FixedBatchNorm(child.num_features, child.eps).to(child.weight.device)
                state = {key: tensor for key, tensor in child.state_dict().items() if key != "num_batches_tracked"}
                fixed.load_state_dict(state, assign=True)
                setattr(module, name, fixed)
