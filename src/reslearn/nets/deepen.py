"""The constructed solution (DRL, introduction): a deeper network from a trained shallower one, with the same function.

Layers are added that are the identity, so the deeper net does on every image what the shallow one did, and trains on from there.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reslearn.errors import UserError
from reslearn.nets.block import Block
from reslearn.nets.options import Spec
from reslearn.nets.resnet import ResNet
from reslearn.nets.variants import FullPreActivation
from reslearn.nets.zoo import spec

Where = Literal["spread", "append"]

SILENT = ("original", "relu-before-addition", "relu-only", "full")  # orders of a residual block whose branch can be zero
DIRAC = ("original",)  # orders of a plain block that ReLU leaves as it is: its input is not negative


def check_family(shallow: str, deep: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise UserError unless the two networks differ in the number of blocks alone, no stage shrinks, and a block can be added.

    options: of `create`, which both have in common.
    """
    a, b = replace(spec(shallow), **(options or {})), replace(spec(deep), **(options or {}))
    if a.build is not None or b.build is not None:
        raise UserError(f"'{shallow if a.build else deep}' is not made of blocks: deepen takes residual and plain networks")
    named = ("name", "blocks", "published", "source")
    if differs := [k for k in Spec.__dataclass_fields__ if k not in named and getattr(a, k) != getattr(b, k)]:
        raise UserError(f"'{deep}' is not a deeper '{shallow}': it differs in {', '.join(differs)} as well")
    if a.blocks == b.blocks or any(m < n for n, m in zip(a.blocks, b.blocks, strict=True)):
        raise UserError(f"'{deep}' has blocks {b.blocks} and '{shallow}' {a.blocks}: no stage may shrink, and one must grow")
    possible = a.order in DIRAC if a.plain else a.merge == "residual" and a.order in SILENT
    if not possible:
        raise UserError(f"no block of '{shallow}' can be the identity (order {a.order}, merge {a.merge}): deepen cannot add to it")
    if a.shortcut == "C":
        raise UserError(f"the shortcuts C of '{shallow}' are projections in every block, so no block can be the identity")
    if a.last_survival != 1:
        raise UserError(f"'{shallow}' has stochastic depth, which scales each block by its place: deepen cannot add to it")


def places(old: int, new: int, where: Where) -> list[int]:
    """Where a stage's `old` blocks go among its `new` ones; the first, which changes the shape, stays first."""
    if where == "append" or old == 1:
        return list(range(old))
    return [i * new // old for i in range(old)]


def deepen(shallow: ResNet, deep: ResNet, where: Where = "spread", images: Iterable[Tensor] = ()) -> None:
    """Give `deep` the function of `shallow`, in place. Both are in the zoo's family of check_family, with the same options.

    images: normalized batches (N, C, H, W); plain networks need them, because their new layers are
    the identity in training only where BN is set to the statistics of what passes through.
    """
    deep.load_state_dict({k: v for k, v in shallow.state_dict().items() if not k.startswith("layer")}, strict=False)
    fresh: list[Block] = []
    for stage in shallow.stages:
        old, new = list(shallow.get_submodule(stage).children()), list(deep.get_submodule(stage).children())
        taken = dict(zip(places(len(old), len(new), where), old, strict=True))
        for i, block in enumerate(new):
            assert isinstance(block, Block)
            if i in taken:
                block.load_state_dict(taken[i].state_dict())
            else:
                fresh.append(block)
    for block in fresh:
        make_silent(block) if block.has_shortcut else make_dirac(block)
    if not fresh[0].has_shortcut:
        measure_identities(deep, fresh, images)


@torch.no_grad()
def make_silent(block: Block) -> None:
    """A residual block whose branch is exactly zero, in training too; its other layers keep their initialization."""
    convolution, bn = block.layers()[-1]
    last = convolution if isinstance(block, FullPreActivation) else bn
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def make_dirac(block: Block) -> None:
    """A plain block whose convolutions pass every channel on; BN follows from measure_identities."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)


@torch.no_grad()
def measure_identities(net: ResNet, blocks: list[Block], images: Iterable[Tensor]) -> None:
    """Set each BN of plain Dirac blocks to be the identity: gamma and beta undo what its own statistics do.

    All of them see the input of their block, which is not negative, so that one pass through the unchanged rest measures it.
    """
    sums: dict[Block, tuple[int, Tensor, Tensor]] = {}

    def collect(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        assert isinstance(block, Block)
        count, total, squares = sums.get(block, (0, torch.zeros(x.shape[1]), torch.zeros(x.shape[1])))
        n = x.numel() // x.shape[1]
        sums[block] = (count + n, total + x.sum((0, 2, 3)).cpu(), squares + x.square().sum((0, 2, 3)).cpu())

    for block in blocks:  # the identity in evaluation, whatever passes
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                nn.init.constant_(module.weight, (1 + module.eps) ** 0.5)
    handles = [block.register_forward_pre_hook(collect) for block in blocks]
    training, buffers = net.training, {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()  # what passes in training is what BN will have to undo there
    for block in blocks:
        block.eval()
    for batch in images:
        net(batch)
    net.train(training)
    net.load_state_dict(buffers, strict=False)
    for handle in handles:
        handle.remove()
    if not sums:
        raise UserError("a plain network is deepened with the statistics of real images: give a data set")
    for block, (count, total, squares) in sums.items():
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.copy_(mean)
                module.running_var.copy_(variance)
                module.weight.copy_((variance + module.eps).sqrt())
                module.bias.copy_(mean)
