"""How a block's branch F and its shortcut x become one: the kinds of IM Table 1, and stochastic depth.

`residual` is F + x. The others show, in that paper, what happens when the shortcut is not kept clean. A `plain` block has no
shortcut, so there is nothing to merge.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reslearn.nets.shortcuts import conv

Merge = Literal["residual", "plain", "constant", "exclusive-gate", "shortcut-gate", "dropout"]
GATED = ("exclusive-gate", "shortcut-gate")


class Merging(nn.Module):
    """Merge of branch F and shortcut x, both (N, C, H, W). g is a convolution of x with a sigmoid.

    constant: scale[0] x + scale[1] F. exclusive-gate: (1 - g) x + g F, also Highway's. shortcut-gate: (1 - g) x + F.
    dropout: F + x with half of x dropped.
    """

    def __init__(
        self, kind: Merge, channels: int, *, scale: tuple[float, float] = (0.5, 0.5), gate_bias: float = -6.0, gate_kernel: int = 1
    ) -> None:
        super().__init__()
        self.kind, self.scale, self.gate_bias = kind, scale, gate_bias
        self.gate = conv(channels, channels, gate_kernel, bias=True) if kind in GATED else None

    def forward(self, branch: Tensor, x: Tensor) -> Tensor:
        if self.kind == "residual":
            return branch + x
        if self.kind == "constant":
            return self.scale[0] * x + self.scale[1] * branch
        if self.kind == "dropout":
            return branch + F.dropout(x, 0.5, self.training)
        assert self.gate is not None
        gate = torch.sigmoid(self.gate(x))
        return (1 - gate) * x + (gate * branch if self.kind == "exclusive-gate" else branch)


class StochasticDepth(nn.Module):
    """A branch that is there with probability `survival` in training, and scaled by it in evaluation (SD, equations 2 and 5).

    per_sample: one gate for each image instead of one for the mini-batch as published.
    """

    def __init__(self, survival: float, per_sample: bool = False) -> None:
        super().__init__()
        self.survival, self.per_sample = survival, per_sample

    def forward(self, branch: Callable[[Tensor], Tensor], x: Tensor, like: Tensor) -> Tensor:
        """branch(x), gated. like: what zero looks like where a dropped branch is not computed at all."""
        if not self.training:
            return self.survival * branch(x)
        if self.per_sample:
            gates = torch.rand(len(x), 1, 1, 1, device=x.device) < self.survival
            return gates * branch(x)
        return branch(x) if torch.rand(()).item() < self.survival else torch.zeros_like(like)

    def extra_repr(self) -> str:
        return f"survival={self.survival:g}"
