"""The network: a classifier's convolutions, and at every place a score and a box for each class (DRL appendix C)."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VGG
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

from reslearn.data.preprocess import Preprocessing
from reslearn.detect.backbone import Convolutions, Stages, split
from reslearn.detect.heads import own_pooling
from reslearn.errors import UserError
from reslearn.nets import create, spec
from reslearn.nets.options import check_options
from reslearn.nets.resnet import ResNet
from reslearn.weights.store import Card, load, save

HIDDEN = 512
CONTEXT = 16 / 227  # of the side of a region as the second stage sees it, on each side of its box (R-CNN, appendix A)
CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))


class LocalizerSettings(BaseModel):
    """What a localizer is beside its network. anchors: (width, height) in px of the net's view, at every place of its last map.

    hidden: channels of the 3x3 layer before scores and boxes (Faster R-CNN, section 3.1). iou: an anchor that overlaps a true box
    by less than the first is a negative example, by the second or more a positive one, as is the best one of each box. (Faster
    R-CNN's second is 0.7; with 0.5, from which a box counts as found, fewer anchors go without training.)
    proposals: of a localizer with a second stage, how many boxes of a class that one judges.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    anchors: tuple[tuple[float, float], ...] = Field(min_length=1)
    hidden: int = Field(default=HIDDEN, ge=1)
    iou: tuple[float, float] = (0.3, 0.5)
    proposals: int | None = Field(default=None, ge=1)


class Regions(nn.Module):
    """R-CNN, the second stage: a region, cut out and warped to the net's input, is scored and moved for each class.

    It begins as the convolutions of the first stage; on the average of their map are two layers (DRL appendix C: "two sibling fc
    layers for cls and reg, also in a per-class form").
    """

    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))  # targets of about unit variance (Fast R-CNN, section 2.3)

    def __init__(self, backbone: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.classes = backbone, classes
        self.scores, self.deltas = nn.Linear(channels, classes), nn.Linear(channels, 4 * classes)
        for layer, std in ((self.scores, 0.01), (self.deltas, 0.001)):  # as Fast R-CNN's
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.scores.bias, -math.log(2 * classes - 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, H, W), normalized -> logits (R, K), independent of each other, and deltas (R, K, 4) relative to the regions."""
        features = self.backbone(x)["0"].mean((2, 3))
        return self.scores(features), self.deltas(features).reshape(len(x), self.classes, 4)


def warp(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Regions (R, C, *size) of a normalized image (C, H, W), whatever the shape of their boxes (R, 4).

    On each side CONTEXT of what is seen lies around the box, the mean where the image ends (R-CNN, appendix A).
    """
    margin = CONTEXT / (1 - 2 * CONTEXT) * (boxes[:, 2:] - boxes[:, :2])
    grown = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
    with own_pooling():
        return roi_align(image[None], [grown], size, aligned=True)


class Localizer(nn.Module):
    """A per-class region proposal network; made by create_localizer.

    forward: (N, C, H, W), normalized -> logits (N, P, K), independent of each other, and deltas (N, P, K, 4) relative to the
    anchors (P, 4) of `anchors_of`: P = places x anchors. Any H and W of 32 px or more will do: test time is fully convolutional.
    """

    def __init__(
        self, backbone: nn.Module, channels: int, stride: int, settings: LocalizerSettings, classes: tuple[str, ...], card: Card
    ) -> None:
        super().__init__()
        self.settings, self.classes, self.stride, self.card = settings, classes, stride, card
        n = len(settings.anchors) * len(classes)
        self.backbone = backbone
        self.regions: Regions | None = None
        self.hidden = nn.Conv2d(channels, settings.hidden, 3, padding=1)
        self.scores = nn.Conv2d(settings.hidden, n, 1)
        self.deltas = nn.Conv2d(settings.hidden, 4 * n, 1)
        for layer in (self.hidden, self.scores, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # Half the examples are of one class of K and the others of none: with 1000 classes, zeros would start at a loss of 693.
        nn.init.constant_(self.scores.bias, -math.log(2 * len(classes) - 1))  # type: ignore[arg-type]
        if settings.proposals is not None:
            self.regions = Regions(copy.deepcopy(backbone), channels, len(classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, deltas, anchors)."""
        features = self.backbone(x)["0"]
        t = F.relu(self.hidden(features))
        k = len(self.classes)
        logits = self.scores(t).permute(0, 2, 3, 1).reshape(len(x), -1, k)
        deltas = self.deltas(t).permute(0, 2, 3, 1).reshape(len(x), -1, k, 4)
        return logits, deltas, self.anchors_of(features.shape[-2], features.shape[-1], x.device)

    def anchors_of(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """(height * width * A, 4): x1, y1, x2, y2 in px of the input, centered in the cells of a map of this size, row by row."""
        shapes = torch.tensor(self.settings.anchors, device=device)
        y = (torch.arange(height, device=device) + 0.5) * self.stride
        x = (torch.arange(width, device=device) + 0.5) * self.stride
        centers = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).reshape(-1, 1, 2)
        return torch.cat([centers - shapes / 2, centers + shapes / 2], -1).reshape(-1, 4)

    @torch.no_grad()
    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of each image, the highest-scored box of each class: logits (N, K), boxes (N, K, 4) in px, cut to the input."""
        logits, deltas, anchors = self(x)
        top, place = logits.float().max(1)
        chosen = deltas.float().gather(1, place[:, None, :, None].expand(-1, 1, -1, 4)).reshape(-1, 4)
        boxes = CODER.decode_single(chosen, anchors[place].reshape(-1, 4)).reshape(*top.shape, 4)
        limits = boxes.new_tensor([x.shape[3], x.shape[2]]).repeat(2)
        return top, torch.minimum(boxes.clamp(min=0), limits)

    @torch.no_grad()
    def ranked(self, x: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of each image, the highest-scored boxes of its classes, int (N, C), best first: logits (N, C, n), boxes (N, C, n, 4) in
        px, cut to the input; n: count, or as many as there are."""
        logits, deltas, anchors = self(x)
        own = classes[:, None].expand(-1, logits.shape[1], -1)  # (N, P, C)
        top, place = logits.float().gather(2, own).topk(min(count, len(anchors)), dim=1)
        here = torch.arange(len(x), device=x.device)[:, None, None]
        boxes = CODER.decode_single(deltas.float()[here, place, classes[:, None]].reshape(-1, 4), anchors[place].reshape(-1, 4))
        limits = boxes.new_tensor([x.shape[3], x.shape[2]]).repeat(2)
        boxes = torch.minimum(boxes.reshape(*place.shape, 4).clamp(min=0), limits)
        return top.transpose(1, 2), boxes.transpose(1, 2)


def _assemble(net: nn.Module, settings: LocalizerSettings, classes: tuple[str, ...], card: Card) -> Localizer:
    if isinstance(net, ResNet):
        last = net.stages[-1]
        return Localizer(Stages(net, net.stages, (last,)), net.channels[-1], net.strides[-1], settings, classes, card)
    if isinstance(net, VGG):
        halves = split(net)
        assert isinstance(halves.shared, Convolutions)
        return Localizer(halves.shared, halves.channels, halves.stride, settings, classes, card)
    raise UserError(f"localization does not support {type(net).__name__}: use a residual, plain or highway net, or VGG")


def flat(view: Preprocessing) -> Preprocessing:
    """The same preprocessing with per-channel means instead of a mean image, so that it applies to any size."""
    if view.pixel_mean is None:
        return view
    mean = -view.normalizer().shift.mean((1, 2)) * torch.tensor(view.std)
    return view.model_copy(update={"pixel_mean": None, "mean": tuple(mean.tolist())})


def create_localizer(
    net: str | nn.Module,
    classes: tuple[str, ...],
    settings: LocalizerSettings,
    view: Preprocessing,
    options: dict[str, Any] | None = None,
) -> Localizer:
    """A localizer in training mode on a new network of the zoo, or on a classification network that load() made (its modules are
    taken, its last layer is left out); the other layers are new (seed them with torch.manual_seed).

    classes: their names. view: how images become the net's input, without a pixel mean. options: of a new network.
    Raises UserError for a network that has no map, and for unknown names and options.
    """
    if isinstance(net, str):
        name, options = net, options or {}
        body = create(name, len(classes), view.channels, **options)
    else:
        known: Card = net.card  # type: ignore[assignment]
        body, name, options = net, known.net, known.options
    described = settings.model_dump(mode="json", exclude_none=True)
    card = Card(net=name, options=options, classes=classes, preprocessing=view, localizer=described)
    return _assemble(body, settings, classes, card).train()


def described(card: Card) -> Localizer:
    """The localizer of a card, without weights (on the meta device). Raises UserError."""
    if card.localizer is None:
        raise UserError("holds no localizer: train one with reslearn localize train")
    try:
        settings = LocalizerSettings.model_validate(card.localizer)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"its card is not valid at 'localizer.{'.'.join(map(str, first['loc']))}': {first['msg']}") from error
    check_options(spec(card.net), card.options)
    with torch.device("meta"):
        net = create(card.net, len(card.classes), card.preprocessing.channels, **card.options)
        return _assemble(net, settings, card.classes, card)


def save_localizer(model: Localizer, path: str | Path, card: Card | None = None) -> Path:
    """Write a localizer with its card (its own unless given), whole or not at all. Raises UserError where it cannot be written."""
    return save(model, path, card, describe=described)


def load_localizer(path: str | Path, device: torch.device | str = "cpu") -> Localizer:
    """The localizer of a file or run folder, in evaluation mode. Raises UserError where it is missing, damaged or no localizer."""
    model = load(path, device, describe=described)
    assert isinstance(model, Localizer)
    return model
