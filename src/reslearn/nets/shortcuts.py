"""The shortcut of a block: identity, zero-padded identity or projection (DRL 3.3)."""

from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.nets.options import Shortcut


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution padded so that stride 1 keeps the size; without bias, for batch normalization comes with it."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)


class ZeroPadShortcut(nn.Module):
    """Option A: the identity where the size halves and the channels grow. No parameters.

    The paper does not say how to halve or where the zero channels go, and public codes differ; weights of one convention give
    wrong outputs in another. Plain "A" takes every second pixel and appends the zeros; "average" averages 2x2 pixels instead;
    "centered" puts half of the zeros on each side.
    """

    def __init__(self, added_channels: int, stride: int, *, average: bool = False, centered: bool = False) -> None:
        super().__init__()
        self.stride, self.average = stride, average
        before = added_channels // 2 if centered else 0
        self.padding = (0, 0, 0, 0, before, added_channels - before)

    def forward(self, x: Tensor) -> Tensor:
        if self.average and self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        else:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, self.padding)  # (N, C, H, W) -> (N, C + added, H / stride, W / stride)


def make_shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int, *, normalize: bool = True) -> nn.Module | None:
    """The shortcut of a block; None where it is the identity.

    A...: zero-padded identity. B: projection where the shape changes. C: projection in every block. normalize: with BN
    behind the projection; pre-activation blocks have none there (IM, appendix).
    """
    changes = stride != 1 or in_channels != out_channels
    if kind == "C" or (kind == "B" and changes):
        projection = conv(in_channels, out_channels, 1, stride)
        return nn.Sequential(projection, nn.BatchNorm2d(out_channels)) if normalize else nn.Sequential(projection)
    if not changes:
        return None
    return ZeroPadShortcut(out_channels - in_channels, stride, average="average" in kind, centered="centered" in kind)
