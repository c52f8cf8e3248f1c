"""Random draws as pure functions of (seed, epoch, index): resume, workers and ranks cannot change what an image gets.

The draws are integers of a counter-based generator (the finaliser of SplitMix64: Steele, Lea and Flood, 2014), computed with
integer arithmetic alone, so that every device gives the same ones.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


GOLDEN, MIX1, MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX1
    x = (x ^ _shift(x, 27)) * MIX2
    return x ^ _shift(x, 31)


def _key(*counters: int | Tensor) -> Tensor:
    """One hash of several counters, int64, broadcast over those that are tensors."""
    key = torch.tensor(0)
    for counter in counters:
        value = torch.tensor(_signed(counter)) if isinstance(counter, int) else counter
        key = _mix(key.to(value.device) + value * GOLDEN + MIX1) if value.ndim else _mix(key + value * GOLDEN + MIX1)
    return key


def uniform(seed: int, epoch: Tensor, index: Tensor, draw: int) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24, one for each pair of (epoch, index), int64 (N,); draw tells uses apart."""
    return _shift(_key(seed, draw, epoch, index), 40).float() * 2.0**-24


def integer(seed: int, *counters: int) -> int:
    """One integer in [0, 2^63), for seeding a generator."""
    return int(_shift(_key(seed, *counters), 1))


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which an epoch visits n images: int64 (n,)."""
    generator = torch.Generator().manual_seed(integer(seed, 0x0EDE, epoch))
    return torch.randperm(n, generator=generator)


class Order:
    """The endless stream of training images, epoch after epoch, cut into batches of one size.

    A batch may straddle two epochs, so every image is seen once an epoch and no batch is ever short; batch `step` is a pure
    function of (seed, step).
    """

    def __init__(self, seed: int, images: int, batch: int) -> None:
        self.seed, self.images, self.batch = seed, images, batch
        self._known: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        known = self._known.get(epoch)
        if known is None:
            known = permutation(self.seed, epoch, self.images)
            # Two epochs are enough for a batch that straddles them; a tiny set may need more at once.
            recent = {k: v for k, v in self._known.copy().items() if epoch - k < 2}
            self._known = {**recent, epoch: known}
        return known

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """(epochs, indices) of batch `step` (from 0), both int64 (batch,)."""
        position = torch.arange(step * self.batch, (step + 1) * self.batch)
        epochs = position // self.images
        parts = [self._epoch(int(e))[position[epochs == e] % self.images] for e in epochs.unique()]
        return epochs, torch.cat(parts)
