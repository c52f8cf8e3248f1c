"""The building block: body x merge x shortcut (He et al., Deep Residual Learning, Figures 2 and 5, section 3.3).

A body is a row of convolutions; the merge says how its output meets the block's input; the shortcut says how
the input is brought to the output's shape. Module names are torchvision's, so that weights travel unconverted.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Body = Literal["basic", "bottleneck"]
Merge = Literal["residual", "plain"]
Shortcut = Literal["A", "B", "C"]
StrideIn = Literal["1x1", "3x3"]

# body -> its convolutions as (kernel size, output channels as a multiple of the block's width)
BODIES: dict[str, tuple[tuple[int, int], ...]] = {
    "basic": ((3, 1), (3, 1)),
    "bottleneck": ((1, 1), (3, 1), (1, 4)),
}


def expansion(body: Body) -> int:
    """Output channels of a body as a multiple of its width: 1 for basic, 4 for bottleneck."""
    return BODIES[body][-1][1]


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (batch normalisation follows it), padded so that stride 1 keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class ZeroPadShortcut(nn.Module):
    """Option A: every stride-th pixel, with zero channels appended after the input's own (DRL 3.3). No parameters."""

    def __init__(self, added_channels: int, stride: int) -> None:
        super().__init__()
        self.added_channels, self.stride = added_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.added_channels))  # (N, C, H, W) -> (N, C + added, H/s, W/s)


def make_shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The way round the body; None where it is the identity.

    A: zero-padded identity. B: projection where the shape changes. C: projection in every block.
    """
    changes = stride != 1 or in_channels != out_channels
    if kind == "C" or (kind == "B" and changes):
        return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
    return ZeroPadShortcut(out_channels - in_channels, stride) if changes else None


class Block(nn.Module):
    """Convolutions, each with batch normalisation, merged with the block's input.

    (N, in_channels, H, W) -> (N, width * expansion(body), H / stride, W / stride). ReLU follows every
    convolution's BN but the last, whose ReLU comes after the merge. A plain block has no shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        body: Body = "basic",
        merge: Merge = "residual",
        shortcut: Shortcut = "B",
        stride_in: StrideIn = "1x1",
    ) -> None:
        super().__init__()
        # The basic body has no 1x1: its stride is always in its first convolution.
        strided = 2 if body == "bottleneck" and stride_in == "3x3" else 1
        channels = in_channels
        self.depth = len(BODIES[body])
        for i, (kernel, multiple) in enumerate(BODIES[body], start=1):
            self.add_module(f"conv{i}", conv(channels, width * multiple, kernel, stride if i == strided else 1))
            channels = width * multiple
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.residual = merge == "residual"
        self.downsample = make_shortcut(shortcut, in_channels, channels, stride) if self.residual else None

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The normalisation whose gamma scales the residual branch."""
        module = self.get_submodule(f"bn{self.depth}")
        assert isinstance(module, nn.BatchNorm2d)
        return module

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = self.relu(out)
        if self.residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        return self.relu(out)


@torch.no_grad()
def initialise(net: nn.Module, *, zero_init_last_gamma: bool = False) -> None:
    """He initialisation, normal with variance 2 / fan-out, of every convolution (He et al., Delving Deep into Rectifiers).

    The last linear layer keeps PyTorch's own uniform initialisation. zero_init_last_gamma starts every residual branch at zero
    (Goyal et al., 2017, section 5.1); it is not in the paper, so it is off unless a recipe asks for it.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_init_last_gamma:
        for module in net.modules():
            if isinstance(module, Block):
                nn.init.zeros_(module.last_bn.weight)
