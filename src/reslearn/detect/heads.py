"""Regions are proposed; what happens to each: pooled, described by the net's layers, judged (class, box, mask)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou, clip_boxes_to_image, remove_small_boxes, roi_align, roi_pool
from torchvision.ops.poolers import LevelMapper

from reslearn.detect.backbone import LastStage

Features = dict[str, Tensor]
Shape = tuple[int, int]


@contextmanager
def own_pooling() -> Iterator[None]:
    """RoIAlign stays torchvision's kernel where determinism is asked for as far as it goes (warn_only), as runs on a GPU do.

    torchvision would take a version in Python instead, compiled on the spot, whose backward pass sorts every sample of every
    region and channel (hundreds of millions a step) and which, for masks, holds an image for every pooled pixel. The kernel's
    backward pass adds in no fixed order: a detector's steps on a GPU are repeatable up to rounding. On a CPU nothing differs.
    """
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=True)


class Pool(nn.Module):
    """Regions of one map, by max pooling (Fast R-CNN) or RoIAlign (Mask R-CNN): boxes in image pixels -> (R, C, side, side).

    The scale is the net's own stride. RoIAlign takes a pixel's center at one half, as its later editions do.
    """

    def __init__(self, how: Literal["align", "pool"], side: int, stride: int) -> None:
        super().__init__()
        self.how, self.side, self.stride = how, side, stride

    def forward(self, features: Features, boxes: list[Tensor], shapes: list[Shape]) -> Tensor:
        if self.how == "pool":
            maps = features["0"]  # in bf16, of which roi_pool takes no boxes, where that is trained in
            return roi_pool(maps.to(boxes[0].dtype), boxes, self.side, 1 / self.stride).to(maps.dtype)
        return roi_align(features["0"], boxes, self.side, 1 / self.stride, sampling_ratio=2, aligned=True)

    def extra_repr(self) -> str:
        return f"{self.how}, side={self.side}, stride={self.stride}"


def pyramid_pool(side: int, strides: tuple[int, ...]) -> MultiScaleRoIAlign:
    """torchvision's pooling from a pyramid, told its strides, which it would otherwise guess from the first images it sees."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], side, 2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    return pool


