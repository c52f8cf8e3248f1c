"""A detector: torchvision's frame (scale, features, proposals, regions) around our halves of a net."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from reslearn.detect.heads import Heads
from reslearn.detect.settings import Settings


class Detector(GeneralizedRCNN):
    """Faster or Mask R-CNN; made by create_detector.

    Images are float (C, H, W) tensors on [0, 1], of any sizes, in a list. In evaluation mode a call gives, for each image, a dict
    of boxes (n, 4) as x1, y1, x2, y2 in its pixels, labels (n,) from 1 in the order of `classes`, scores (n,), best first, and
    with masks, masks (n, 1, H, W) of probabilities. In training mode it takes targets as well, a list of dicts of boxes (n, 4)
    float, labels (n,) int64 and, with masks, masks (n, H, W) uint8 (n may be 0), and gives the losses by name; their sum is
    what is minimised.
    """

    roi_heads: Heads

    def __init__(
        self,
        *parts: nn.Module,
        settings: Settings,
        classes: tuple[str, ...],
        frozen: list[nn.Module],
        card: Any = None,
    ) -> None:
        super().__init__(*parts)
        self.settings, self.classes, self.card = settings, classes, card
        self._frozen = tuple(frozen)
        for part in frozen:
            part.requires_grad_(False)

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
