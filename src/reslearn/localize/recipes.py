"""Recipes of localizers, one per stage."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from reslearn.data.boxes.anchors import suggest_anchors
from reslearn.data.boxes.box_set import BoxSet
from reslearn.detect.recipes import BoxRecipe
from reslearn.errors import UserError
from reslearn.localize.crops import training_crops
from reslearn.localize.net import HIDDEN, LocalizerSettings
from reslearn.localize.views import of_one_kind
from reslearn.training import recipe as common
from reslearn.training.recipe import Chosen, Cited, Section
from reslearn.weights.store import read_card

if TYPE_CHECKING:
    from reslearn.data.boxes.annotated import AnnotatedSet

SIZE = 224  # px
FITTED_TO = 1000  # maximum number of crops to fit the anchors to
COUNT = 9  # anchors per position (Faster R-CNN, 3.1.1)
Pair = tuple[float, float]


class CropData(common.Data, frozen=True):
    """Validation images and training crops."""

    size: int = Field(default=SIZE, ge=32, le=1024, description="side of the square input, px")
    crop_ratio: float = Field(
        default=0.875, gt=0, le=1, description="one-crop evaluation scales the shorter side to size / crop_ratio first"
    )
    jitter: tuple[int, int] = Field(default=(256, 480), description="range that the shorter side is scaled to before cropping, px")
    workers: int = Field(default=2, ge=0, le=64, description="threads that prepare batches ahead of time")

    @model_validator(mode="after")
    def _ordered(self) -> "CropData":
        if not self.size <= self.jitter[0] <= self.jitter[1]:
            raise ValueError("jitter must be two sizes in px, size <= low <= high")
        return self


class LocalizerOptions(Section, frozen=True):
    """A localizer's settings besides its network (see localize/net.py)."""

    count: int | None = Field(default=None, ge=1, le=32, description="number of anchors to fit to the training crops (9)")
    anchors: tuple[Pair, ...] | None = Field(
        default=None, min_length=1, description="width and height of each anchor, px; by default fitted"
    )
    hidden: int = Field(default=HIDDEN, ge=1, description="channels of the 3x3 layer before scores and boxes (Faster R-CNN, 3.1)")
    iou: Pair = Field(
        default=(0.3, 0.5), description="IoU below which an anchor is a negative example, and from which it is a positive one"
    )
    proposals: int | None = Field(
        default=None, ge=1, le=2000, description="boxes per image that the second stage scores again (stage regions; 200)"
    )

    @model_validator(mode="after")
    def _overlaps(self) -> "LocalizerOptions":
        if not 0 < self.iou[0] <= self.iou[1] <= 1:
            raise ValueError("iou must be two overlaps, 0 < low <= high <= 1")
        if self.count is not None and self.anchors is not None and len(self.anchors) > self.count:
            raise ValueError(f"count={self.count} is less than the number of anchors, {len(self.anchors)}: leave count out")
        return self


class RegionBatch(common.Batch, frozen=True):
    """Images per step, over all ranks; one region of each image in stage regions."""

    size: int = Field(default=256, ge=1, le=4096, description="images per step, over all ranks")


class LocalizeRecipe(BoxRecipe, frozen=True):
    """The recipe of one stage of a localizer.

    net.init: in stage "proposals", a classification model to start from (optional); in stage "regions", the localizer whose boxes
    are refined.
    """

    stage: Literal["proposals", "regions"] = Field(default="proposals", description="stage to train; regions: R-CNN on a localizer")
    data: CropData = CropData()
    batch: RegionBatch = RegionBatch()
    localizer: LocalizerOptions = LocalizerOptions()

    @model_validator(mode="after")
    def _applies(self) -> "LocalizeRecipe":
        if self.optimizer.backbone_lr != 1 and (self.net.init is None or self.stage == "regions"):
            raise ValueError("optimizer.backbone_lr applies to stage proposals, and only with net.init")
        if self.stage == "regions" and (self.net.init is None or self.localizer.proposals is None):
            raise ValueError("stage regions needs net.init (a localizer) and localizer.proposals: use recipe localize-regions")
        if self.stage == "proposals" and self.localizer.proposals is not None:
            raise ValueError("localizer.proposals applies to stage regions only")
        if self.localizer.anchors is None:
            raise ValueError('localizer.anchors is missing: set it, or start from base = "localize-default", which fits anchors')
        return self

    def settings(self) -> LocalizerSettings:
        """The settings stored in the model file."""
        return LocalizerSettings.model_validate(self.localizer.model_dump(exclude={"count"}))


