"""The region proposal network, and the heads that pool each region and predict its class, box and mask."""

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
    """Keeps torchvision's RoIAlign kernel under best-effort determinism (warn_only), which runs on a GPU use.

    Otherwise torchvision uses a compiled Python version, whose backward pass sorts every sample of every region and channel
    (hundreds of millions per step) and which, for masks, holds an image for every pooled pixel. The kernel's backward pass adds
    in arbitrary order: detection steps on a GPU are repeatable up to rounding. On a CPU there is no difference.
    """
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=True)


class Pool(nn.Module):
    """Pools regions of one map by max pooling (Fast R-CNN) or RoIAlign (Mask R-CNN, aligned=True): boxes in image pixels ->
    (R, C, side, side)."""

    def __init__(self, method: Literal["align", "pool"], side: int, stride: int) -> None:
        super().__init__()
        self.method, self.side, self.stride = method, side, stride

    def forward(self, features: Features, boxes: list[Tensor], shapes: list[Shape]) -> Tensor:
        if self.method == "pool":
            maps = features["0"]  # may be bf16; roi_pool needs maps and boxes of the same dtype
            return roi_pool(maps.to(boxes[0].dtype), boxes, self.side, 1 / self.stride).to(maps.dtype)
        return roi_align(features["0"], boxes, self.side, 1 / self.stride, sampling_ratio=2, aligned=True)

    def extra_repr(self) -> str:
        return f"{self.method}, side={self.side}, stride={self.stride}"


def pyramid_pool(side: int, strides: tuple[int, ...]) -> MultiScaleRoIAlign:
    """torchvision's pooling from a pyramid, with fixed strides instead of ones inferred from the first images."""
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], side, 2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    return pool


class Anchors(AnchorGenerator):
    """torchvision's AnchorGenerator in at least float32: bf16 anchors would be up to 5 px off at 600 x 1000."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)


class Proposals(RPNHead):
    """torchvision's RPNHead with float32 outputs in any precision: bf16 cannot represent single pixels above 256."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [level.float() for level in objectness], [level.float() for level in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's RegionProposalNetwork; can also compute losses or proposals alone, for alternating training.

    inside: ignore anchors that cross the image border in training (Faster R-CNN, section 3.3); an object's best anchor is then the
    best one inside. Images without an inside anchor do not contribute.
    """

    def __init__(self, generator: AnchorGenerator, head: nn.Module, *, inside: bool, **settings: Any) -> None:
        super().__init__(generator, head, **settings)
        self.inside = inside

    def forward(
        self, images: ImageList, features: Features, targets: list[dict[str, Any]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return super().forward(images, features, targets and _sized(images, targets))

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
        """For each image, labels (A,), 1 for object, 0 for background, -1 for ignored, and the boxes (A, 4) of the objects.

        targets: must have the `size` of the image, (height, width).
        """
        if not self.inside:
            return super().assign_targets_to_anchors(anchors, targets)
        labels, boxes = [], []
        for image_anchors, target in zip(anchors, targets, strict=True):
            height, width = target["size"]
            used = (image_anchors[:, :2] >= 0).all(1) & (image_anchors[:, 2] <= width) & (image_anchors[:, 3] <= height)
            labels.append(torch.full((len(image_anchors),), -1.0, device=image_anchors.device))
            boxes.append(image_anchors.to(torch.float32, copy=True))
            if used.any():
                (labels[-1][used],), (boxes[-1][used],) = super().assign_targets_to_anchors([image_anchors[used]], [target])
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """torchvision's losses; 0 instead of NaN if every anchor is ignored."""
        if self.inside and not any((image_labels >= 0).any() for image_labels in labels):
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
        """Boxes (R, 4) for each image, best first; their number depends on the training mode."""
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        counts = [level[0].numel() for level in objectness]  # anchors per map
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        anchors = self.anchor_generator(images, maps)
        boxes = self.box_coder.decode(deltas, anchors).view(len(anchors), -1, 4)
        return self.filter_proposals(boxes, objectness, images.image_sizes, counts)[0]


