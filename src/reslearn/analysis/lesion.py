"""What single blocks are worth: deleted, several at once, in another order (Veit et al., section 4)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from reslearn.analysis.parts import Deleted, blocks, keeps_shape, replaced
from reslearn.analysis.subject import error


@dataclass(frozen=True)
class Lesion:
    """Errors in percent. single: without one block; None where a plain block changes the shape and cannot be left out.

    several: k -> errors without k random blocks. orders: (Kendall's tau, error) of blocks of one shape in other orders.
    resizing: names of the blocks that change the shape.
    """

    whole: float
    single: dict[str, float | None]
    several: dict[int, list[float]]
    orders: list[tuple[float, float]]
    resizing: list[str]


def lesion(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    draws: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Lesion:
    """The error of a network without some of its blocks, and with its blocks in other orders; the model stays as it is."""
    every = blocks(model)
    can = [name for name, block in every.items() if block.merge is not None or keeps_shape(block)]
    same = [name for name, block in every.items() if keeps_shape(block)]
    sizes = sorted({round(share * len(same)) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)} - {0}) if same else []
    groups = _groups(model, same)
    swaps = [n for n in (1, 2, 4, 8, 16, 32) if n <= 2 * len(same)] if any(len(group) > 1 for group in groups) else []
    total, done = 1 + len(can) + draws * (len(sizes) + len(swaps)), 0

    def measure() -> float:
        nonlocal done
        done += 1
        progress(done, total)
        return error(model, images, labels)

    def without(names: Sequence[str]) -> float:
        with replaced(model, {name: Deleted(every[name]) for name in names}):
            return measure()

    draw = random.Random(seed)
    whole = measure()
    single = {name: without([name]) if name in can else None for name in every}
    several = {k: [without(draw.sample(same, k)) for _ in range(draws)] for k in sizes}
    orders = []
    for count in swaps:
        for _ in range(draws):
            order = _swapped(groups, count, draw)
            with replaced(model, {name: every[other] for name, other in order.items()}):
                orders.append((kendall_tau(list(order), list(order.values())), measure()))
    return Lesion(whole, single, several, orders, [name for name in every if name not in same])


def _groups(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Names by stage: blocks of one shape, which can take each other's places."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return list(found.values())


def _swapped(groups: Sequence[Sequence[str]], count: int, draw: random.Random) -> dict[str, str]:
    """place -> which block stands there after `count` swaps of two random blocks of one stage."""
    order = {name: name for group in groups for name in group}
    able = [group for group in groups if len(group) > 1]
    for _ in range(count):
        a, b = draw.sample(draw.choices(able, [len(group) for group in able])[0], 2)
        order[a], order[b] = order[b], order[a]
    return order


def kendall_tau(names: Sequence[str], order: Sequence[str]) -> float:
    """Kendall's rank correlation of an order with the original one: 1 where it is the same, -1 where it is turned round."""
    place = {name: i for i, name in enumerate(names)}
    ranks = [place[name] for name in order]
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i)]
    return sum(1 if ranks[i] > ranks[j] else -1 for i, j in pairs) / len(pairs) if pairs else 1.0
