"""The localization network: a classifier's convolutions, with a score and a box per class at each position (DRL appendix C)."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VGG
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

from reslearn.data.preprocess import Preprocessing
from reslearn.detect.backbone import Convolutions, Stages, split
from reslearn.detect.heads import own_pooling
from reslearn.detect.store import card_settings
from reslearn.errors import UserError
from reslearn.nets import create, spec
from reslearn.nets.options import check_options
from reslearn.nets.resnet import ResNet
from reslearn.weights.store import Card, load, save

HIDDEN = 512
CONTEXT = 16 / 227  # margin on each side of the box, as a share of the second stage's input (R-CNN, appendix A)
CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))


class LocalizerSettings(BaseModel):
    """A localizer's settings besides its network. anchors: (width, height), px of the input, at each position of the last map.

    hidden: channels of the 3x3 layer before scores and boxes (Faster R-CNN, section 3.1). iou: anchors below the first IoU are
    negative examples, those at or above the second, and each box's best anchor, positive. (Faster R-CNN's second value is 0.7; 0.5,
    the IoU of a correct box, leaves fewer anchors unused.) proposals: boxes per class that a second stage refines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    anchors: tuple[tuple[float, float], ...] = Field(min_length=1)
    hidden: int = Field(default=HIDDEN, ge=1)
    iou: tuple[float, float] = (0.3, 0.5)
    proposals: int | None = Field(default=None, ge=1)


class Regions(nn.Module):
    """The second stage, R-CNN: scores and refines a region, cropped and warped to the input size, for each class.

    The first stage's convolutions and average pooling, with two layers on top (DRL appendix C: "two sibling fc layers for cls and
    reg, also in a per-class form").
    """

    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))  # targets with about unit variance (Fast R-CNN, section 2.3)

    def __init__(self, backbone: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.backbone, self.classes = backbone, classes
        self.scores, self.deltas = nn.Linear(channels, classes), nn.Linear(channels, 4 * classes)
        for layer, std in ((self.scores, 0.01), (self.deltas, 0.001)):  # as in Fast R-CNN
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.scores.bias, -math.log(2 * classes - 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, H, W), normalized -> logits (R, K) of binary classifiers, and deltas (R, K, 4) relative to the regions."""
        features = self.backbone(x)["0"].mean((2, 3))
        return self.scores(features), self.deltas(features).reshape(len(x), self.classes, 4)


def warp(image: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Warps the boxes (R, 4) of a normalized image (C, H, W) to regions (R, C, *size), with a margin of CONTEXT on each side.

    Outside the image, regions are filled with the mean (R-CNN, appendix A).
    """
    margin = CONTEXT / (1 - 2 * CONTEXT) * (boxes[:, 2:] - boxes[:, :2])
    grown = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
    with own_pooling():
        return roi_align(image[None], [grown], size, aligned=True)


class Localizer(nn.Module):
    """A per-class region proposal network. Use create_localizer to make one.

    forward: (N, C, H, W), normalized -> logits (N, P, K) of independent binary classifiers, deltas (N, P, K, 4), and the anchors
    (P, 4) they are relative to; P = positions x anchors. Fully convolutional: any H and W of 32 px or more.
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
        # Half of the examples are of one class, the others of none; a bias of 0 would give an initial loss of 693 for 1000 classes.
        nn.init.constant_(self.scores.bias, -math.log(2 * len(classes) - 1))  # type: ignore[arg-type]
        if settings.proposals is not None:
            self.regions = Regions(copy.deepcopy(backbone), channels, len(classes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.backbone(x)["0"]
        t = F.relu(self.hidden(features))
        k = len(self.classes)
        logits = self.scores(t).permute(0, 2, 3, 1).reshape(len(x), -1, k)
        deltas = self.deltas(t).permute(0, 2, 3, 1).reshape(len(x), -1, k, 4)
        return logits, deltas, self.anchors_of(features.shape[-2], features.shape[-1], x.device)

    def anchors_of(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """(height * width * A, 4): x1, y1, x2, y2, px of the input, centered in the cells of a map of this size, row by row."""
        shapes = torch.tensor(self.settings.anchors, device=device)
        y = (torch.arange(height, device=device) + 0.5) * self.stride
        x = (torch.arange(width, device=device) + 0.5) * self.stride
        centers = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).reshape(-1, 1, 2)
        return torch.cat([centers - shapes / 2, centers + shapes / 2], -1).reshape(-1, 4)

    @torch.no_grad()
    def best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The highest-scored box of each class: logits (N, K), boxes (N, K, 4), px, clipped to the input."""
        logits, deltas, anchors = self(x)
        top, place = logits.float().max(1)
        chosen = deltas.float().gather(1, place[:, None, :, None].expand(-1, 1, -1, 4))
        return top, _decode(chosen.reshape(*top.shape, 4), anchors[place], x)

    @torch.no_grad()
    def ranked(self, x: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` highest-scored boxes of some classes, int (N, C), best first: logits (N, C, n), boxes (N, C, n, 4), px,
        clipped to the input. n: at most the number of anchors."""
        logits, deltas, anchors = self(x)
        own = classes[:, None].expand(-1, logits.shape[1], -1)  # (N, P, C)
        top, place = logits.float().gather(2, own).topk(min(count, len(anchors)), dim=1)
        image = torch.arange(len(x), device=x.device)[:, None, None]
        boxes = _decode(deltas.float()[image, place, classes[:, None]], anchors[place], x)
        return top.transpose(1, 2), boxes.transpose(1, 2)


def _decode(deltas: Tensor, anchors: Tensor, x: Tensor) -> Tensor:
    """Boxes (..., 4) of deltas and anchors (..., 4), clipped to the input (N, C, H, W)."""
    boxes = CODER.decode_single(deltas.reshape(-1, 4), anchors.reshape(-1, 4)).reshape(deltas.shape)
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([x.shape[3], x.shape[2]]).repeat(2))


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
    """Creates a localizer in training mode, on a new network of the zoo or a classification network from load(), whose modules are
    reused without the last layer. New layers are random (see torch.manual_seed).

    classes: names. view: the preprocessing, without a mean image. options: of a new network.
    Raises UserError for an unsupported network, and for unknown names and options.
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
    """The localizer of a card on the meta device, without weights. Raises UserError for other models or invalid settings."""
    if card.localizer is None:
        raise UserError("is not a localizer: train one with reslearn localize train")
    settings = card_settings(LocalizerSettings, "localizer", card.localizer)
    check_options(spec(card.net), card.options)
    with torch.device("meta"):
        net = create(card.net, len(card.classes), card.preprocessing.channels, **card.options)
        return _assemble(net, settings, card.classes, card)


def save_localizer(model: Localizer, path: str | Path, card: Card | None = None) -> Path:
    """Writes a localizer with its card, by default its own, atomically. Raises UserError if it cannot be written."""
    return save(model, path, card, describe=described)


def load_localizer(path: str | Path, device: torch.device | str = "cpu") -> Localizer:
    """Loads the localizer of a file or run folder, in evaluation mode. Raises UserError if missing, damaged or not a localizer."""
    model = load(path, device, describe=described)
    assert isinstance(model, Localizer)
    return model
