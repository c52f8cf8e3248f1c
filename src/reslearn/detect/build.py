"""create_detector: builds a detector on a network, from the zoo or pretrained."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VGG
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from reslearn.data.preprocess import Preprocessing
from reslearn.detect.backbone import Stages, freeze_batch_norm, split, stages_of
from reslearn.detect.detector import Detector
from reslearn.detect.heads import Anchors, Heads, Pool, ProposalNetwork, Proposals, pyramid_pool
from reslearn.detect.settings import DetectorSettings, make_settings
from reslearn.errors import UserError
from reslearn.nets import create, models, spec
from reslearn.nets.resnet import ResNet
from reslearn.weights.store import Card, described, load

PYRAMID = 256  # channels of a pyramid's maps (FPN, section 3)
HIDDEN = 1024  # width of the two layers on a pyramid's regions (FPN, section 4.2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


def create_detector(
    net: str | Path | nn.Module, classes: int | Sequence[str], kind: str = "c4", *, channels: int | None = None, **options: Any
) -> Detector:
    """Creates a detector with a network as its backbone, in training mode. New layers are random (see torch.manual_seed).

    net: the name of a residual, plain or highway network or a VGG, randomly initialized; a classification model file or run
    folder, whose weights and normalization are reused; or a module, which is copied. Write ./name for a folder named like a
    network. classes: names of the object classes, or their number, without background. channels: of the images, for a network
    given by name (default 3). options: see DetectorSettings. batch_norm defaults to "frozen" for a trained backbone (a file, or a
    network from load()), otherwise to "live": with random weights, activations explode without normalization.

    Raises UserError for unknown names or options, and for invalid combinations.
    """
    names = _names(classes)
    body, known, view = backbone(net, channels)
    trained = known.get("trained", False)
    levels = len(body.stages) + 1 if isinstance(body, ResNet) else 0
    if kind == "fpn" or options.get("masks"):
        stages_of(body)
    if options.get("frozen") and not trained:
        raise UserError("frozen needs a trained backbone: give a model file or run folder as net")
    if "batch_norm" not in options:
        options["batch_norm"] = "frozen" if trained else "live"
    settings = make_settings(kind, levels, options)
    card = None
    if known.get("net"):
        fields = {"net": known["net"], "options": known["options"], "classes": names, "preprocessing": view}
        card = Card(**fields, detector=settings.model_dump(mode="json"))
    return assemble(body, names, settings, view, card)


def _names(classes: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        raise UserError(f"classes={classes!r}: must be a list of names or a number")
    names = tuple(f"class {i}" for i in range(1, classes + 1)) if isinstance(classes, int) else tuple(classes)
    if not names:
        raise UserError(f"classes={classes!r}: a detector needs at least 1 class besides the background")
    if len(set(names)) < len(names):
        raise UserError(f"classes: '{next(name for name in names if names.count(name) > 1)}' is given twice")
    return names


def backbone(net: str | Path | nn.Module, channels: int | None) -> tuple[nn.Module, dict[str, Any], Preprocessing]:
    """A new or copied network; {"net", "options", "trained"} as far as known; and its preprocessing."""
    if isinstance(net, str) and "/" not in net and not net.endswith(".safetensors") and (net in models() or not Path(net).exists()):
        row = spec(net)
        body = create(net, row.classes, channels or 3)
        return body, {"net": net, "options": {}}, _default_view(channels or 3, row.size)
    if channels is not None:
        raise UserError(f"channels={channels} applies to a network given by name only: leave it out")
    body = copy.deepcopy(net) if isinstance(net, nn.Module) else load(net, describe=_described)
    card = getattr(body, "card", None)
    if not isinstance(card, Card):
        first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
        return body, {}, _default_view(first.in_channels, 224)
    view = card.preprocessing
    if view.pixel_mean is not None:  # a mean image fits one size only
        mean = view.normalizer().shift.mul(-1).mul(torch.tensor(view.std)[:, None, None]).mean((1, 2))
        view = view.model_copy(update={"pixel_mean": None, "mean": tuple(mean.tolist())})
    return body, {"net": card.net, "options": card.options, "trained": True}, view


def _default_view(channels: int, size: int) -> Preprocessing:
    mean, std = (MEAN, STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    return Preprocessing(channels=channels, size=(size, size), mean=mean, std=std)


def _described(card: Card) -> nn.Module:
    if card.detector is not None or card.localizer is not None:
        kind = "localizer" if card.detector is None else "detector"
        raise UserError(f"holds a {kind}: a backbone must be a classification model")
    return described(card)


class Pyramid(nn.Module):
    """All stages with a feature pyramid, with torchvision's state-dict names: (N, C, H, W) -> {"0": ..., "pool": ...}."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.body = Stages(net, net.stages, net.stages)
        self.fpn = FeaturePyramidNetwork(list(net.channels), PYRAMID, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))


