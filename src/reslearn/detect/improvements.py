"""The paper's test-time improvements: box refinement and voting, multi-scale testing, ensembles (DRL appendices B and C)."""

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
PAPER_SIDE = 600  # px: the shorter side in the paper's training
SIDES = (16, 4096)  # px: range of the shorter side, as for settings.min_size
REGION = 224  # px at PAPER_SIDE, scaled with min_size: a region is pooled at the scales where it is closest to this size


@dataclass(frozen=True)
class ScaledView:
    """One image at one scale: feature maps, scaled shape and original shape, (height, width)."""

    images: ImageList
    features: Features
    shape: Shape
    original: Shape

    def boxes(self, boxes: Tensor, *, back: bool = False) -> Tensor:
        """Converts boxes (R, 4) from the original image's pixels to this view's, or back."""
        (height, width), (h, w) = self.original, self.shape
        factor = boxes.new_tensor([w / width, h / height] * 2)
        return boxes / factor if back else boxes * factor

    @property
    def scale(self) -> float:
        """Pixels of this view per pixel of the original."""
        return math.sqrt(self.shape[0] * self.shape[1] / (self.original[0] * self.original[1]))


def scaled_view(model: Detector, image: Tensor, side: int | None = None) -> ScaledView:
    """Runs the shared layers on an image (C, H, W) with its shorter side scaled to `side` px, by default min_size."""
    s, own = model.settings, model.transform
    side = side or s.min_size
    assert isinstance(own, GeneralizedRCNNTransform)
    transform = GeneralizedRCNNTransform(side, round(side * s.max_size / s.min_size), own.image_mean, own.image_std).eval()
    images, _ = transform([image])
    return ScaledView(images, model.backbone(images.tensors), images.image_sizes[0], (image.shape[-2], image.shape[-1]))


def propose(model: Detector, view: ScaledView) -> Tensor:
    """The detector's proposals (R, 4) in the original image's pixels."""
    return view.boxes(model.rpn(view.images, view.features)[0][0], back=True)


def adjacent(scales: Sequence[float], boxes: Tensor, region: float = REGION) -> Tensor:
    """For each box (R, 4), the index i (R,) of the two adjacent scales i, i + 1 at which it is closest to region x region px.

    scales: two or more, ascending; see ScaledView.scale.
    """
    wide, high = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3).unbind(1)
    ideal = region / (wide * high).sqrt()
    return (torch.bucketize(ideal, boxes.new_tensor(scales)) - 1).clamp(0, len(scales) - 2)


def region_features(model: Detector, views: Sequence[ScaledView], boxes: Tensor) -> Tensor:
    """Features (R, D) of boxes (R, 4): from a single view, or the maximum over two adjacent views (maxout)."""

    def pooled(view: ScaledView, chosen: Tensor) -> Tensor:
        return model.roi_heads.regions(view.features, [view.boxes(chosen)], [view.shape])[0]

    if len(views) == 1:
        return pooled(views[0], boxes)
    lower = adjacent([view.scale for view in views], boxes, REGION * model.settings.min_size / PAPER_SIDE)
    rows: Tensor | None = None
    for i, view in enumerate(views):
        chosen = (lower == i) | (lower == i - 1)
        if not chosen.any():
            continue
        own = pooled(view, boxes[chosen])
        rows = own.new_full((len(boxes), own.shape[1]), -torch.inf) if rows is None else rows
        rows[chosen] = torch.maximum(rows[chosen], own)
    return boxes.new_zeros(0, 1) if rows is None else rows


def predict(models: Sequence[Detector], views: Sequence[Sequence[ScaledView]], boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (R, K + 1) and boxes (R, K + 1, 4) of proposals (R, 4), averaged over the models; in the original's pixels."""
    outputs = [m.roi_heads.predict(region_features(m, own, boxes), boxes) for m, own in zip(models, views, strict=True)]
    scores, refined = (torch.stack(list(by_model)).mean(0) for by_model in zip(*outputs, strict=True))
    return scores, refined


def refine(
    models: Sequence[Detector], views: Sequence[Sequence[ScaledView]], scores: Tensor, boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """Predicts again on each proposal's refined box of its best class. Returns new and old predictions together: (2R, ...)."""
    best = scores[:, 1:].argmax(1) + 1
    height, width = views[0][0].original
    moved = boxes[torch.arange(len(boxes), device=boxes.device), best]
    limit = moved.new_tensor([width, height] * 2)
    moved = torch.minimum(moved.clamp(min=0), limit)
    new_scores, new_boxes = predict(models, views, moved)
    return torch.cat([scores, new_scores]), torch.cat([boxes, new_boxes])


@torch.no_grad()
def detect(
    models: Detector | Sequence[Detector], images: list[Tensor], *, refinement: bool = False, scales: Sequence[int] = ()
) -> list[dict[str, Tensor]]:
    """Detects objects in images, float (C, H, W) on [0, 1], with the paper's test-time improvements. Returns as a Detector does.

    models: several form an ensemble: the union of their proposals is scored by all, and scores, boxes and masks are averaged; NMS
    and thresholds are the first model's. refinement: predict a second time on each refined box, unite old and new predictions,
    and apply box voting after NMS. scales: two or more shorter sides of 16 to 4096 px (the paper: 200 to 1000, for min_size 600):
    the features of each region are the maximum (maxout) over the two adjacent scales at which it is closest to 224 px (scaled
    with min_size); proposals and masks use min_size. Global context is a property of the detector, not an option here.

    Raises UserError for incompatible models, models in training mode, and scales that are out of range or not ascending.
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
            raise UserError(f"the detectors of an ensemble must have the same classes: {models[0].classes}, but {other.classes}")
        if other.roi_heads.has_mask() != models[0].roi_heads.has_mask():
            raise UserError("the detectors of an ensemble must all have masks, or none")
        if other.training:
            raise UserError("detect needs detectors in evaluation mode: call model.eval() first")
    if scales and (len(scales) < 2 or list(scales) != sorted(set(scales))):
        raise UserError(f"scales={tuple(scales)}: must be two or more shorter sides in px, ascending")
    low, high = SIDES
    if wrong := [side for side in scales if not low <= side <= high]:
        raise UserError(f"scales={tuple(scales)}: {wrong[0]} is out of range: use {low} to {high} px")


def _detect(models: list[Detector], image: Tensor, refinement: bool, scales: Sequence[int]) -> dict[str, Tensor]:
    own = [scaled_view(model, image) for model in models]
    views = [[scaled_view(m, image, side) for side in scales] if scales else [view] for m, view in zip(models, own, strict=True)]
    proposals = torch.cat([propose(model, view) for model, view in zip(models, own, strict=True)])
    scores, boxes = predict(models, views, proposals)
    if refinement:
        scores, boxes = refine(models, views, scores, boxes)
    size = own[0].original
    detections = models[0].roi_heads.select(scores, boxes, size, vote=refinement)
    if models[0].roi_heads.has_mask():
        masks = []
        for model, view in zip(models, own, strict=True):
            scaled = {"boxes": view.boxes(detections["boxes"]), "labels": detections["labels"]}
            masks.append(model.roi_heads.masks(view.features, [scaled], [view.shape])[0])
        if len({mask.shape for mask in masks}) > 1:  # 14 px on a shared last stage, 28 px on a pyramid
            side = max(mask.shape[-1] for mask in masks)
            masks = [torch.nn.functional.interpolate(mask, size=(side, side), mode="bilinear") for mask in masks]
        detections["masks"] = paste_masks_in_image(torch.stack(masks).mean(0), detections["boxes"], size)
    return detections
