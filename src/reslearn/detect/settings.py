"""A detector's settings, validated, as stored in recipes and model files."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from reslearn.errors import UserError, did_you_mean, explain

# Defaults by kind. c4: DRL appendix A and the Faster R-CNN paper, with PASCAL VOC's image size; fpn: torchvision's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "c4": {
        "anchors": (128.0, 256.0, 512.0),
        "min_size": 600,
        "max_size": 1000,
        "ranked": (12000, 6000),
        "proposals": (2000, 300),
        "regions": 128,
        "nms": 0.3,
    },
    "fpn": {"min_size": 800, "max_size": 1333, "ranked": (2000, 1000), "proposals": (2000, 1000), "regions": 512, "nms": 0.5},
}


class DetectorSettings(BaseModel):
    """The section "detector" of a recipe and of a model file. Lengths are in px of the scaled image.

    background=0 and anchors_inside=false are stored as None, so that recipes without these keys keep their hash.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["c4", "fpn"] = Field(
        default="c4", description="c4: one feature map, last stage on each region; fpn: feature pyramid of all stages"
    )
    masks: bool = Field(default=False, description="also predict a mask of each object (Mask R-CNN)")
    roi: Literal["align", "pool"] = Field(default="align", description="pooling of regions: RoIAlign, or RoI max pooling")
    roi_size: int | None = Field(default=None, ge=2, le=28, description="side of a pooled region, pixels (14; VGG: 7)")
    batch_norm: Literal["frozen", "live"] = Field(default="live", description="frozen: the backbone's BN uses fixed statistics")
    context: bool = Field(default=False, description="append features of the whole image to each region (DRL appendix B)")
    frozen: int = Field(default=0, ge=0, description="1 freezes the backbone's stem (VGG: conv1), n + 1 also the first n stages")
    anchors: tuple[float, ...] = Field(min_length=1, description="sides of the anchors, px; fpn: one per level")
    ratios: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1, description="height / width of the anchors")
    min_size: int = Field(ge=16, le=4096, description="images are scaled to this shorter side, px")
    max_size: int = Field(ge=16, le=4096, description="longest side of a scaled image, px")
    ranked: tuple[int, int] = Field(description="proposals before NMS, in training and in testing; fpn: per level")
    proposals: tuple[int, int] = Field(description="proposals after NMS, in training and in testing")
    regions: int = Field(ge=1, description="regions sampled per image to train the head")
    foreground: float = Field(default=0.25, gt=0, le=1, description="largest share of sampled regions with an object")
    background: float | None = Field(
        default=None, ge=0, lt=0.5, description="lowest IoU with an object for a background region in training (0)"
    )
    anchors_inside: bool | None = Field(default=None, description="train proposals only on anchors inside the image")
    score: float = Field(default=0.05, ge=0, lt=1, description="lowest score of a detection in testing")
    nms: float = Field(gt=0, le=1, description="IoU above which NMS drops the lower-scored detection in testing")
    detections: int = Field(default=100, ge=1, description="maximum number of detections per image in testing")

    @field_validator("background", "anchors_inside")
    @classmethod
    def _off(cls, value: float | bool | None) -> float | bool | None:
        return value or None

    @model_validator(mode="after")
    def _consistent(self) -> "DetectorSettings":
        if self.kind == "fpn" and self.roi == "pool":
            raise ValueError("roi='pool' applies to kind='c4' only: fpn uses RoIAlign")
        if self.kind == "fpn" and self.roi_size is not None:
            raise ValueError("roi_size applies to kind='c4' only: fpn pools to 7 x 7 pixels")
        if min(self.anchors) <= 0 or min(self.ratios) <= 0:
            raise ValueError("anchors and ratios must be above 0")
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is below min_size={self.min_size}")
        if self.anchors_inside and min(self.anchors) >= self.min_size:
            raise ValueError(
                f"no anchor fits into images of min_size={self.min_size}: use smaller anchors, or set detector.anchors_inside=false"
            )
        if min(*self.ranked, *self.proposals) < 1:
            raise ValueError("ranked and proposals must be at least 1")
        return self


def too_thin(settings: DetectorSettings, height: int, width: int, sides: Sequence[int] = ()) -> str | None:
    """An error text if an image of this size is too elongated: scaled to max_size, its shorter side would be below 1 px. Else None.

    sides: further shorter sides, px, of multi-scale testing.
    """
    short, long = sorted((height, width))
    longest = settings.max_size / settings.min_size
    scales = [settings.min_size, *(side for side in sides if side >= 16)]  # detect rejects smaller ones
    if all(short * min(side / short, round(side * longest) / long) >= 1 for side in scales):
        return None
    return f"{width} x {height} px: too elongated: scaled to the largest size, the shorter side would be below 1 px"


def make_settings(kind: str, levels: int, options: dict[str, Any]) -> DetectorSettings:
    """DetectorSettings with the defaults of a kind. levels: of a pyramid on this network. Raises UserError, naming the option."""
    if kind not in DEFAULTS:
        raise UserError(f"detector.kind='{kind}': must be one of {', '.join(map(repr, DEFAULTS))}")
    if unknown := next((key for key in options if key not in DetectorSettings.model_fields), None):
        raise UserError(f"a detector has no option '{unknown}'{did_you_mean(unknown, DetectorSettings.model_fields)}")
    pyramid = {"anchors": tuple(32.0 * 2**i for i in range(levels))} if kind == "fpn" else {}
    try:
        settings = DetectorSettings(**{**DEFAULTS[kind], **pyramid, **options, "kind": kind})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["detector", *map(str, first["loc"][:1])])
        raise UserError(f"{key}: {explain(first)}") from error
    if kind == "fpn" and len(settings.anchors) != levels:
        raise UserError(f"anchors: a pyramid on this network needs {levels} anchors, one per level, not {len(settings.anchors)}")
    return settings
