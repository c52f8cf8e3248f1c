"""The shortcut of a block: identity, zero-padded identity or projection (DRL 3.3)."""

from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.nets.options import Shortcut


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A "same"-padded convolution, by default without bias because batch normalization follows."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=bias)


class ZeroPadShortcut(nn.Module):
    """Option A: subsamples the input and pads the added channels with zeros. No parameters.

    The paper does not say how to subsample or where the zero channels go, and public implementations differ. Weights trained
    with one convention give wrong outputs with another. Plain "A" takes every second pixel and appends the zeros; `average`
    averages 2x2 pixels instead; `centered` puts half of the zeros on each side.
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
    """Returns the shortcut module of a block, or None for the identity.

    kind: "A" and its variants: zero-padded identity; "B": projection where the shape changes; "C": projection in every block.
    normalize: whether BN follows the projection; pre-activation blocks have none there (IM, appendix).
    """
    changes = stride != 1 or in_channels != out_channels
    if kind == "C" or (kind == "B" and changes):
        projection = conv(in_channels, out_channels, 1, stride)
        return nn.Sequential(projection, nn.BatchNorm2d(out_channels)) if normalize else nn.Sequential(projection)
    if not changes:
        return None
    return ZeroPadShortcut(out_channels - in_channels, stride, average="average" in kind, centered="centered" in kind)