class Anchors(AnchorGenerator):
    """torchvision's, in float32 at least: in bf16, which it would take from the maps, they are up to 5 px off at 600 x 1000."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class Proposals(RPNHead):
    """torchvision's, whose numbers are float32 whatever the convolutions compute in: bf16 has no pixels above 256."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [each.float() for each in objectness], [each.float() for each in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, that can also learn without proposing, and propose without learning, as training in turns needs it.

    inside: whether anchors that cross their image's border are left alone in training (Faster R-CNN, section 3.3), so that the best
    anchor of an object is the best of those inside. An image in which none lies then teaches nothing.
    """

    def __init__(self, generator: AnchorGenerator, head: nn.Module, *, inside: bool, **settings: Any) -> None:
        super().__init__(generator, head, **settings)
        self.inside = inside

    def forward(
        self, images: ImageList, features: Features, targets: list[dict[str, Any]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return super().forward(images, features, targets and _sized(images, targets))

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (A,) of each image, 1 for an object, 0 for none, -1 for neither, and the boxes (A, 4) of the objects.

        targets: with the `size` of each image, height and width.
        """
        if not self.inside:
            return super().assign_targets_to_anchors(anchors, targets)
        labels, boxes = [], []
        for own, target in zip(anchors, targets, strict=True):
            height, width = target["size"]
            used = (own[:, :2] >= 0).all(1) & (own[:, 2] <= width) & (own[:, 3] <= height)
            labels.append(torch.full((len(own),), -1.0, device=own.device))
            boxes.append(own.to(torch.float32, copy=True))
            if used.any():
                (labels[-1][used],), (boxes[-1][used],) = super().assign_targets_to_anchors([own[used]], [target])
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As torchvision's, and 0 where there is no anchor to learn from, whose mean would be no number."""
        if self.inside and not any((own >= 0).any() for own in labels):
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)

    def losses(self, images: ImageList, features: Features, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """loss_objectness and loss_rpn_box_reg."""
        maps = list(features.values())
        objectness, deltas = concat_box_prediction_layers(*self.head(maps))
        anchors = self.anchor_generator(images, maps)
        labels, matched = self.assign_targets_to_anchors(anchors, _sized(images, targets))
        object_loss, box_loss = self.compute_loss(objectness, deltas, labels, self.box_coder.encode(matched, anchors))
        return {"loss_objectness": object_loss, "loss_rpn_box_reg": box_loss}

    @torch.no_grad()
    def propose(self, images: ImageList, features: Features) -> list[Tensor]:
        """Boxes (R, 4) of each image, best first; in training mode as many as training takes."""
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        counts = [each[0].numel() for each in objectness]  # anchors of each map
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        anchors = self.anchor_generator(images, maps)
        boxes = self.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
        return self.filter_proposals(boxes, objectness, images.image_sizes, counts)[0]


def _sized(images: ImageList, targets: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    return [{**target, "size": size} for target, size in zip(targets, images.image_sizes, strict=True)]


class Heads(RoIHeads):
    """torchvision's, with global context, a mask head that shares the last stage with the boxes, and its steps callable one by
    one, as the improvements at test time need them. Losses are torchvision's, and so are targets, but for background.

    background: the IoU with some object from which on a region is an example of background; 0.1 of Fast R-CNN (section 2.3) is
    "a heuristic for hard example mining". Of an image without objects, all regions are.
    """

    def __init__(
        self, pool: nn.Module, head: nn.Module, predictor: nn.Module, *, context: bool, background: float, **settings: Any
    ) -> None:
        super().__init__(pool, head, predictor, **settings)
        self.context, self.background = context, background

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The object (R,) of each image's regions, and their labels (R,): of a class, 0 for background, -1 for neither."""
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for boxes, objects, own in zip(proposals, gt_boxes, labels, strict=True):
            if self.background and len(objects):
                own[box_iou(objects, boxes).amax(0) < self.background] = -1
        return matched, labels

    def regions(self, features: Features, boxes: list[Tensor], shapes: list[Shape]) -> tuple[Tensor, Tensor | None]:
        """Features (R, D) of every box (R together), and the maps (R, C, H, W) they are averages of where the net has such.

        With context, the whole image is one more region, whose features stand beside each other one's (DRL appendix B).
        """
        counts = [len(each) for each in boxes]
        if self.context:
            whole = [each.new_tensor([[0, 0, width, height]]) for each, (height, width) in zip(boxes, shapes, strict=True)]
            boxes = [torch.cat(pair) for pair in zip(boxes, whole, strict=True)]
        with own_pooling():
            pooled, maps = self.box_roi_pool(features, boxes, shapes), None
        if isinstance(self.box_head, LastStage):
            maps = self.box_head.maps(pooled)
            found = self.box_head.flat(maps)
        else:
            found = self.box_head(pooled)
        if self.context:
            each = found.split([count + 1 for count in counts])
            found = torch.cat([torch.cat([own[:-1], own[-1:].expand(len(own) - 1, -1)], 1) for own in each])
            if maps is not None:
                maps = torch.cat([own[:-1] for own in maps.split([count + 1 for count in counts])])
        return found, maps

    def judge(self, found: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R, D) and their boxes (R, 4) -> probabilities (R, K + 1), column 0 is background, and boxes (R, K + 1, 4)."""
        logits, deltas = (each.float() for each in self.box_predictor(found))
        return F.softmax(logits, -1), self.box_coder.decode(deltas, [boxes])

    def mask_logits(self, features: Features, boxes: list[Tensor], shapes: list[Shape]) -> Tensor:
        """(R, K + 1, 28, 28), or 14 x 14 on a shared last stage."""
        with own_pooling():
            pooled = (self.mask_roi_pool or self.box_roi_pool)(features, boxes, shapes)
        head = self.mask_head or self.box_head.maps
        return self.mask_predictor(head(pooled)).float()  # type: ignore[operator]

    def masks(self, features: Features, found: list[dict[str, Tensor]], shapes: list[Shape]) -> list[Tensor]:
        """Probabilities (R, 1, M, M) of each image's detections, of their own class."""
        logits = self.mask_logits(features, [each["boxes"] for each in found], shapes)
        return maskrcnn_inference(logits, [each["labels"] for each in found])

    def has_mask(self) -> bool:
        """Whether there is a mask head: one on a shared last stage has no layers but its predictor."""
        return self.mask_predictor is not None

    def forward(
        self, features: Features, proposals: list[Tensor], image_shapes: list[Shape], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        found, _ = self.regions(features, proposals, image_shapes)
        scores, boxes = self.judge(found, torch.cat(proposals))
        counts = [len(each) for each in proposals]
        result = [
            self.select(s, b, shape) for s, b, shape in zip(scores.split(counts), boxes.split(counts), image_shapes, strict=True)
        ]
        if self.has_mask():
            for each, mask in zip(result, self.masks(features, result, image_shapes), strict=True):
                each["masks"] = mask
        return result, {}

    def losses(
        self, features: Features, proposals: list[Tensor], shapes: list[Shape], targets: list[dict[str, Tensor]] | None
    ) -> dict[str, Tensor]:
        """Of a sample of the regions: loss_classifier, loss_box_reg and, with masks, loss_mask (of regions with an object)."""
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        found, maps = self.regions(features, proposals, shapes)
        logits, deltas = (each.float() for each in self.box_predictor(found))
        classifier, box = fastrcnn_loss(logits, deltas, labels, regression)
        losses = {"loss_classifier": classifier, "loss_box_reg": box}
        if self.has_mask():
            assert targets is not None
            positive = [each > 0 for each in labels]
            boxes, which = ([own[chosen] for own, chosen in zip(all_, positive, strict=True)] for all_ in (proposals, matched))
            if self.mask_head is None and maps is not None:  # they have been through the last stage already
                logits = self.mask_predictor(maps[torch.cat(positive)]).float()  # type: ignore[operator]
            else:
                logits = self.mask_logits(features, boxes, shapes)
            masks, classes = ([target[key] for target in targets] for key in ("masks", "labels"))
            with own_pooling():  # the masks are pooled to what the head gives
                losses["loss_mask"] = maskrcnn_loss(logits, boxes, masks, classes, which)
        return losses

    def select(self, scores: Tensor, boxes: Tensor, shape: Shape, *, vote: bool = False) -> dict[str, Tensor]:
        """One image's detections: class by class NMS of (R, K + 1) scores and (R, K + 1, 4) boxes, the best `detections` kept.

        vote: see box_voting. Returns boxes (n, 4), labels (n,) from 1, scores (n,), best first.
        """
        boxes = clip_boxes_to_image(boxes, shape)[:, 1:].reshape(-1, 4)
        labels = torch.arange(1, scores.shape[1], device=scores.device).expand(len(scores), -1).reshape(-1)
        scores = scores[:, 1:].reshape(-1)
        there = torch.where(scores > self.score_thresh)[0]
        there = there[remove_small_boxes(boxes[there], 1e-2)]
        boxes, scores, labels = boxes[there], scores[there], labels[there]
        kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        final = box_voting(kept, boxes, scores, labels) if vote else boxes[kept]
        return {"boxes": final, "labels": labels[kept], "scores": scores[kept]}


def box_voting(kept: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float = 0.5) -> Tensor:
    """Each kept box as the mean, weighted by score, of all boxes of its class that overlap it with an IoU of 0.5 or more
    (Gidaris and Komodakis, 2015, section 5). kept (n,) indexes boxes (m, 4), scores (m,) and labels (m,). Returns (n, 4).
    """
    votes = (box_iou(boxes[kept], boxes) >= overlap) & (labels[kept][:, None] == labels)
    weights = votes * scores
    return weights @ boxes / weights.sum(1, keepdim=True)
