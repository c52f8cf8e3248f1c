"""Recipes of detectors: the paper's for PASCAL VOC and COCO, and a default chosen from the data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.nn.modules.batchnorm import _BatchNorm

from reslearn.data.boxes.anchors import AnchorLevel, anchor_recall, scaled_boxes, suggest_anchors
from reslearn.data.boxes.annotated import AnnotatedSet
from reslearn.data.boxes.box_set import Bad, BoxImage
from reslearn.detect.backbone import split
from reslearn.detect.settings import DetectorSettings, make_settings, too_thin
from reslearn.errors import UserError
from reslearn.nets import create, spec
from reslearn.training import recipe as common
from reslearn.training.recipe import Chosen

SIDES = (240, 320, 480, 600)  # px: shorter sides that detect-default chooses from
SMALL = 320  # px: largest shorter side at which detect-default pools regions to 7 x 7
SETTLED = 64  # images over which detect-default averages a trained backbone's BN statistics
LEAST = 12  # px: desired shorter side of a small object


class BoxRecipe(common.Recipe, frozen=True):
    """The keys that detection and localization share."""

    execution: Literal["auto", "eager", "fused"] = Field(default="auto", description="execution mode: auto, eager or fused (CPU)")

    @model_validator(mode="after")
    def _not_classification(self) -> Self:
        if self.net.frozen or self.batch.sync_bn is not None or self.schedule.warmup_lr is not None:
            raise ValueError("net.frozen, batch.sync_bn and schedule.warmup_lr apply to classification only")
        return self


class BoxData(common.Data, frozen=True):
    """The images to train on and to hold out, and their augmentation."""

    train: str = Field(default="train", description="the split to train on; VOC's are train, val, trainval, test")
    bad: Bad = Field(default="fail", description="invalid boxes: fail, naming all of them, or drop")
    flip: Literal["none", "horizontal", "both"] = Field(default="horizontal", description="random flip; both: also vertical")
    difficult: bool = Field(default=True, description="train on VOC's difficult objects")
    workers: int = Field(default=2, ge=0, le=64, description="threads that read images ahead of time")


class BoxBatch(common.Batch, frozen=True):
    """Images per step, over all ranks."""

    size: int = Field(default=2, ge=1, le=4096, description="images per step, over all ranks")


Share = Annotated[float, Field(gt=0, le=1e9)]


class DetectRecipe(BoxRecipe, frozen=True):
    """The recipe of a detector. net.init: a classification model to start the backbone from."""

    data: BoxData = BoxData()
    batch: BoxBatch = BoxBatch()
    detector: DetectorSettings
    alternate: tuple[Share, Share, Share, Share] | None = Field(
        default=None,
        description="train proposals and regions alternately in four phases of these relative lengths",
    )
    precise_bn: int | None = Field(
        default=None, ge=2, description="images over which the backbone's BN statistics are averaged before they are frozen"
    )

    @model_validator(mode="after")
    def _applies(self) -> "DetectRecipe":
        if self.optimizer.backbone_lr != 1:
            raise ValueError("optimizer.backbone_lr does not apply to detection: detector.frozen freezes the first stages")
        if self.detector.frozen and self.net.init is None:
            raise ValueError("detector.frozen needs a trained backbone: set net.init")
        if self.precise_bn is not None and (self.net.init is None or self.detector.batch_norm == "live"):
            raise ValueError("precise_bn needs a trained backbone (net.init) and detector.batch_norm=frozen")
        if self.alternate is not None:
            if self.ema is not None:
                raise ValueError("ema cannot be combined with alternate, whose later phases freeze what the earlier ones trained")
            if self.schedule.shape == "plateau":
                raise ValueError("schedule.shape=plateau cannot be combined with alternate: its first two phases are not evaluated")
            if any(drop >= 1 for drop in self.schedule.drops):
                raise ValueError("with alternate, schedule.drops must be shares below 1 of each phase")
        return self


def levels(net: str) -> int:
    """Number of levels of a feature pyramid on this network."""
    return len(spec(net).blocks) + 1


def _detector(net: str, start: bool, kind: str, **options: Any) -> dict[str, Any]:
    options = {"batch_norm": "frozen" if start else "live", **options}
    return make_settings(kind, levels(net), options).model_dump()


def _as_published(net: str, start: bool, kind: str) -> dict[str, Any]:
    """The papers' settings: RoI max pooling; no training on cross-boundary anchors (Faster R-CNN, section 3.3); in a pretrained
    VGG, conv1 and conv2 frozen (Fast R-CNN, section 4.5; Faster R-CNN, section 3.1.3), in a ResNet only BN (DRL appendix A).
    """
    pooled = {"roi": "pool"} if kind == "c4" else {}
    return pooled | {"anchors_inside": True} | ({"frozen": 2} if start and net.startswith("vgg") else {})


def voc_paper(data: AnnotatedSet | None, net: str | None, kind: str, start: bool) -> Chosen:
    """PASCAL VOC as in DRL appendix A and the Faster R-CNN paper, but trained jointly: 70,000 steps of one image.

    On a VOCdevkit with VOC2007 and VOC2012, this is 07+12: trained on both trainval splits, tested on the 2007 test split, where
    DRL reports 76.4 mAP with ResNet-101 and 73.2 with VGG-16. (The test set of 07++12 is evaluated by the VOC server only.)

    The papers use alternating training (recipe voc-paper-4step); joint training comes close. The schedule is that of the joint
    training in the released Faster R-CNN code: lr 0.001, divided by 10 after 50,000 steps. As in that code, smooth L1 of
    proposals has beta 1/9 (papers: 1). As in the papers, cross-boundary anchors are ignored (Faster R-CNN, section 3.3:
    detector.anchors_inside), background starts at IoU 0.1 (Fast R-CNN, section 2.3: detector.background), and conv1 and conv2 of a
    pretrained VGG are frozen (detector.frozen).
    """
    net = net or "resnet101"
    values = {
        "name": "voc-paper",
        "net": {"name": net},
        "data": {"train": "trainval", "val": 0, "flip": "horizontal", "difficult": False},
        "detector": _detector(net, start, kind, background=0.1, **_as_published(net, start, kind)),
        "batch": {"size": 1},
        "optimizer": {"momentum": 0.9, "weight_decay": 5e-4},
        "schedule": {"steps": 70_000, "lr": 1e-3, "shape": "steps", "drops": (5 / 7,)},
        "evaluate": {"every": 10_000},
    }
    return Chosen(values, {})


def voc_paper_4step(data: AnnotatedSet | None, net: str | None, kind: str, start: bool) -> Chosen:
    """PASCAL VOC with the papers' four-step alternating training: twice 80,000 steps for proposals and 40,000 for regions.

    In each phase, lr 0.001 is divided by 10 after three quarters (60,000 + 20,000; 30,000 + 10,000; Ren et al., 2015, section 3.3
    and the released code). One deviation: steps for regions use one image with 128 regions, not two with 64.
    """
    values, reasons = voc_paper(data, net, kind, start)
    schedule = {"steps": 240_000, "lr": 1e-3, "shape": "steps", "drops": (0.75,)}
    return Chosen({**values, "name": "voc-paper-4step", "alternate": (2, 1, 2, 1), "schedule": schedule}, reasons)


def coco_paper(data: AnnotatedSet | None, net: str | None, kind: str, start: bool) -> Chosen:
    """COCO as in DRL appendix A: 240,000 steps at lr 0.001 and 80,000 at 0.0001, 8 images per step; also anchors of 64 px.

    Trained jointly. The paper trains proposals (8 images per step) and regions (16) that long each; for alternating training with 8
    images per step: --set alternate=[1,1,1,1] --set schedule.steps=1280000.

    The paper reports, on val, 48.4 AP50 and 27.2 AP with ResNet-101, and 41.5 and 21.2 with VGG-16.
    """
    net = net or "resnet101"
    extra = {"anchors": (64.0, 128.0, 256.0, 512.0)} if kind == "c4" else {}
    extra |= _as_published(net, start, kind)
    values = {
        "name": "coco-paper",
        "net": {"name": net},
        "data": {"flip": "horizontal"},
        "detector": _detector(net, start, kind, **extra),
        "batch": {"size": 8},
        "optimizer": {"momentum": 0.9, "weight_decay": 1e-4},
        "schedule": {"steps": 320_000, "lr": 1e-3, "shape": "steps", "drops": (0.75,)},
        "evaluate": {"every": 20_000},
    }
    return Chosen(values, {})


def detect_default(data: AnnotatedSet | None, net: str | None, kind: str, start: bool, side: int | None = None) -> Chosen:
    """Input size, anchors, regions and epochs chosen from the boxes and the number of images; cosine schedule with warm-up."""
    # side: the shorter side of the images in px, if given; the anchors are fitted to it
    if data is None:
        raise UserError("recipe detect-default depends on the data: give a data set as well")
    images, net = data.training.images, net or "resnet18"
    reasons: dict[str, str] = {}
    with torch.device("meta"):
        halves = split(create(net, spec(net).classes))
    if side is None:
        side = _side(images)
        small = _small(scaled_boxes(images, side, 10 * side)[0])
        reasons["detector.min_size"] = f"shorter side {side} px: the smallest 10% of the objects then have up to {small:.0f} px"
    long = max(max(image.height, image.width) / min(image.height, image.width) for image in images)
    limit = int(np.ceil(side * min(long, 2) / 32) * 32)
    boxes, sizes = scaled_boxes(images, side, limit)
    options: dict[str, Any] = {"min_size": side, "max_size": limit, "proposals": (1000, 300), "ranked": (2000, 1000)}
    if kind == "c4":
        options["anchors"] = _anchors(boxes)
        recall = anchor_recall(boxes, sizes, [AnchorLevel(halves.stride, options["anchors"])]).recall
        shown = ", ".join(f"{a:g}" for a in options["anchors"])
        reasons["detector.anchors"] = f"anchors of {shown} px: {100 * recall:.1f}% of the objects have one with IoU >= 0.5"
        if halves.roi > 7 and side <= SMALL:
            options["roi_size"] = 7
            reasons["detector.roi_size"] = "regions are pooled to 7 x 7 pixels: the images are small"
    crowded = int(np.percentile([len(image.objects) for image in images], 90))
    options["regions"] = int(np.clip(2 ** np.ceil(np.log2(3 * max(crowded, 4))), 16, 128))
    options["detections"] = int(np.clip(4 * max(len(image.objects) for image in images), 100, 1000))
    reasons["detector.regions"] = f"{options['regions']} regions per training image: 90% have at most {crowded} objects"
    epochs = int(np.clip(round(4_000 / max(len(images), 1)), 6, 60))
    reasons["schedule.epochs"] = f"{epochs} epochs: {len(images):,} images"
    lr = 0.005 if start else 0.02
    reasons["schedule.lr"] = f"lr {lr:g}: the backbone {'is pretrained' if start else 'is trained from scratch'}"
    values = {
        "name": "detect-default",
        "net": {"name": net},
        "data": {"flip": "horizontal"},
        "detector": _detector(net, start, kind, **options),
        "batch": {"size": 2},
        "optimizer": {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True, "undecayed": "norm-and-bias"},
        "schedule": {"epochs": epochs, "lr": lr, "shape": "cosine", "warmup": 0.1},
        "log": {"every": 20},
    }
    return Chosen(values, reasons)


def _anchors(boxes: np.ndarray) -> tuple[float, ...]:
    """Anchor sides, px, each at least 7/6 of the previous one."""
    sides: list[float] = []
    for width, height in suggest_anchors(boxes, 6):
        side = float(max(round(np.sqrt(width * height)), 1))
        if not sides or side >= sides[-1] * 7 / 6:
            sides.append(side)
    return tuple(sides)


def _small(boxes: np.ndarray) -> float:
    """Shorter side, px, of a small object: the 10th percentile of boxes (N, 4)."""
    return float(np.percentile((boxes[:, 2:] - boxes[:, :2]).min(axis=1), 10))


def _side(images: Sequence[BoxImage]) -> int:
    """The smallest of SIDES at which small objects have LEAST px, no larger than the median image."""
    own = int(np.median([min(image.height, image.width) for image in images]))
    sides = [side for side in SIDES if side <= own] or [own]
    return next((side for side in sides if _small(scaled_boxes(images, side, 10 * side)[0]) >= LEAST), sides[-1])


NAMED: dict[str, Callable[..., Chosen]] = {
    "coco-paper": coco_paper,
    "detect-default": detect_default,
    "voc-paper": voc_paper,
    "voc-paper-4step": voc_paper_4step,
}


def choose(name: str, data: AnnotatedSet | None, net: str | None, given: Mapping[str, Any]) -> Chosen:
    """The values of a named recipe; see Task.choose."""
    kind, side, start = str(given.get("detector.kind", "c4")), given.get("detector.min_size"), given.get("net.init") is not None
    sized = {"side": side} if name == "detect-default" and isinstance(side, int) and side > 0 else {}
    values, reasons = NAMED[name](data, net, kind, start, **sized)
    if name == "detect-default" and start and given.get("detector.batch_norm") != "live":
        with torch.device("meta"):
            normalized = any(isinstance(module, _BatchNorm) for module in create(net or "", 2).modules())
        if normalized:
            values["precise_bn"] = SETTLED
            reasons["precise_bn"] = f"the backbone's BN statistics are averaged over {SETTLED} training images, then frozen"
    return Chosen(values, reasons)


def check(recipe: DetectRecipe, data: AnnotatedSet, given: Mapping[str, Any]) -> None:
    """Raises UserError if a key does not apply to the data; see Task.check."""
    d, images = recipe.detector, data.training.images
    if d.kind == "fpn" and len(d.anchors) != (count := levels(recipe.net.name)):
        raise UserError(f"detector.anchors: a pyramid on {recipe.net.name} needs {count}, one per level, not {len(d.anchors)}")
    for image in images:
        if problem := too_thin(d, image.height, image.width):
            raise UserError(f"{image.path}: {problem}")
    if d.masks and not any(image.objects.segmentations for image in images):
        raise UserError("detector.masks=true: the objects of this set have no masks, only boxes")
