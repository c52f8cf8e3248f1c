"""One training step, the same for every device and precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from reslearn.training import ranks
from reslearn.training.recipe import Loss
from reslearn.training.recipe import Optimizer as OptimizerRecipe

Criterion = Callable[[Tensor, Tensor], Tensor]


class NonFinite(ArithmeticError):
    """The loss or its gradient is not finite; the weights have not been touched. step: which (from 0), where not the present."""

    def __init__(self, why: str, step: int | None = None) -> None:
        super().__init__(why)
        self.step = step


class Outcome(NamedTuple):
    """0-dim tensors on the device. loss: mean over the batch, as trained; wrong: images whose top-1 is wrong; grad_norm: 2-norm."""

    loss: Tensor
    wrong: Tensor
    grad_norm: Tensor


def make_criterion(loss: Loss, counts: Tensor) -> Criterion:
    """Mean cross-entropy of (N, K) logits against int64 (N,) labels. counts: training images of each class, (K,)."""
    weight = None
    if loss.class_weights == "auto":
        present = counts.clamp(min=1).float()
        weight = counts.sum() / (len(counts) * present)
    return lambda logits, labels: F.cross_entropy(logits, labels, weight=weight, label_smoothing=loss.label_smoothing)


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe, lr: float) -> SGD:
    """SGD over every parameter that is not frozen; a group's lr is its `share` of the step's (backbone_lr, or 1: the last layer).

    Velocities start as zeros, which is what PyTorch's first step does too. On a GPU the lr is a tensor, so that a captured step
    reads the present one.
    """
    device = next(model.parameters()).device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable, "share": 1.0}]
    if recipe.backbone_lr != 1:
        groups = [{"params": trainable[:-2], "share": recipe.backbone_lr}, {"params": trainable[-2:], "share": 1.0}]
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

    PyTorch's velocity does not contain lr, Caffe's does (v = m v + lr g): scaling PyTorch's by old / new at a change makes
    the two the same.
    """
    for group in optimizer.param_groups:
        old, new = group["rate"], group["share"] * lr
        if new == old:
            continue
        if style == "caffe":
            for parameter in group["params"]:
                if (velocity := optimizer.state[parameter].get("momentum_buffer")) is not None:
                    velocity.mul_(old / new)
        group["rate"] = new
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(new)
        else:
            group["lr"] = new


def gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    criterion: Criterion,
    optimizer: Optimizer,
    autocast: AbstractContextManager[Any],
    micro: int | None = None,
) -> Outcome:
    """Forward and backward. images: (N, C, H, W) float32; labels: int64 (N,); micro: images at once. The weights stay."""
    optimizer.zero_grad(set_to_none=True)
    loss, wrong = torch.zeros((), device=images.device), torch.zeros((), dtype=torch.int64, device=images.device)
    xs, ys = images.split(micro or len(images)), labels.split(micro or len(images))
    for i, (x, y) in enumerate(zip(xs, ys, strict=True), start=1):
        with ranks.accumulating(model, last=i == len(xs)):
            with autocast:
                logits = model(x.contiguous(memory_format=torch.channels_last))
            part = criterion(logits.float(), y) * (len(x) / len(images))
            part.backward()
        loss += part.detach()
        wrong += (logits.argmax(1) != y).sum()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    return Outcome(loss, wrong, grad_norm)


def train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    criterion: Criterion,
    optimizer: Optimizer,
    autocast: AbstractContextManager[Any],
    micro: int | None = None,
) -> Outcome:
    """gradients, then the update. The outcome is that of all ranks' images. Raises NonFinite before the weights change."""
    outcome = gradients(model, images, labels, criterion, optimizer, autocast, micro)
    if ranks.count() > 1:
        loss, wrong = ranks.total(torch.stack([outcome.loss.double(), outcome.wrong.double()]))
        outcome = Outcome(loss / ranks.count(), wrong.long(), outcome.grad_norm)
    if not torch.isfinite(outcome.loss + outcome.grad_norm):
        loss, norm = outcome.loss.item(), outcome.grad_norm.item()
        raise NonFinite(f"the loss is {loss:g} and the norm of its gradient {norm:g}")
    optimizer.step()
    return outcome
