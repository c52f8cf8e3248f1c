"""A detector: torchvision's GeneralizedRCNN around the two halves of a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from reslearn.detect.heads import Heads, ProposalNetwork
from reslearn.detect.settings import DetectorSettings


class Detector(GeneralizedRCNN):
    """Faster R-CNN or Mask R-CNN. Use create_detector to make one.

    Input: a list of images, float (C, H, W) on [0, 1], of any sizes. In evaluation mode, returns for each image a dict of boxes
    (n, 4), x1, y1, x2, y2 in pixels of the image; labels (n,), from 1 in the order of `classes`; scores (n,), best first; and
    for Mask R-CNN, masks (n, 1, H, W) of probabilities. In training mode, also takes targets, a list of dicts of boxes (n, 4)
    float, labels (n,) int64 and, for Mask R-CNN, masks (n, H, W) uint8 (n may be 0), and returns the losses by name, to be summed.
    """

    rpn: ProposalNetwork
    roi_heads: Heads
    transform: GeneralizedRCNNTransform

    def __init__(
        self, *parts: nn.Module, settings: DetectorSettings, classes: tuple[str, ...], frozen: list[nn.Module], card: Any = None
    ) -> None:
        super().__init__(*parts)
        self.settings, self.classes, self.card = settings, classes, card
        self._frozen: tuple[nn.Module, ...] = ()
        self.freeze(*frozen)

    def freeze(self, *parts: nn.Module) -> None:
        """Freezes these modules for good: weights and BN statistics."""
        self._frozen += parts
        for part in parts:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Detector":
        """Sets the training mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses with the layers in evaluation mode (BN, dropout), for instance validation losses.

        Anchors and regions are sampled by torch's generator: seed it for comparable values.
        """
        with self._returning_losses():
            return self(images, targets)

    def detect_with_losses(
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The detections of a call in evaluation mode, and `losses`, with one pass through the backbone."""
        scaled, scaled_targets = self.transform(images, targets)
        features = self.backbone(scaled.tensors)
        proposals, _ = self.rpn(scaled, features)
        detections, _ = self.roi_heads(features, proposals, scaled.image_sizes)
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        detections = self.transform.postprocess(detections, scaled.image_sizes, sizes)  # type: ignore[operator]
        with self._returning_losses():
            proposals, losses = self.rpn(scaled, features, scaled_targets)
            _, region_losses = self.roi_heads(features, proposals, scaled.image_sizes, scaled_targets)
        return detections, region_losses | losses

    def proposal_losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of the region proposal network only, in training mode. Does not run the region heads."""
        scaled, scaled_targets = self.transform(images, targets)
        return self.rpn.losses(scaled, self.backbone(scaled.tensors), scaled_targets)

    def region_losses(
        self, images: list[Tensor], targets: list[dict[str, Tensor]], proposer: "Detector | None" = None
    ) -> dict[str, Tensor]:
        """The losses of the region heads only, in training mode. proposer: another detector to take the proposals from."""
        scaled, scaled_targets = self.transform(images, targets)
        features = self.backbone(scaled.tensors)
        proposals = proposer.propose(scaled) if proposer else self.rpn.propose(scaled, features)
        return self.roi_heads.losses(features, proposals, scaled.image_sizes, scaled_targets)

    @torch.no_grad()
    def propose(self, scaled: ImageList) -> list[Tensor]:
        """Proposals (R, 4) for each of the scaled and normalized images, in their pixels."""
        return self.rpn.propose(scaled, self.backbone(scaled.tensors))

    @contextmanager
    def _returning_losses(self) -> Iterator[None]:
        """Makes the three modules that branch on `training` return losses, with all layers in evaluation mode."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        for module in (self, self.rpn, self.roi_heads):
            module.training = True
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