def _sized(images: ImageList, targets: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    return [{**target, "size": size} for target, size in zip(targets, images.image_sizes, strict=True)]


class Heads(RoIHeads):
    """torchvision's RoIHeads with global context, a mask head that shares the last stage with the boxes, and separate steps for the
    test-time improvements. Losses are torchvision's, as are targets except for background.

    background: lowest IoU with an object for a background example; Fast R-CNN's 0.1 (section 2.3) is "a heuristic for hard example
    mining". In an image without objects, every region is a background example.
    """

    def __init__(
        self, pool: nn.Module, head: nn.Module, predictor: nn.Module, *, context: bool, background: float, **settings: Any
    ) -> None:
        super().__init__(pool, head, predictor, **settings)
        self.context, self.background = context, background

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each image, the object (R,) of each region, and its label (R,): the class, 0 for background, -1 for ignored."""
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        for boxes, objects, image_labels in zip(proposals, gt_boxes, labels, strict=True):
            if self.background and len(objects):
                image_labels[box_iou(objects, boxes).amax(0) < self.background] = -1
        return matched, labels

    def regions(self, features: Features, boxes: list[Tensor], shapes: list[Shape]) -> tuple[Tensor, Tensor | None]:
        """Features (R, D) of all boxes (R in total), and the maps (R, C, H, W) before average pooling (None without a last stage).

        With context, the features of the whole image are appended to those of each region (DRL appendix B).
        """
        if self.context:
            whole = [own.new_tensor([[0, 0, width, height]]) for own, (height, width) in zip(boxes, shapes, strict=True)]
            boxes = [torch.cat(pair) for pair in zip(boxes, whole, strict=True)]
        with own_pooling():
            pooled, maps = self.box_roi_pool(features, boxes, shapes), None
        if isinstance(self.box_head, LastStage):
            maps = self.box_head.maps(pooled)
            rows = self.box_head.flat(maps)
        else:
            rows = self.box_head(pooled)
        if self.context:
            counts = [len(own) for own in boxes]
            rows = torch.cat([torch.cat([own[:-1], own[-1:].expand(len(own) - 1, -1)], 1) for own in rows.split(counts)])
            if maps is not None:
                maps = torch.cat([own[:-1] for own in maps.split(counts)])
        return rows, maps

    def predict(self, rows: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Features (R, D) of boxes (R, 4) -> probabilities (R, K + 1), background first, and boxes (R, K + 1, 4)."""
        logits, deltas = (output.float() for output in self.box_predictor(rows))
        return F.softmax(logits, -1), self.box_coder.decode(deltas, [boxes])

    def mask_logits(self, features: Features, boxes: list[Tensor], shapes: list[Shape]) -> Tensor:
        """Mask logits (R, K + 1, 28, 28), or 14 x 14 on a shared last stage."""
        with own_pooling():
            pooled = (self.mask_roi_pool or self.box_roi_pool)(features, boxes, shapes)
        head = self.mask_head or self.box_head.maps
        return self.mask_predictor(head(pooled)).float()  # type: ignore[operator]

    def masks(self, features: Features, detections: list[dict[str, Tensor]], shapes: list[Shape]) -> list[Tensor]:
        """Mask probabilities (R, 1, M, M) of each image's detections, for their predicted class."""
        logits = self.mask_logits(features, [image["boxes"] for image in detections], shapes)
        return maskrcnn_inference(logits, [image["labels"] for image in detections])

    def has_mask(self) -> bool:
        """Whether there is a mask head. On a shared last stage, it consists of the predictor only."""
        return self.mask_predictor is not None

    def forward(
        self, features: Features, proposals: list[Tensor], image_shapes: list[Shape], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        rows, _ = self.regions(features, proposals, image_shapes)
        scores, boxes = self.predict(rows, torch.cat(proposals))
        counts = [len(own) for own in proposals]
        by_image = zip(scores.split(counts), boxes.split(counts), image_shapes, strict=True)
        detections = [self.select(*image) for image in by_image]
        if self.has_mask():
            for image, mask in zip(detections, self.masks(features, detections, image_shapes), strict=True):
                image["masks"] = mask
        return detections, {}

    def losses(
        self, features: Features, proposals: list[Tensor], shapes: list[Shape], targets: list[dict[str, Tensor]] | None
    ) -> dict[str, Tensor]:
        """loss_classifier and loss_box_reg on sampled regions; with masks, also loss_mask on those with an object."""
        proposals, matched, labels, regression = self.select_training_samples(proposals, targets)
        rows, maps = self.regions(features, proposals, shapes)
        logits, deltas = (output.float() for output in self.box_predictor(rows))
        classifier, box = fastrcnn_loss(logits, deltas, labels, regression)
        losses = {"loss_classifier": classifier, "loss_box_reg": box}
        if self.has_mask():
            assert targets is not None
            positive = [image_labels > 0 for image_labels in labels]
            boxes, objects = ([own[chosen] for own, chosen in zip(all_, positive, strict=True)] for all_ in (proposals, matched))
            if self.mask_head is None and maps is not None:  # the last stage has already run on these regions
                logits = self.mask_predictor(maps[torch.cat(positive)]).float()  # type: ignore[operator]
            else:
                logits = self.mask_logits(features, boxes, shapes)
            masks, classes = ([target[key] for target in targets] for key in ("masks", "labels"))
            with own_pooling():  # target masks are pooled to the head's output size
                losses["loss_mask"] = maskrcnn_loss(logits, boxes, masks, classes, objects)
        return losses

    def select(self, scores: Tensor, boxes: Tensor, shape: Shape, *, vote: bool = False) -> dict[str, Tensor]:
        """One image's detections: per-class NMS of scores (R, K + 1) and boxes (R, K + 1, 4), keeping the best `detections`.

        vote: apply box_voting. Returns boxes (n, 4), labels (n,) from 1, scores (n,), best first.
        """
        boxes = clip_boxes_to_image(boxes, shape)[:, 1:].reshape(-1, 4)
        labels = torch.arange(1, scores.shape[1], device=scores.device).expand(len(scores), -1).reshape(-1)
        scores = scores[:, 1:].reshape(-1)
        candidates = torch.where(scores > self.score_thresh)[0]
        candidates = candidates[remove_small_boxes(boxes[candidates], 1e-2)]
        boxes, scores, labels = boxes[candidates], scores[candidates], labels[candidates]
        kept = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        final = box_voting(kept, boxes, scores, labels) if vote else boxes[kept]
        return {"boxes": final, "labels": labels[kept], "scores": scores[kept]}


def box_voting(kept: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float = 0.5) -> Tensor:
    """Replaces each kept box by the score-weighted mean of all boxes of its class with IoU >= overlap (Gidaris and Komodakis, 2015,
    section 5). kept (n,) indexes boxes (m, 4), scores (m,) and labels (m,). Returns (n, 4).
    """
    votes = (box_iou(boxes[kept], boxes) >= overlap) & (labels[kept][:, None] == labels)
    weights = votes * scores
    return weights @ boxes / weights.sum(1, keepdim=True)
