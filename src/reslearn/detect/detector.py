"""A detector: torchvision's frame (scale, features, proposals, regions) around our halves of a net."""

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
    """Faster or Mask R-CNN; made by create_detector.

    Images are float (C, H, W) tensors on [0, 1], of any sizes, in a list. In evaluation mode a call gives, for each image, a dict
    of boxes (n, 4) as x1, y1, x2, y2 in its pixels, labels (n,) from 1 in the order of `classes`, scores (n,), best first, and
    with masks, masks (n, 1, H, W) of probabilities. In training mode it takes targets as well, a list of dicts of boxes (n, 4)
    float, labels (n,) int64 and, with masks, masks (n, H, W) uint8 (n may be 0), and gives the losses by name; their sum is
    what is minimized.
    """

    rpn: ProposalNetwork
    roi_heads: Heads
    transform: GeneralizedRCNNTransform

    def __init__(
        self,
        *parts: nn.Module,
        settings: DetectorSettings,
        classes: tuple[str, ...],
        frozen: list[nn.Module],
        card: Any = None,
    ) -> None:
        super().__init__(*parts)
        self.settings, self.classes, self.card = settings, classes, card
        self._frozen: tuple[nn.Module, ...] = ()
        self.freeze(*frozen)

    def freeze(self, *parts: nn.Module) -> None:
        """From now on these parts stay as they are."""
        self._frozen += parts
        for part in parts:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Detector":
        """Training mode, but for frozen parts, whose BN stays as it is."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The losses of the network as it is in evaluation (BN, dropout), such as those of held-out images.

        The regions and anchors they are of are drawn by torch's generator: seed it to compare.
        """
        with self._asked_for_losses():
            return self(images, targets)

    def detect_with_losses(
        self, images: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """What a call in evaluation mode finds, and `losses`: both of one look at the images."""
        scaled, scaled_targets = self.transform(images, targets)
        features = self.backbone(scaled.tensors)
        proposals, _ = self.rpn(scaled, features)
        found, _ = self.roi_heads(features, proposals, scaled.image_sizes)
        sizes = [(x.shape[-2], x.shape[-1]) for x in images]
        found = self.transform.postprocess(found, scaled.image_sizes, sizes)  # type: ignore[operator]
        with self._asked_for_losses():
            proposals, losses = self.rpn(scaled, features, scaled_targets)
            _, more = self.roi_heads(features, proposals, scaled.image_sizes, scaled_targets)
        return found, more | losses

    def proposal_losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Those that the region proposal network learns from, in training mode, and no others; regions are not looked at."""
        scaled, scaled_targets = self.transform(images, targets)
        return self.rpn.losses(scaled, self.backbone(scaled.tensors), scaled_targets)

    def region_losses(
        self, images: list[Tensor], targets: list[dict[str, Tensor]], proposer: "Detector | None" = None
    ) -> dict[str, Tensor]:
        """Those that regions learn from, in training mode, and no others. proposer: whose proposals they are, if another's."""
        scaled, scaled_targets = self.transform(images, targets)
        features = self.backbone(scaled.tensors)
        proposals = proposer.propose(scaled) if proposer else self.rpn.propose(scaled, features)
        return self.roi_heads.losses(features, proposals, scaled.image_sizes, scaled_targets)

    @torch.no_grad()
    def propose(self, scaled: ImageList) -> list[Tensor]:
        """Proposals (R, 4) in each of these images, which have been scaled and normalized, in their pixels."""
        return self.rpn.propose(scaled, self.backbone(scaled.tensors))

    @contextmanager
    def _asked_for_losses(self) -> Iterator[None]:
        """The frame takes targets where its own flags say training; its layers stay in evaluation."""
        frame = (self, self.rpn, self.roi_heads)
        before = [each.training for each in self.modules()]
        everything = list(self.modules())
        self.eval()
        for each in frame:
            each.training = True
        try:
            yield
        finally:
            for each, was in zip(everything, before, strict=True):
                each.training = was
