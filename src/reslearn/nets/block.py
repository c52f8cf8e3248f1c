"""The building blocks of the paper (DRL Figures 2, 3 and 5). Modules are named as in torchvision, so its weights load unchanged."""

from torch import Tensor, nn

from reslearn.nets.options import Shortcut, StrideIn
from reslearn.nets.shortcuts import conv, make_shortcut

NO_BN = nn.Identity()


class Block(nn.Module):
    """Base class of all blocks: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).

    A subclass defines `branch`, the F of equation 1. The analyses also call `before`, `join` and `after`: with y = before(x),
    block(x) equals after(join(branch(y), shortcut(y))). A subclass that overrides one of them overrides `forward` as well.
    """

    relu: nn.Module
    downsample: nn.Module | None  # a projection or zero-pad shortcut (torchvision's name); None: identity
    has_shortcut = True
    adds = True  # whether branch and shortcut are summed, rather than gated or scaled

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.changes_shape = stride != 1 or in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))  # F(x) + x: DRL equations 1 and 2, Figure 2

    def before(self, x: Tensor) -> Tensor:
        """Computes the common input of branch and shortcut; here the block's input itself."""
        return x

    def branch(self, x: Tensor) -> Tensor:
        """The residual function F."""
        raise NotImplementedError

    def shortcut(self, x: Tensor) -> Tensor:
        """The input, projected or padded to the shape of the output (DRL 3.3)."""
        return x if self.downsample is None else self.downsample(x)

    def join(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut

    def after(self, x: Tensor) -> Tensor:
        """Computes the output from the sum; here ReLU, in place."""
        return self.relu(x)

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """The convolutions of the branch, each with its BN (nn.Identity if it has none)."""
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}", NO_BN)) for i in (1, 2, 3) if hasattr(self, f"conv{i}")]

    def keeps_shape(self) -> bool:
        """Whether input and output have the same shape and no projection is on the shortcut."""
        return not self.changes_shape and self.downsample is None


class BasicBlock(Block):
    """Two 3x3 convolutions (DRL Figure 5, left)."""

    def __init__(self, in_channels: int, width: int, stride: int = 1, *, shortcut: Shortcut | None = "B") -> None:
        super().__init__(in_channels, width, stride)
        self.conv1 = conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(shortcut, in_channels, width, stride) if shortcut else None

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, the last with 4 * width output channels (DRL Figure 5, right).

    stride_in: the convolution with the stride: the first 1x1 (the paper) or the 3x3 (torchvision, known as v1.5).
    """

    def __init__(
        self, in_channels: int, width: int, stride: int = 1, *, shortcut: Shortcut = "B", stride_in: StrideIn = "1x1"
    ) -> None:
        super().__init__(in_channels, 4 * width, stride)
        self.conv1 = conv(in_channels, width, 1, stride if stride_in == "1x1" else 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride if stride_in == "3x3" else 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, 4 * width, 1)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(shortcut, in_channels, 4 * width, stride)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class PlainBlock(BasicBlock):
    """A BasicBlock without a shortcut (DRL Figure 3, middle)."""

    has_shortcut = adds = False

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__(in_channels, width, stride, shortcut=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x))
