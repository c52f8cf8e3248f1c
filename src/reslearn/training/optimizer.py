"""SGD with momentum, in PyTorch's or Caffe's form."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from reslearn.training.recipe import Optimizer as OptimizerSection


def make_optimizer(model: nn.Module, recipe: OptimizerSection, lr: float, head: Sequence[nn.Parameter] = ()) -> SGD:
    """Makes SGD over all trainable parameters. A group's lr is its `factor` times lr: 1 for the head, backbone_lr for the others.

    Momentum buffers start at zero, which equals PyTorch's first step. On a GPU the lr is a tensor, because captured steps read it.
    """
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable, "factor": 1.0}]
    if recipe.backbone_lr != 1:
        new = set(map(id, head))
        groups = [{"params": [p for p in trainable if id(p) not in new], "factor": recipe.backbone_lr}]
        groups += [{"params": [p for p in trainable if id(p) in new], "factor": 1.0}]
    if recipe.undecayed is not None:
        groups = [half for group in groups for half in _split_by_decay(group, recipe.weight_decay)]
    for group in groups:
        group["rate"] = group["factor"] * lr
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


def _split_by_decay(group: dict[str, Any], decay: float) -> list[dict[str, Any]]:
    """Splits a group into weights, which decay, and BN parameters and biases, which do not."""
    weights = [p for p in group["params"] if p.ndim > 1]
    others = [p for p in group["params"] if p.ndim <= 1]
    halves = ({**group, "params": weights, "weight_decay": decay}, {**group, "params": others, "weight_decay": 0.0})
    return [half for half in halves if half["params"]]


@torch.no_grad()
def set_lr(optimizer: Optimizer, lr: float, style: str) -> None:
    """Set the learning rate.

    Caffe's momentum buffer includes lr (v = m v + lr g), PyTorch's does not: scaling PyTorch's buffer by old / new at each change
    of lr makes the two equal.
    """
    for group in optimizer.param_groups:
        old, new = group["rate"], group["factor"] * lr
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