def assemble(
    net: nn.Module, classes: tuple[str, ...], settings: DetectorSettings, view: Preprocessing, card: Card | None
) -> Detector:
    """Builds a detector from the modules of `net`."""
    s, count = settings, len(classes) + 1
    if s.batch_norm == "frozen":
        freeze_batch_norm(net)
    mask_layers: dict[str, Any] = {}
    if s.kind == "c4":
        halves = split(net)
        shared, head, parts = halves.shared, halves.region, halves.parts
        channels, features = halves.channels, halves.features
        if s.roi_size is not None and isinstance(net, VGG):
            raise UserError("roi_size does not apply to VGG, whose fc6 needs 7 x 7 pixels: leave it out")
        pool = Pool(s.roi, s.roi_size or halves.roi, halves.stride)
        anchors, ratios = (s.anchors,), (s.ratios,)
        if s.masks:  # boxes and masks share the maps of the last stage (Mask R-CNN, figure 4)
            mask_layers = {"mask_predictor": MaskRCNNPredictor(features, PYRAMID, count)}
    else:
        staged = stages_of(net)
        shared, channels, features = Pyramid(staged), PYRAMID, HIDDEN
        parts = [[staged.conv1, staged.bn1], *([staged.get_submodule(stage)] for stage in staged.stages)]
        pool, head = pyramid_pool(7, staged.strides), TwoMLPHead(PYRAMID * 7**2, HIDDEN)
        anchors, ratios = tuple((size,) for size in s.anchors), (s.ratios,) * len(s.anchors)
        if s.masks:
            mask_layers = {
                "mask_roi_pool": pyramid_pool(14, staged.strides),
                "mask_head": MaskRCNNHeads(PYRAMID, (PYRAMID,) * 4, 1),
                "mask_predictor": MaskRCNNPredictor(PYRAMID, PYRAMID, count),
            }
    if s.frozen > len(parts):
        raise UserError(f"frozen={s.frozen}: must be at most {len(parts)}, the stem and shared stages of this network")
    with torch.device("cpu"):  # not buffers: a detector described on the meta device must have real ones
        generator = Anchors(anchors, ratios)
    rpn = ProposalNetwork(
        generator,
        Proposals(channels, generator.num_anchors_per_location()[0]),
        inside=bool(s.anchors_inside),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": s.ranked[0], "testing": s.ranked[1]},
        post_nms_top_n={"training": s.proposals[0], "testing": s.proposals[1]},
        nms_thresh=0.7,
    )
    heads = Heads(
        pool,
        head,
        FastRCNNPredictor(features * (2 if s.context else 1), count),
        context=s.context,
        background=s.background or 0.0,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=s.regions,
        positive_fraction=s.foreground,
        bbox_reg_weights=None,  # standard deviations of 0.1, 0.1, 0.2, 0.2
        score_thresh=s.score,
        nms_thresh=s.nms,
        detections_per_img=s.detections,
        **mask_layers,
    )
    transform = GeneralizedRCNNTransform(s.min_size, s.max_size, list(view.mean), list(view.std))
    frozen = [module for part in parts[: s.frozen] for module in part]
    return Detector(shared, rpn, heads, transform, settings=s, classes=classes, frozen=frozen, card=card).train()
