"""The learning-rate schedule."""

from itertools import pairwise

import pytest

from reslearn.training.recipe import Schedule
from reslearn.training.schedule import lr


def test_the_papers_cifar_schedule() -> None:
    schedule = Schedule(steps=64_000, lr=0.1, drops=(32_000, 48_000))
    at = {step: lr(schedule, step, 64_000) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)}
    assert at == pytest.approx({0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001})


def test_the_warm_up_lr_holds_until_the_error_has_fallen() -> None:
    schedule = Schedule(steps=64_000, lr=0.1, drops=(32_000,), warmup_lr=0.01)
    assert lr(schedule, 5_000, 64_000, None) == 0.01, "as long as the error is high"
    assert lr(schedule, 399, 64_000, 400) == 0.01
    assert lr(schedule, 400, 64_000, 400) == 0.1
    assert lr(schedule, 32_000, 64_000, 400) == pytest.approx(0.01), "drops count from the start"


def test_one_cycle_rises_and_falls_linearly() -> None:
    schedule = Schedule(steps=100, lr=1.0, shape="one-cycle", warmup=0.2)
    rates = [lr(schedule, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == rates[19] == rates[20] == 1.0
    differences = [b - a for a, b in pairwise(rates[20:])]
    assert differences == pytest.approx([-1 / 80] * 79)
    assert rates[-1] == pytest.approx(1 / 80)


def test_cosine_and_warmup_in_steps() -> None:
    schedule = Schedule(steps=1000, lr=2.0, shape="cosine", warmup=10)
    assert [lr(schedule, s, 1000) for s in (0, 9)] == pytest.approx([0.2, 2.0])
    assert lr(schedule, 505, 1000) == pytest.approx(1.0)
    assert lr(schedule, 999, 1000) < 1e-4


def test_lr_scales_with_the_batch_and_drops_may_be_fractions() -> None:
    schedule = Schedule(epochs=90, lr=0.1, lr_batch=256, drops=(1 / 3, 2 / 3))
    rates = [lr(schedule, step, 900, batch=512) for step in (0, 299, 300, 599, 600, 899)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    assert lr(schedule, 0, 900, batch=32) == pytest.approx(0.0125)


def test_a_plateau_divides_by_ten() -> None:
    schedule = Schedule(steps=100, lr=0.1, shape="plateau", warmup=10)
    rates = [lr(schedule, step, 100, dropped=dropped) for step, dropped in ((4, 0), (10, 0), (99, 0), (50, 1), (50, 2))]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.01, 0.001])


def test_epochs_become_steps() -> None:
    assert Schedule(epochs=2).total(images=1000, batch=128) == 16
    assert Schedule(epochs=0.001).total(images=10, batch=128) == 1
    assert Schedule(steps=7).total(images=1000, batch=128) == 7
