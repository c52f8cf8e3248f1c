"""The paper's improvements at test time: box refinement and voting, multi-scale testing, ensembles (DRL appendix B and C)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from reslearn.detect.detector import Detector
from reslearn.detect.heads import Features, Shape
from reslearn.errors import UserError

PAPER_SCALES = (200, 400, 600, 800, 1000)  # shorter sides in px (DRL appendix B)
PAPER_SIDE = 600  # px: the shorter side that detectors were trained with
SIDES = (16, 4096)  # px: the least and the largest shorter side, of settings.min_size too
REGION = 224  # px of 600: a region is pooled where it comes nearest to this size, of another detector's side in proportion


@dataclass(frozen=True)
class ScaledView:
    """One image at one size: its feature maps, that size and the image's own, (height, width)."""

    images: ImageList
    features: Features
    shape: Shape
    original: Shape

    def boxes(self, boxes: Tensor, *, back: bool = False) -> Tensor:
        """Boxes (R, 4) of the original image in this view's pixels, or back."""
        (height, width), (h, w) = self.original, self.shape
        factor = boxes.new_tensor([w / width, h / height] * 2)
        return boxes / factor if back else boxes * factor

    @property
    def scale(self) -> float:
        """This view's pixels for one of the original's."""
        return math.sqrt(self.shape[0] * self.shape[1] / (self.original[0] * self.original[1]))


def look(model: Detector, image: Tensor, side: int | None = None) -> ScaledView:
    """An image (C, H, W) through the shared layers, with its shorter side at `side` px, or the detector's own min_size."""
    s = model.settings
    own = model.transform
    side = side or s.min_size
    assert isinstance(own, GeneralizedRCNNTransform)
    transform = GeneralizedRCNNTransform(side, round(side * s.max_size / s.min_size), own.image_mean, own.image_std).eval()
    images, _ = transform([image])
    return ScaledView(images, model.backbone(images.tensors), images.image_sizes[0], (image.shape[-2], image.shape[-1]))


def propose(model: Detector, view: ScaledView) -> Tensor:
    """The detector's proposals (R, 4) in the original image's pixels."""
    return view.boxes(model.rpn(view.images, view.features)[0][0], back=True)


def adjacent(scales: Sequence[float], boxes: Tensor, region: float = REGION) -> Tensor:
    """For each box (R, 4) the index i (R,) of the two adjacent scales i, i + 1 that bring it nearest to region x region px.

    scales: of the views, ascending, in their pixels for one of the original's, at least two.
    """
    wide, high = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3).unbind(1)
    ideal = region / (wide * high).sqrt()
    return (torch.bucketize(ideal, boxes.new_tensor(scales)) - 1).clamp(0, len(scales) - 2)


def describe(model: Detector, views: Sequence[ScaledView], boxes: Tensor) -> Tensor:
    """Features (R, D) of boxes (R, 4): of one view, or for each box the maximum over two adjacent ones (maxout)."""

    def at(view: ScaledView, chosen: Tensor) -> Tensor:
        return model.roi_heads.regions(view.features, [view.boxes(boxes[chosen])], [view.shape])[0]

    everything = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    if len(views) == 1:
        return at(views[0], everything)
    lower = adjacent([view.scale for view in views], boxes, REGION * model.settings.min_size / PAPER_SIDE)
    found: Tensor | None = None
    for i, view in enumerate(views):
        chosen = (lower == i) | (lower == i - 1)
        if not chosen.any():
            continue
        own = at(view, chosen)
        found = own.new_full((len(boxes), own.shape[1]), -torch.inf) if found is None else found
        found[chosen] = torch.maximum(found[chosen], own)
    return boxes.new_zeros(0, 1) if found is None else found


