"""SGD with momentum, of PyTorch's kind or Caffe's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from reslearn.training.recipe import Optimizer as OptimizerSection


def make_optimizer(model: nn.Module, recipe: OptimizerSection, lr: float, head: Sequence[nn.Parameter] = ()) -> SGD:
    """SGD over every parameter that is not frozen; a group's lr is its `share` of the step's: 1 for the head's parameters,
    backbone_lr for the others.

    Momentum buffers start as zeros, which is what PyTorch's first step does too. On a GPU the lr is a tensor, so that a captured
    step reads the present one.
    """
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable, "share": 1.0}]
    if recipe.backbone_lr != 1:
        new = set(map(id, head))
        groups = [{"params": [p for p in trainable if id(p) not in new], "share": recipe.backbone_lr}]
        groups += [{"params": [p for p in trainable if id(p) in new], "share": 1.0}]
    if recipe.undecayed is not None:
        groups = [part for group in groups for part in _by_decay(group, recipe.weight_decay)]
    for group in groups:
        group["rate"] = group["share"] * lr
        group["lr"] = torch.tensor(group["rate"], device=device) if device.type == "cuda" else group["rate"]
    optimizer = SGD(
        groups,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=device.type in ("cpu", "cuda"),
    )
    for parameter in trainable if recipe.momentum else []:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _by_decay(group: dict[str, Any], decay: float) -> list[dict[str, Any]]:
    """A group as two: weights, which decay, and gammas, betas and biases, which do not."""
    weights = [p for p in group["params"] if p.ndim > 1]
    others = [p for p in group["params"] if p.ndim <= 1]
    parts = ({**group, "params": weights, "weight_decay": decay}, {**group, "params": others, "weight_decay": 0.0})
    return [part for part in parts if part["params"]]


@torch.no_grad()
def set_lr(optimizer: Optimizer, lr: float, style: str) -> None:
    """Give the optimizer the step's learning rate.

    PyTorch's momentum buffer does not contain lr, Caffe's does (v = m v + lr g): scaling PyTorch's by old / new at a change makes
    the two the same.
    """
    for group in optimizer.param_groups:
        old, new = group["rate"], group["share"] * lr
        if new == old:
            continue
        if style == "caffe":
            for parameter in group["params"]:
                if (buffer := optimizer.state[parameter].get("momentum_buffer")) is not None:
                    buffer.mul_(old / new)
        group["rate"] = new
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(new)
        else:
            group["lr"] = new