def localize_default(data: "AnnotatedSet | None", net: str | None, given: Mapping[str, Any]) -> Chosen:
    """The first stage: scores and boxes per class at each position of a network's last feature map (DRL appendix C).

    Sizes, batch and examples per image are the paper's, which does not give a schedule. Anchors are fitted to the data. The default
    jitter scales with data.size.
    """
    if data is None:
        raise UserError("recipe localize-default depends on the data: give a data set as well")
    size = given.get("data.size", SIZE)
    whole = size if isinstance(size, int) else SIZE
    jitter = given.get("data.jitter", [round(256 * whole / SIZE), round(480 * whole / SIZE)])
    values = {
        "name": "localize-default",
        "net": {"name": net or "resnet18"},
        "data": {"size": size, "jitter": Cited(jitter, "DRL 3.4: [256, 480] for crops of 224")},
        "batch": {"size": Cited(256, "DRL appendix C")},
        "optimizer": {"momentum": 0.9, "weight_decay": 1e-4},
        "schedule": {"epochs": 20, "lr": 0.05, "shape": "cosine", "warmup": 0.05},
        "log": {"every": 20},
    }
    anchors, count, reasons = given.get("localizer.anchors"), given.get("localizer.count"), {}
    if anchors is not None:
        if count is not None:
            raise UserError("localizer.count does not apply with localizer.anchors: set only one of them")
        return Chosen(values | {"localizer": {"anchors": anchors}}, reasons)
    values["localizer"] = {"count": count}
    number, seed = COUNT if count is None else count, given.get("seed", 0)
    seed = seed if isinstance(seed, int) and seed >= 0 else 0  # an invalid seed is rejected with the recipe
    if isinstance(number, int) and 1 <= number <= 32 and _is_range(jitter, whole):
        anchors = _fitted(data.training, seed, whole, jitter, number)
        values["localizer"]["anchors"] = anchors
        shapes = ", ".join(f"{w:.0f} x {h:.0f}" for w, h in anchors)
        reasons["localizer.anchors"] = f"{len(anchors)} anchors of {shapes} px: fitted to the boxes of training crops"
    return Chosen(values, reasons)


def localize_regions(data: "AnnotatedSet | None", net: str | None, given: Mapping[str, Any]) -> Chosen:
    """The second stage, R-CNN: crops, scores and refines a localizer's best boxes (DRL appendix C).

    net.init is the localizer. Proposals and batch are the paper's, which does not give a schedule.
    """
    init = given.get("net.init")
    if not isinstance(init, str):
        raise UserError("recipe localize-regions refines the boxes of a localizer: give its run or model file with --init")
    card = read_card(Path(init).expanduser())
    if card.localizer is None:
        raise UserError(f"{init} is not a localizer: train one with reslearn localize train")
    if card.localizer.get("proposals") is not None:
        raise UserError(f"{init} already has a second stage: give a localizer without one")
    if given.get("localizer.count") is not None:
        raise UserError(f"localizer.count does not apply to recipe localize-regions: the anchors of {init} are used")
    view = card.preprocessing
    values = {
        "name": "localize-regions",
        "stage": "regions",
        "net": {"name": net or card.net},
        "data": {"size": view.size[0], "crop_ratio": view.crop_ratio, "jitter": (view.size[0], view.size[0])},
        "localizer": {**card.localizer, "proposals": Cited(200, "DRL appendix C")},
        "batch": {"size": Cited(256, "DRL appendix C")},
        "optimizer": {"momentum": 0.9, "weight_decay": 1e-4},
        "schedule": {"epochs": 20, "lr": 0.02, "shape": "cosine", "warmup": 0.05},
        "log": {"every": 20},
    }
    return Chosen(values, {"stage": f"the first stage, which proposes regions, is {init}"})


def _is_range(jitter: Any, size: int) -> bool:
    """Whether jitter is valid; otherwise validation of the recipe rejects it."""
    pair = isinstance(jitter, list | tuple) and len(jitter) == 2 and all(isinstance(side, int) for side in jitter)
    return pair and 32 <= size <= jitter[0] <= jitter[1]


def _fitted(data: BoxSet, seed: int, size: int, jitter: Any, count: int) -> tuple[Pair, ...]:
    """Anchor shapes fitted to the boxes of training crops in the first epoch."""
    indices = torch.linspace(0, len(data) - 1, min(len(data), FITTED_TO)).long()
    crops = training_crops(data.images, of_one_kind(data), seed, size, jitter, torch.zeros_like(indices), indices)
    shapes = suggest_anchors(np.concatenate([boxes for _, boxes in crops]), count, seed=seed)
    return tuple((round(w, 1), round(h, 1)) for w, h in shapes.tolist())


NAMED: dict[str, Callable[..., Chosen]] = {"localize-default": localize_default, "localize-regions": localize_regions}
