"""The losses of the first stage, on sampled anchors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou

from reslearn.localize.net import CODER

EXAMPLES = 8
"""Anchors sampled per image, at most half of them positive (DRL appendix C)."""


def match(anchors: Tensor, boxes: Tensor, iou: tuple[float, float]) -> Tensor:
    """Assigns anchors (P, 4) to boxes (M, 4): int64 (P,), the index of the box, -1 for negative, -2 for ignored.

    An anchor is positive from an IoU of iou[1], or if it is a box's best anchor; negative below iou[0] (Faster R-CNN, 3.1.2).
    """
    return Matcher(iou[1], iou[0], allow_low_quality_matches=True)(box_iou(boxes, anchors))


def losses(
    logits: Tensor, deltas: Tensor, anchors: Tensor, boxes: Sequence[Tensor], labels: Tensor, iou: tuple[float, float]
) -> dict[str, Tensor]:
    """The two losses of a batch, 0-dim, to be summed. Anchors are sampled by torch's generator.

    logits (N, P, K), deltas (N, P, K, 4), anchors (P, 4): the localizer's outputs. boxes: N tensors (M, 4), all of the image's
    class. labels: int64 (N,), from 0. "scores": binary cross-entropy summed over the K classes; the target is 1 only for the
    image's class at positive anchors. "boxes": smooth L1 (beta 1/9, as torchvision's RPN) of the class's deltas at positive
    anchors. Both are means over the sampled anchors.
    """
    matched = [match(anchors, own, iou) for own in boxes]
    sampler = BalancedPositiveNegativeSampler(EXAMPLES, 0.5)
    sampled = sampler([torch.where(m >= 0, 1, torch.where(m == -1, 0, -1)) for m in matched])
    total = sum(int(p.sum() + n.sum()) for p, n in zip(*sampled, strict=True))
    score_loss, box_loss = logits.new_zeros(()), logits.new_zeros(())
    for i, (positive, negative) in enumerate(zip(*sampled, strict=True)):
        k, own = int(labels[i]), positive.bool()
        used, target = (positive | negative).bool(), torch.zeros_like(logits[i])
        target[own, k] = 1
        score_loss = score_loss + F.binary_cross_entropy_with_logits(logits[i][used], target[used], reduction="sum")
        box_target = CODER.encode_single(boxes[i][matched[i][own]], anchors[own])
        box_loss = box_loss + F.smooth_l1_loss(deltas[i, own, k], box_target, beta=1 / 9, reduction="sum")
    return {"scores": score_loss / total, "boxes": box_loss / total}
