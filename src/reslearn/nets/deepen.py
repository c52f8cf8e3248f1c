"""The constructed solution (DRL, introduction): deepens a trained network without changing its function.

The added layers are identities, so the deeper network computes the same outputs and can be trained from there.
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

ZERO_BRANCH_ORDERS = ("original", "relu-before-addition", "relu-only", "full")  # a residual block's branch can be zero
DIRAC_ORDERS = ("original",)  # a plain block's inputs are not negative, so ReLU keeps them


def check_family(shallow: str, deep: str, options: Mapping[str, Any] | None = None) -> None:
    """Raises UserError unless the networks differ only in the number of blocks, no stage shrinks, and a block can be added.

    options: of `create`, for both networks.
    """
    a, b = replace(spec(shallow), **(options or {})), replace(spec(deep), **(options or {}))
    if a.build is not None or b.build is not None:
        raise UserError(f"'{shallow if a.build else deep}' is not made of blocks: deepen takes residual and plain networks")
    may_differ = ("name", "blocks", "published", "source")
    if differs := [k for k in Spec.__dataclass_fields__ if k not in may_differ and getattr(a, k) != getattr(b, k)]:
        raise UserError(f"'{deep}' is not a deeper '{shallow}': it differs in {', '.join(differs)} as well")
    if a.blocks == b.blocks or any(m < n for n, m in zip(a.blocks, b.blocks, strict=True)):
        raise UserError(f"'{deep}' has blocks {b.blocks} and '{shallow}' {a.blocks}: no stage may shrink, and one must grow")
    possible = a.order in DIRAC_ORDERS if a.plain else a.merge == "residual" and a.order in ZERO_BRANCH_ORDERS
    if not possible:
        raise UserError(f"cannot deepen '{shallow}': no block can be the identity (order {a.order}, merge {a.merge})")
    if a.shortcut == "C":
        raise UserError(f"cannot deepen '{shallow}': shortcut C has projections in every block, so no block can be the identity")
    if a.last_survival != 1:
        raise UserError(f"cannot deepen '{shallow}': its stochastic depth scales each block by its position")


def places(old: int, new: int, where: Where) -> list[int]:
    """Indices of a stage's `old` blocks among its `new` ones; the first, which changes the shape, stays first."""
    if where == "append" or old == 1:
        return list(range(old))
    return [i * new // old for i in range(old)]


def deepen(shallow: ResNet, deep: ResNet, where: Where = "spread", images: Iterable[Tensor] = ()) -> None:
    """Gives `deep` the weights of `shallow` and makes the new blocks identities, in place. Both must pass check_family.

    images: normalized batches (N, C, H, W), for plain networks only: in training, their new layers are the identity only if BN
    matches the statistics of the data.
    """
    deep.load_state_dict({k: v for k, v in shallow.state_dict().items() if not k.startswith("layer")}, strict=False)
    added: list[Block] = []
    for stage in shallow.stages:
        old, new = list(shallow.get_submodule(stage).children()), list(deep.get_submodule(stage).children())
        copied = dict(zip(places(len(old), len(new), where), old, strict=True))
        for i, block in enumerate(new):
            assert isinstance(block, Block)
            if i in copied:
                block.load_state_dict(copied[i].state_dict())
            else:
                added.append(block)
    for block in added:
        zero_branch(block) if block.has_shortcut else make_dirac(block)
    if not added[0].has_shortcut:
        calibrate_identities(deep, added, images)


@torch.no_grad()
def zero_branch(block: Block) -> None:
    """Zeroes the last layer of a residual branch, so that its output is exactly 0 in training and evaluation."""
    convolution, bn = block.layers()[-1]
    last = convolution if isinstance(block, FullPreActivation) else bn
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def make_dirac(block: Block) -> None:
    """Makes the convolutions of a plain block identities; calibrate_identities does the same for BN."""
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)


@torch.no_grad()
def calibrate_identities(net: ResNet, blocks: list[Block], images: Iterable[Tensor]) -> None:
    """Makes each BN of plain Dirac blocks the identity: gamma and beta undo the normalization by the statistics of `images`.

    Every BN sees the input of its block, which is not negative, so one pass over the images measures them all.
    """
    sums: dict[Block, tuple[int, Tensor, Tensor]] = {}

    def collect(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        assert isinstance(block, Block)
        count, total, squares = sums.get(block, (0, torch.zeros(x.shape[1]), torch.zeros(x.shape[1])))
        n = x.numel() // x.shape[1]
        sums[block] = (count + n, total + x.sum((0, 2, 3)).cpu(), squares + x.square().sum((0, 2, 3)).cpu())

    for block in blocks:  # in evaluation mode, the identity for any input
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                nn.init.constant_(module.weight, (1 + module.eps) ** 0.5)
    handles = [block.register_forward_pre_hook(collect) for block in blocks]
    training, buffers = net.training, {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()  # measure the activations of training
    for block in blocks:
        block.eval()
    for batch in images:
        net(batch)
    net.train(training)
    net.load_state_dict(buffers, strict=False)
    for handle in handles:
        handle.remove()
    if not sums:
        raise UserError("deepening a plain network requires images to calibrate BN: pass a data set")
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
