"""What single blocks are worth: deleted, shuffled, several at once, in another order (Veit et al., section 4)."""

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
    """Errors in percent. single: without one block; None where a plain block changes the shape and cannot be left out.

    several: k -> errors without k random blocks of those that keep the shape (layers, in a network that has no blocks).
    orders: (Kendall's tau, error) of blocks of one shape in other orders. resizing: names of the blocks that change the shape.
    shuffled: with the weights of each convolution of one block in random order, its shortcut as it is.
    layers: without one convolution and its BN, in networks without shortcuts; None where it changes the shape.
    """

    whole: float
    single: dict[str, float | None]
    several: dict[int, list[float]]
    orders: list[tuple[float, float]]
    resizing: list[str]
    shuffled: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float | None] = field(default_factory=dict)


def lesion(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    draws: int = 3,
    seed: int = 0,
    progress: Progress = silent,
) -> Lesion:
    """The error of a network without some of its blocks, and with its blocks in other orders; the model stays as it is.

    images: (N, C, H, W), labels: (N,). Raises UserError where there is neither a block nor a layer that can be left out.
    """
    every = blocks(model) if has_blocks(model) else {}
    can = [name for name, block in every.items() if block.has_shortcut or block.keeps_shape()]
    same = [name for name, block in every.items() if block.keeps_shape()]
    layers = {} if any(block.has_shortcut for block in every.values()) else layer_cuts(model, images)
    if not can and not any(layers.values()):
        raise UserError("this network has no block and no layer that can be left out")
    cuts = {name: {name: Deleted(every[name])} for name in same} or {name: cut for name, cut in layers.items() if cut}
    sizes = sorted({round(share * len(cuts)) for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1)} - {0})
    groups = _groups(same)
    swaps = [n for n in (1, 2, 4, 8, 16, 32) if n <= 2 * len(same)] if any(len(group) > 1 for group in groups) else []
    passes = (
        1
        + len(can)
        + len(every)
        + sum(map(bool, layers.values()))
        + sum(draws if k < len(cuts) else 1 for k in sizes)
        + draws * len(swaps)
    )
    done = 0

    def measure(change: Mapping[str, nn.Module]) -> float:
        nonlocal done
        with replaced(model, change):
            found = error(model, images, labels)
        done += 1
        progress("lesion", done, passes)
        return found

    draw = random.Random(seed)
    whole = measure({})
    single = {name: measure({name: Deleted(every[name])}) if name in can else None for name in every}
    wrong = {name: measure({name: shuffled(block, seed)}) for name, block in every.items()}
    without_layer = {name: measure(cut) if cut else None for name, cut in layers.items()}
    several = {k: [measure(_joined(cuts, draw.sample(list(cuts), k))) for _ in range(draws if k < len(cuts) else 1)] for k in sizes}
    orders = []
    for count in swaps:
        for _ in range(draws):
            order = _swapped(groups, count, draw)
            tau = kendall_tau(list(order), list(order.values()))
            orders.append((tau, measure({name: every[other] for name, other in order.items()})))
    resizing = [name for name in every if name not in same]
    return Lesion(whole, single, several, orders, resizing, wrong, without_layer)


def layer_cuts(model: nn.Module, images: Tensor) -> dict[str, dict[str, nn.Module]]:
    """What to put in whose place so that one layer is left out: a convolution larger than 1x1, and its BN.

    Empty for a layer that changes the shape. The ReLU behind stays: the layer's input has been through one already.
    images: (N, C, H, W), for a look at which BN belongs to which convolution.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    for name, bn in convolutions(model, images[:2]).items():
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        if conv.kernel_size == (1, 1):
            continue
        padding = tuple((size - 1) // 2 for size in conv.kernel_size)
        keeps = conv.in_channels == conv.out_channels and conv.stride == (1, 1) and conv.padding == padding
        found[name] = {each: nn.Identity() for each in (name, bn) if each} if keeps else {}
    return found


def shuffled(block: Block, seed: int) -> Block:
    """A block with the weights of each convolution of its branch in random order; BN and shortcut as they are."""
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
