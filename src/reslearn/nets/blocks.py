"""The building block: body x order x merge x shortcut. Every kind of block in the papers is a value of its arguments.

A body is a row of convolutions; the order says where BN and ReLU stand (IM Figure 4); the merge how branch and shortcut become
one (IM Figure 2); the shortcut how the input is brought to the output's shape (DRL 3.3). Module names are torchvision's, so that
weights travel unconverted.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from reslearn.kernels import fuse as fused
from reslearn.nets.merges import Merge, Merging, StochasticDepth
from reslearn.nets.shortcuts import Shortcut, conv, make_shortcut

Body = Literal["basic", "bottleneck", "single"]
StrideIn = Literal["1x1", "3x3"]
Order = Literal["original", "bn-after-addition", "relu-before-addition", "relu-only", "full", "no-bn"]

# body -> its convolutions as (kernel size, output channels as a multiple of the block's width)
BODIES: dict[str, tuple[tuple[int, int], ...]] = {
    "basic": ((3, 1), (3, 1)),
    "bottleneck": ((1, 1), (3, 1), (1, 4)),
    "single": ((3, 1),),  # Highway's
}
# order -> what stands before each convolution, after each but the last, after the last, and after the addition (IM Figure 4)
ORDERS: dict[str, tuple[str, str, str, str]] = {
    "original": ("", "bn relu", "bn", "relu"),
    "bn-after-addition": ("", "bn relu", "", "bn relu"),
    "relu-before-addition": ("", "bn relu", "bn relu", ""),
    "relu-only": ("relu", "bn", "bn", ""),
    "full": ("bn relu", "", "", ""),
    "no-bn": ("", "relu", "relu", ""),  # Highway's: convolutions with bias
}
PRE_ACTIVATION = ("relu-only", "full")  # the shortcut carries what no ReLU has touched


def expansion(body: Body) -> int:
    """Output channels of a body as a multiple of its width: 4 for the bottleneck, else 1."""
    return BODIES[body][-1][1]


def sequence(order: Order, depth: int) -> tuple[list[str], list[str], list[str]]:
    """Names of a block's modules in the order they are applied: the first activation, the rest of the branch, the end."""
    before, between, last, after = (part.split() for part in ORDERS[order])
    start = [name + "1" if name == "bn" else name for name in before]
    branch: list[str] = []
    for i in range(1, depth + 1):
        parts = [*(before if i > 1 else []), "conv", *(between if i < depth else last)]
        branch += [name if name == "relu" else f"{name}{i}" for name in parts]
    return start, branch, [name if name == "relu" else f"{name}{depth}" for name in after]


def joined(names: list[str]) -> list[str]:
    """Names with each ReLU that follows a BN joined to it: "bn1", "relu" -> "bn1+relu", which is one operation."""
    found: list[str] = []
    for name in names:
        if name == "relu" and found and found[-1].startswith("bn"):
            found[-1] += "+relu"
        else:
            found.append(name)
    return found


class Block(nn.Module):
    """(N, in_channels, H, W) -> (N, width * expansion(body), H / stride, W / stride).

    In the two pre-activation orders, a block whose shape changes activates its input before branch and shortcut part, and the
    net's `first` block finds it activated already (IM, appendix). survival: see StochasticDepth. scale, gate_bias: see Merging.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        body: Body = "basic",
        order: Order = "original",
        merge: Merge = "residual",
        shortcut: Shortcut = "B",
        stride_in: StrideIn = "1x1",
        first: bool = False,
        survival: float = 1.0,
        per_sample: bool = False,
        scale: tuple[float, float] = (0.5, 0.5),
        gate_bias: float = -6.0,
    ) -> None:
        super().__init__()
        start, branch, self.end = sequence(order, len(BODIES[body]))
        out_channels = width * expansion(body)
        changes = stride != 1 or in_channels != out_channels
        start = [] if first else start
        self.shared = start if changes else []
        self.branch = branch if changes else start + branch
        used = {*self.shared, *self.branch, *self.end}
        # The basic body has no 1x1: its stride is always in its first convolution.
        strided = 2 if body == "bottleneck" and stride_in == "3x3" else 1
        self.last_bn = f"bn{len(BODIES[body])}" if self.branch[-1].startswith("bn") else None
        channels = in_channels
        for i, (kernel, multiple) in enumerate(BODIES[body], start=1):
            before, channels = channels, width * multiple
            convolution = conv(before, channels, kernel, stride if i == strided else 1, bias=order == "no-bn")
            normalized = before if order == "full" else channels
            modules = {f"conv{i}": convolution, f"bn{i}": nn.BatchNorm2d(normalized)}
            for name in modules if order != "full" else reversed(modules):
                if name in used:
                    self.add_module(name, modules[name])
        self.relu = nn.ReLU(inplace=order != "relu-only")  # there it meets the block's input, which the shortcut needs
        self.downsample = None
        self.merge = None
        if merge != "plain":
            self.downsample = make_shortcut(shortcut, in_channels, channels, stride, normalize=order not in PRE_ACTIVATION)
            gate_kernel = 3 if order == "no-bn" else 1
            self.merge = Merging(merge, channels, scale=scale, gate_bias=gate_bias, gate_kernel=gate_kernel)
        self.gate_depth = StochasticDepth(survival, per_sample) if survival < 1 else None
        self.shared, self.branch, self.end = joined(self.shared), joined(self.branch), joined(self.end)
        # The last BN, the addition and ReLU are one operation too, where they follow each other (DRL Figure 2).
        self.closes = merge == "residual" and self.gate_depth is None and self.end == ["relu"] and self.branch[-1] == self.last_bn

    def run(self, names: list[str], x: Tensor) -> Tensor:
        """x through modules by name."""
        for name in names:
            name, relu, _ = name.partition("+")
            module = getattr(self, name)
            x = fused.bn_relu(module, x, self.relu) if relu else fused.conv(module, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.shared, x)
        if self.merge is None:
            out = self.run(self.branch, x)
        else:
            shortcut = fused.for_shortcut(x)
            shortcut = shortcut if self.downsample is None else self.downsample(shortcut)
            if self.closes and fused.enabled():
                return fused.bn_relu(getattr(self, self.branch[-1]), self.run(self.branch[:-1], x), self.relu, shortcut)
            if self.gate_depth is None:
                branch = self.run(self.branch, x)
            else:
                branch = self.gate_depth(lambda inside: self.run(self.branch, inside), x, shortcut)
            out = self.merge(branch, shortcut)
        return self.run(self.end, out)


@torch.no_grad()
def initialize(net: nn.Module, *, zero_init_last_gamma: bool = False) -> None:
    """He initialization of every convolution: normal with variance 2 / fan-out (He et al., Delving Deep into Rectifiers).

    The last linear layer keeps PyTorch's own uniform initialization. zero_init_last_gamma starts every residual branch at zero
    (Goyal et al., 2017, section 5.1); it is not in the paper, so it is off unless a recipe asks for it.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, Merging) and module.gate is not None and module.gate.bias is not None:
            nn.init.constant_(module.gate.bias, module.gate_bias)
        if zero_init_last_gamma and isinstance(module, Block) and module.last_bn is not None:
            nn.init.zeros_(getattr(module, module.last_bn).weight)
