"""The learning rate as a pure function of (recipe, step)."""

import math

from reslearn.training.recipe import Schedule


def warmup_steps(schedule: Schedule, total: int) -> int:
    """Length of the linear warm-up in steps."""
    return round(schedule.warmup * total) if schedule.warmup < 1 else round(schedule.warmup)


def lr(schedule: Schedule, step: int, total: int, warmup_ended: int | None = None, *, batch: int = 1, dropped: int = 0) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    batch: images per step, used with `lr_batch`. dropped: number of times that shape "plateau" has divided lr by 10.
    warmup_ended: step at which the measured training error fell below `warmup_until`; before it, lr is `warmup_lr` if that is
    set (DRL 4.2: ResNet-110). Drops count from the start of the run, including the warm-up.
    "one-cycle" rises and falls linearly (Smith and Topin, 2017). "cosine" is one period of Loshchilov and Hutter, 2017.
    """
    if schedule.warmup_lr is not None and (warmup_ended is None or step < warmup_ended):
        return schedule.warmup_lr
    top = schedule.lr * batch / schedule.lr_batch if schedule.lr_batch else schedule.lr
    rise = warmup_steps(schedule, total)
    if step < rise:
        return top * (step + 1) / rise
    done = (step - rise) / max(total - rise, 1)  # in [0, 1)
    if schedule.shape == "one-cycle":
        return top * (1 - done)
    if schedule.shape == "cosine":
        return top * (1 + math.cos(math.pi * done)) / 2
    if schedule.shape == "plateau":
        return top * 0.1**dropped
    return top * 0.1 ** sum(step >= (drop if drop >= 1 else round(drop * total)) for drop in schedule.drops)
