"""Random numbers are pure functions; every epoch contains every image once."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reslearn.data.sampling import SampleOrder, integer, permutation, uniform


def reference(counters: list[int]) -> int:
    """The same hash in Python integers."""
    mask, golden = (1 << 64) - 1, 0x9E3779B97F4A7C15
    m1, m2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
    key = 0
    for counter in counters:
        x = (key + counter * golden + m1) & mask
        x = ((x ^ (x >> 30)) * m1) & mask
        x = ((x ^ (x >> 27)) * m2) & mask
        key = x ^ (x >> 31)
    return key


@given(st.integers(0, 2**31 - 1), st.integers(0, 10**6), st.integers(0, 2**40), st.integers(0, 10))
@settings(max_examples=50, deadline=None)
def test_uniform_is_the_reference_hash(seed: int, epoch: int, index: int, stream: int) -> None:
    value = uniform(seed, torch.tensor([epoch]), torch.tensor([index]), stream).item()
    assert value == (reference([seed, stream, epoch, index]) >> 40) * 2.0**-24
    assert integer(seed, stream, epoch) == reference([seed, stream, epoch]) >> 1


def test_numbers_do_not_depend_on_the_batch() -> None:
    epochs, indices = torch.arange(100) // 30, torch.arange(100)
    together = uniform(7, epochs, indices, 1)
    alone = torch.cat([uniform(7, epochs[i : i + 1], indices[i : i + 1], 1) for i in range(100)])
    assert torch.equal(together, alone)


def test_uniform_is_uniform_and_streams_are_independent() -> None:
    n = 200_000
    draws = [uniform(3, torch.zeros(n, dtype=torch.int64), torch.arange(n), k).double().numpy() for k in range(3)]
    for u in draws:
        counts = np.histogram(u, 64, (0, 1))[0]
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)  # chi-square
    assert abs(np.corrcoef(draws)[np.triu_indices(3, 1)]).max() < 0.01
    assert abs(np.corrcoef(draws[0][1:], draws[0][:-1])[0, 1]) < 0.01


@given(st.integers(2, 40), st.integers(1, 60), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_every_epoch_contains_every_image_once(images: int, batch: int, seed: int) -> None:
    order, steps = SampleOrder(seed, images, batch), -(-3 * images // batch)
    batches = [order[step] for step in range(steps)]
    assert all(len(indices) == batch for _, indices in batches)
    epochs, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for epoch in range(3):
        assert sorted(indices[epochs == epoch].tolist()) == list(range(images))
    again = SampleOrder(seed, images, batch)
    assert torch.equal(again[steps - 1][1], batches[-1][1]), "batches can be computed in any order"


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [tuple(permutation(seed, epoch, 50).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
