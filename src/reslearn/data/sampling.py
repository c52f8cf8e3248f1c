"""Random numbers as pure functions of (seed, epoch, index), independent of resuming, workers and ranks.

Uses a counter-based generator (the finalizer of SplitMix64: Steele, Lea and Flood, 2014) in integer arithmetic only, so that all
devices give the same numbers.
"""

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value


GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 0xFFFFFFFFFFFFFFFF


def _shift(x: int | Tensor, bits: int) -> int | Tensor:
    """64-bit logical right shift."""
    return x >> bits if isinstance(x, int) else (x >> bits) & ((1 << (64 - bits)) - 1)


def _times(x: int | Tensor, factor: int) -> int | Tensor:
    return x * factor & WORD if isinstance(x, int) else x * _signed(factor)


def _mix(x: int | Tensor) -> int | Tensor:
    x = _times(x ^ _shift(x, 30), MIX1)
    x = _times(x ^ _shift(x, 27), MIX2)
    return x ^ _shift(x, 31)


def _key(*counters: int | Tensor) -> int | Tensor:
    """Hashes several counters to a 64-bit int or, if the last ones are int64 tensors, to an int64 tensor of their shape.

    ints are hashed in Python, so that nothing has to be copied to a device.
    """
    key: int | Tensor = 0
    for counter in counters:
        added = _times(counter & WORD if isinstance(counter, int) else counter, GOLDEN)
        if isinstance(added, int):
            assert isinstance(key, int), "ints must come before tensors"
            key = _mix((key + added + MIX1) & WORD)
        else:
            key = _mix(added + (_signed(key + MIX1) if isinstance(key, int) else key + _signed(MIX1)))
    return key


def uniform(seed: int, epoch: Tensor, index: Tensor, stream: int) -> Tensor:
    """Uniform random numbers in [0, 1), float32 (N,), multiples of 2^-24, for each (epoch, index), int64 (N,)."""
    key = _key(seed, stream, epoch, index)
    assert isinstance(key, Tensor)
    return (key >> 40 & 0xFFFFFF).float() * 2.0**-24


def integer(seed: int, *counters: int) -> int:
    """A pseudorandom integer in [0, 2^63), for seeding a generator."""
    return int(_shift(_key(seed, *counters), 1))


def view_seed(seed: int) -> int:
    """The seed of a run's augmentation."""
    return integer(seed, 0xA06)


def checksum(start: int, epochs: Tensor, indices: Tensor) -> int:
    """A checksum in [0, 2^32) of images start, start + 1, ... of the training stream. Checksums of parts add up modulo 2^32."""
    key = _key(torch.arange(start, start + len(indices)), epochs, indices)
    return int((torch.as_tensor(key) & 0xFFFFFFFF).sum()) & 0xFFFFFFFF


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order in which an epoch visits n images: int64 (n,)."""
    generator = torch.Generator().manual_seed(integer(seed, 0x0EDE, epoch))
    return torch.randperm(n, generator=generator)


class SampleOrder:
    """The infinite stream of training images, split into batches of equal size.

    Every epoch contains every image once. Batches may straddle epochs, so none is short. Batch `step` is a pure function of
    (seed, step).
    """

    def __init__(self, seed: int, images: int, batch: int) -> None:
        self.seed, self.images, self.batch = seed, images, batch
        self._orders: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(self.seed, epoch, self.images)
            # Keeps two epochs for batches that straddle them.
            recent = {k: v for k, v in self._orders.copy().items() if epoch - k < 2}
            self._orders = {**recent, epoch: order}
        return order

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """(epochs, indices) of batch `step` (from 0), both int64 (batch,)."""
        position = torch.arange(step * self.batch, (step + 1) * self.batch)
        epochs = position // self.images
        parts = [self._epoch(int(e))[position[epochs == e] % self.images] for e in epochs.unique()]
        return epochs, torch.cat(parts)
