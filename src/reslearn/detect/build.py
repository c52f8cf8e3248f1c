"""create_detector: a network, from the zoo or pre-trained, becomes a detector."""

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
HIDDEN = 1024  # of the two layers on a pyramid's regions (FPN, section 4.2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def create_detector(
    net: str | Path | nn.Module, classes: int | Sequence[str], kind: str = "c4", *, channels: int | None = None, **options: Any
) -> Detector:
    """A detector with a network as its backbone, in training mode; its other layers are new (seed them with torch.manual_seed).

    net: the name of a residual, plain or highway net, or of a VGG, which then is new too; a classification model file or run
    folder of ours, whose weights and normalization come along; or a network in memory, which is copied. A folder called like a
    network is written ./name. classes: the kinds of objects, by name or number, without background. channels: of the images,
    for a net given by name (3). options: see DetectorSettings. batch_norm is "frozen" for a trained backbone (a file, or a
    network that load() made) and else "live": with random weights, frozen layers let the signal explode.

    Raises UserError for an unknown name or option, and for what does not go together.
    """
    names = _names(classes)
    body, known, view = backbone(net, channels)
    trained = known.get("trained", False)
    levels = len(body.stages) + 1 if isinstance(body, ResNet) else 0
    if kind == "fpn" or options.get("masks"):
        stages_of(body)
    if options.get("frozen") and not trained:
        raise UserError("frozen keeps what a trained network brings: give a model file or folder as net")
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
        raise UserError(f"classes={classes!r}: give a list of names, or their number")
    names = tuple(f"class {i}" for i in range(1, classes + 1)) if isinstance(classes, int) else tuple(classes)
    if not names:
        raise UserError(f"classes={classes!r}: a detector needs at least 1 class, beside the background")
    if len(set(names)) < len(names):
        raise UserError(f"classes: '{next(name for name in names if names.count(name) > 1)}' is there twice")
    return names


def backbone(net: str | Path | nn.Module, channels: int | None) -> tuple[nn.Module, dict[str, Any], Preprocessing]:
    """A network of one's own, what is known of it, and how its input is normalized."""
    if isinstance(net, str) and "/" not in net and not net.endswith(".safetensors") and (net in models() or not Path(net).exists()):
        row = spec(net)
        count = channels or 3
        body = create(net, row.classes, count)
        flat = count != 3
        mean, std = ((0.5,) * count, (0.25,) * count) if flat else (MEAN, STD)
        view = Preprocessing(channels=count, size=(row.size, row.size), mean=mean, std=std)
        return body, {"net": net, "options": {}}, view
    if channels is not None:
        raise UserError(f"channels={channels} is for a network given by name: a model brings its own")
    body = copy.deepcopy(net) if isinstance(net, nn.Module) else load(net, describe=_described)
    card = getattr(body, "card", None)
    if not isinstance(card, Card):
        first = next(module for module in body.modules() if isinstance(module, nn.Conv2d))
        flat = first.in_channels != 3
        mean, std = ((0.5,) * first.in_channels, (0.25,) * first.in_channels) if flat else (MEAN, STD)
        return body, {}, Preprocessing(channels=first.in_channels, size=(224, 224), mean=mean, std=std)
    view = card.preprocessing
    if view.pixel_mean is not None:  # images of any size have one mean
        mean = view.normalizer().shift.mul(-1).mul(torch.tensor(view.std)[:, None, None]).mean((1, 2))
        view = view.model_copy(update={"pixel_mean": None, "mean": tuple(mean.tolist())})
    return body, {"net": card.net, "options": card.options, "trained": True}, view


def _described(card: Card) -> nn.Module:
    if card.detector is not None or card.localizer is not None:
        kind = "localizer" if card.detector is None else "detector"
        raise UserError(f"holds a {kind}: a backbone starts from a classification model")
    return described(card)


class Pyramid(nn.Module):
    """All stages and a feature pyramid on them, under torchvision's names: (N, C, H, W) -> {"0": ..., "pool": ...}."""

    def __init__(self, net: ResNet) -> None:
        super().__init__()
        self.body = Stages(net, net.stages, net.stages)
        self.fpn = FeaturePyramidNetwork(list(net.channels), PYRAMID, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(self.body(x))


def assemble(
    net: nn.Module, classes: tuple[str, ...], settings: DetectorSettings, view: Preprocessing, card: Card | None
) -> Detector:
    """A detector of the modules of `net`."""
    s, count = settings, len(classes) + 1
    if s.batch_norm == "frozen":
        freeze_batch_norm(net)
    mask_parts: dict[str, Any] = {}
    if s.kind == "c4":
        halves = split(net)
        shared, head, parts = halves.shared, halves.region, halves.parts
        channels, features = halves.channels, halves.features
        if s.roi_size is not None and isinstance(net, VGG):
            raise UserError("roi_size is for networks with stages: VGG's fc6 takes 7 pixels a side")
        pool = Pool(s.roi, s.roi_size or halves.roi, halves.stride)
        anchors, ratios = (s.anchors,), (s.ratios,)
        if s.masks:  # on the maps of the last stage, which boxes and masks share (Mask R-CNN, figure 4)
            mask_parts = {"mask_predictor": MaskRCNNPredictor(features, PYRAMID, count)}
    else:
        staged = stages_of(net)
        shared, channels, features = Pyramid(staged), PYRAMID, HIDDEN
        parts = [[staged.conv1, staged.bn1], *([staged.get_submodule(stage)] for stage in staged.stages)]
        pool, head = pyramid_pool(7, staged.strides), TwoMLPHead(PYRAMID * 7**2, HIDDEN)
        anchors, ratios = tuple((size,) for size in s.anchors), (s.ratios,) * len(s.anchors)
        if s.masks:
            mask_parts = {
                "mask_roi_pool": pyramid_pool(14, staged.strides),
                "mask_head": MaskRCNNHeads(PYRAMID, (PYRAMID,) * 4, 1),
                "mask_predictor": MaskRCNNPredictor(PYRAMID, PYRAMID, count),
            }
    if s.frozen > len(parts):
        raise UserError(f"frozen={s.frozen}: the shared part of this network has {len(parts)} parts, with its stem")
    with torch.device("cpu"):  # they are no buffers: a detector described on the meta device keeps them
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
        **mask_parts,
    )
    transform = GeneralizedRCNNTransform(s.min_size, s.max_size, list(view.mean), list(view.std))
    frozen = [module for part in parts[: s.frozen] for module in part]
    return Detector(shared, rpn, heads, transform, settings=s, classes=classes, frozen=frozen, card=card).train()
