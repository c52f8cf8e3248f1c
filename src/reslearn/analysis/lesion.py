"""Lesion studies: blocks removed, shuffled and reordered (Veit et al., section 4)."""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reslearn.analysis.parts import Deleted, blocks, convolutions, has_blocks, replaced
from reslearn.analysis.subject import error
from reslearn.errors import UserError
from reslearn.nets.block import Block
from reslearn.progress import Progress, silent


@dataclass(frozen=True)
class Lesion:
    """Errors in percent. whole: of the intact network.

    single: without one block; None for a plain block that cannot be removed because it changes the shape.
    several: k -> errors without k random shape-keeping blocks (layers, in a network without blocks).
    orders: (Kendall's tau, error) with blocks of the same shape reordered. resizing: names of the blocks that change the shape.
    shuffled: with the weights of each convolution in one block's branch shuffled.
    layers: without one convolution and its BN, in networks without shortcuts; None if it changes the shape.
    """

    whole: float
    single: dict[str, float | None]
    several: dict[int, list[float]]
    orders: list[tuple[float, float]]
    resizing: list[str]
    shuffled: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float | None] = field(default_factory=dict)


def lesion(
    model: nn.Module, images: Tensor, labels: Tensor, *, draws: int = 3, seed: int = 0, progress: Progress = silent
) -> Lesion:
    """The error of a network without some of its blocks, and with reordered blocks. Leaves the model unchanged.

    images: (N, C, H, W), labels: (N,). draws: random choices of each kind. Raises UserError if no block or layer can be removed.
    """
    named = blocks(model) if has_blocks(model) else {}
    removable = [name for name, block in named.items() if block.has_shortcut or block.keeps_shape()]
    same = [name for name, block in named.items() if block.keeps_shape()]
    layers = {} if any(block.has_shortcut for block in named.values()) else layer_cuts(model, images)
    if not removable and not any(layers.values()):
        raise UserError("this network has no block or layer that can be removed")
    cuts = {name: {name: Deleted(named[name])} for name in same} or {name: cut for name, cut in layers.items() if cut}
    sizes = sorted({round(share * len(cuts)) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)} - {0})
    groups = _groups(same)
    swaps = [n for n in (1, 2, 4, 8, 16, 32) if n <= 2 * len(same)] if any(len(group) > 1 for group in groups) else []
    passes = (
        1
        + len(removable)
        + len(named)
        + sum(map(bool, layers.values()))
        + sum(draws if k < len(cuts) else 1 for k in sizes)
        + draws * len(swaps)
    )
    done = 0

    def measure(change: Mapping[str, nn.Module]) -> float:
        nonlocal done
        with replaced(model, change):
            percent = error(model, images, labels)
        done += 1
        progress("lesion", done, passes)
        return percent

    rng = random.Random(seed)
    whole = measure({})
    single = {name: measure({name: Deleted(named[name])}) if name in removable else None for name in named}
    with_shuffled = {name: measure({name: shuffled(block, seed)}) for name, block in named.items()}
    without_layer = {name: measure(cut) if cut else None for name, cut in layers.items()}
    several = {k: [measure(_joined(cuts, rng.sample(list(cuts), k))) for _ in range(draws if k < len(cuts) else 1)] for k in sizes}
    orders = []
    for count in swaps:
        for _ in range(draws):
            order = _swapped(groups, count, rng)
            tau = kendall_tau(list(order), list(order.values()))
            orders.append((tau, measure({name: named[other] for name, other in order.items()})))
    resizing = [name for name in named if name not in same]
    return Lesion(whole, single, several, orders, resizing, with_shuffled, without_layer)


def layer_cuts(model: nn.Module, images: Tensor) -> dict[str, dict[str, nn.Module]]:
    """For each layer (a convolution larger than 1x1), the replacements {module name: identity} that remove it and its BN.

    Empty for a layer that changes the shape. The ReLU after it stays: the layer's input has already passed one.
    images: (N, C, H, W), to pair each convolution with its BN.
    """
    cuts: dict[str, dict[str, nn.Module]] = {}
    for name, bn in convolutions(model, images[:2]).items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        if conv.kernel_size == (1, 1):
            continue
        padding = tuple((size - 1) // 2 for size in conv.kernel_size)
        keeps = conv.in_channels == conv.out_channels and conv.stride == (1, 1) and conv.padding == padding
        cuts[name] = {module: nn.Identity() for module in (name, bn) if module} if keeps else {}
    return cuts


def shuffled(block: Block, seed: int) -> Block:
    """A copy of a block with the weights of each convolution in its branch shuffled; BN and shortcut are unchanged."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(block)
    for convolution, _ in other.layers():
        weight = convolution.weight.detach()
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        convolution.weight = nn.Parameter(weight.flatten()[order].view_as(weight))
    return other


def _joined(cuts: Mapping[str, Mapping[str, nn.Module]], names: Sequence[str]) -> dict[str, nn.Module]:
    return {place: module for name in names for place, module in cuts[name].items()}


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Names by stage: interchangeable blocks of the same shape."""
    by_stage: dict[str, list[str]] = {}
    for name in names:
        by_stage.setdefault(name.rpartition(".")[0], []).append(name)
    return list(by_stage.values())


def _swapped(groups: Sequence[Sequence[str]], count: int, rng: random.Random) -> dict[str, str]:
    """Position -> the block there after `count` swaps, each of two random blocks of the same stage."""
    order = {name: name for group in groups for name in group}
    swappable = [group for group in groups if len(group) > 1]
    for _ in range(count):
        a, b = rng.sample(rng.choices(swappable, [len(group) for group in swappable])[0], 2)
        order[a], order[b] = order[b], order[a]
    return order


def kendall_tau(names: Sequence[str], order: Sequence[str]) -> float:
    """Kendall's rank correlation of an order with the original: 1 for the same order, -1 for the reverse."""
    place = {name: i for i, name in enumerate(names)}
    ranks = [place[name] for name in order]
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i)]
    return sum(1 if ranks[i] > ranks[j] else -1 for i, j in pairs) / len(pairs) if pairs else 1.0
