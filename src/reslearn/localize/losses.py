"""The losses of the first stage: which anchors are examples, and the loss on them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.ops import box_iou

from reslearn.localize.net import CODER

EXAMPLES = 8
"""Anchors of each image that are learned from, at most half of them positive (DRL appendix C)."""


def match(anchors: Tensor, boxes: Tensor, iou: tuple[float, float]) -> Tensor:
    """What each anchor (P, 4) is an example of, int64 (P,): the box (M, 4) it overlaps most, -1 for none, -2: it is not used.

    An anchor is of a box from iou[1] on, and where no other overlaps that box more; of none below iou[0] (Faster R-CNN, 3.1.2).
    """
    return Matcher(iou[1], iou[0], allow_low_quality_matches=True)(box_iou(boxes, anchors))


def losses(
    logits: Tensor, deltas: Tensor, anchors: Tensor, boxes: Sequence[Tensor], labels: Tensor, iou: tuple[float, float]
) -> dict[str, Tensor]:
    """The two losses of a batch, 0-dim; what is minimized is their sum. Which anchors are drawn is torch's generator's.

    logits (N, P, K), deltas (N, P, K, 4), anchors (P, 4): the localizer's. boxes: N times (M, 4), all of the image's class;
    labels: int64 (N,) from 0. "scores": binary cross-entropy, summed over the K classes: a positive anchor is one of its class
    and of no other, a negative one of none. "boxes": smooth L1 (beta 1/9, as torchvision's RPN) of the class's own deltas at the
    positive anchors. Both are means over the anchors drawn.
    """
    matched = [match(anchors, each, iou) for each in boxes]
    drawn = BalancedPositiveNegativeSampler(EXAMPLES, 0.5)([torch.where(m >= 0, 1, torch.where(m == -1, 0, -1)) for m in matched])
    total = sum(int(p.sum() + n.sum()) for p, n in zip(*drawn, strict=True))
    of_scores, of_boxes = logits.new_zeros(()), logits.new_zeros(())
    for i, (positive, negative) in enumerate(zip(*drawn, strict=True)):
        k = int(labels[i])
        those, target = (positive | negative).bool(), torch.zeros_like(logits[i])
        target[positive.bool(), k] = 1
        of_scores = of_scores + F.binary_cross_entropy_with_logits(logits[i][those], target[those], reduction="sum")
        own = positive.bool()
        wanted = CODER.encode_single(boxes[i][matched[i][own]], anchors[own])
        of_boxes = of_boxes + F.smooth_l1_loss(deltas[i, own, k], wanted, beta=1 / 9, reduction="sum")
    return {"scores": of_scores / total, "boxes": of_boxes / total}