def judge(models: Sequence[Detector], views: Sequence[Sequence[ScaledView]], boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (R, K + 1) and boxes (R, K + 1, 4), averaged over the models, of proposals (R, 4); all in the original's pixels."""
    each = [m.roi_heads.judge(describe(m, own, boxes), boxes) for m, own in zip(models, views, strict=True)]
    scores, refined = (torch.stack(list(parts)).mean(0) for parts in zip(*each, strict=True))
    return scores, refined


def refine(
    models: Sequence[Detector], views: Sequence[Sequence[ScaledView]], scores: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """Judge once more where each proposal's box went, of its best class, and pool the new with the old: (2R, ...)."""
    best = scores[:, 1:].argmax(1) + 1
    height, width = views[0][0].original
    moved = boxes[torch.arange(len(boxes), device=boxes.device), best]
    limit = moved.new_tensor([width, height] * 2)
    moved = torch.minimum(moved.clamp(min=0), limit)
    again = judge(models, views, moved)
    return torch.cat([scores, again[0]]), torch.cat([boxes, again[1]])


@torch.no_grad()
def detect(
    models: Detector | Sequence[Detector], images: list[Tensor], *, refinement: bool = False, scales: Sequence[int] = ()
) -> list[dict[str, Tensor]]:
    """Detections in images, float (C, H, W) on [0, 1], as a Detector gives them, with the paper's improvements.

    models: several are an ensemble: each proposes, the proposals are united, each judges all of them, and the scores, boxes and
    masks are averaged; NMS and thresholds are the first one's. refinement: each region is judged a second time where its box
    went; old and new are united, and after NMS each box is voted on by those of its class that overlap it. scales: two or more
    shorter sides of 16 to 4096 px (the paper: 200 to 1000, of a min_size of 600): each region is described at the two adjacent
    ones at which it comes nearest to 224 px (of 600: in proportion), and the features are merged by maxout; proposals and masks
    come from the detector's own min_size. Global context is a part of the detector, not of the test.

    Raises UserError for models that do not go together, are in training mode, or scales that are not ascending or out of range.
    """
    models = [models] if isinstance(models, Detector) else list(models)
    _check(models, scales)
    if len(models) == 1 and not refinement and not scales:
        return models[0](images)
    return [_detect(models, image, refinement, scales) for image in images]


def _check(models: list[Detector], scales: Sequence[int]) -> None:
    if not models:
        raise UserError("detect needs at least one model")
    for other in models:
        if other.classes != models[0].classes:
            raise UserError(f"an ensemble's detectors know the same classes: {models[0].classes} and {other.classes} differ")
        if other.roi_heads.has_mask() != models[0].roi_heads.has_mask():
            raise UserError("an ensemble's detectors all have masks, or none has")
        if other.training:
            raise UserError("detect is for detectors in evaluation: call model.eval() first")
    if scales and (len(scales) < 2 or list(scales) != sorted(set(scales))):
        raise UserError(f"scales={tuple(scales)}: must be two or more shorter sides in px, ascending")
    low, high = SIDES
    if wrong := [side for side in scales if not low <= side <= high]:
        raise UserError(f"scales={tuple(scales)}: {wrong[0]} is no shorter side of {low} to {high} px")


def _detect(models: list[Detector], image: Tensor, refinement: bool, scales: Sequence[int]) -> dict[str, Tensor]:
    own = [look(model, image) for model in models]
    views = [[look(model, image, side) for side in scales] if scales else [view] for model, view in zip(models, own, strict=True)]
    proposals = torch.cat([propose(model, view) for model, view in zip(models, own, strict=True)])
    scores, boxes = judge(models, views, proposals)
    if refinement:
        scores, boxes = refine(models, views, scores, boxes)
    size = own[0].original
    found = models[0].roi_heads.select(scores, boxes, size, vote=refinement)
    if models[0].roi_heads.has_mask():
        each = []
        for model, view in zip(models, own, strict=True):
            here = {"boxes": view.boxes(found["boxes"]), "labels": found["labels"]}
            each.append(model.roi_heads.masks(view.features, [here], [view.shape])[0])
        if len({mask.shape for mask in each}) > 1:  # 14 px on a shared last stage, 28 px on a pyramid
            side = max(mask.shape[-1] for mask in each)
            each = [torch.nn.functional.interpolate(mask, size=(side, side), mode="bilinear") for mask in each]
        found["masks"] = paste_masks_in_image(torch.stack(each).mean(0), found["boxes"], size)
    return found
