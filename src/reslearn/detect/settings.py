"""What a detector is, beside its network: every number of it, validated, as its model file carries it."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from reslearn.errors import UserError, did_you_mean

Kind = Literal["c4", "fpn"]
Roi = Literal["align", "pool"]
BatchNorm = Literal["frozen", "live"]

# kind -> what it takes unless told. c4: DRL appendix A and the Faster R-CNN paper, test sizes of PASCAL VOC; fpn: torchvision's.
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
    "fpn": {
        "min_size": 800,
        "max_size": 1333,
        "ranked": (2000, 1000),
        "proposals": (2000, 1000),
        "regions": 512,
        "nms": 0.5,
    },
}


class DetectorSettings(BaseModel):
    """What a recipe holds under "detector", and a detector's model file. Lengths are in px of the scaled image.

    background and anchors_inside are None where they are off, as 0 and false become, so that a recipe without them is what it was
    before they came.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind = Field(
        default="c4", description="c4: one feature map, the net's last stage on every region; fpn: a feature pyramid of all stages"
    )
    masks: bool = Field(default=False, description="predict a mask of each object as well (Mask R-CNN)")
    roi: Roi = Field(default="align", description="how the features of a region are pooled: RoIAlign, or RoI max pooling")
    roi_size: int | None = Field(default=None, ge=2, le=28, description="pixels a side that a region is pooled to (14; VGG: 7)")
    batch_norm: BatchNorm = Field(default="live", description="frozen: BN of the backbone uses its fixed statistics")
    context: bool = Field(default=False, description="add a feature of the whole image to each region's (DRL appendix B)")
    frozen: int = Field(default=0, ge=0, description="1 freezes the backbone's stem (VGG: conv1), n + 1 the first n stages too")
    anchors: tuple[float, ...] = Field(min_length=1, description="sides of the anchors, px; of fpn: one for each level")
    ratios: tuple[float, ...] = Field(default=(0.5, 1.0, 2.0), min_length=1, description="height / width of the anchors")
    min_size: int = Field(ge=16, le=4096, description="images are scaled to this shorter side, px")
    max_size: int = Field(ge=16, le=4096, description="longest side of a scaled image, px")
    ranked: tuple[int, int] = Field(description="proposals before NMS, in training and in testing; of fpn: of each level")
    proposals: tuple[int, int] = Field(description="proposals after NMS, in training and in testing")
    regions: int = Field(ge=1, description="regions of each image that the head is trained on")
    foreground: float = Field(default=0.25, gt=0, le=1, description="largest share of these regions that are of objects")
    background: float | None = Field(
        default=None, ge=0, lt=0.5, description="least IoU with an object of a region that is trained on as background (0)"
    )
    anchors_inside: bool | None = Field(default=None, description="train proposals on anchors inside the image only")
    score: float = Field(default=0.05, ge=0, lt=1, description="least score of a detection in testing")
    nms: float = Field(gt=0, le=1, description="IoU above which NMS drops the detection with the lower score in testing")
    detections: int = Field(default=100, ge=1, description="most detections of an image in testing")

    @field_validator("background", "anchors_inside")
    @classmethod
    def _off(cls, value: float | bool | None) -> float | bool | None:
        return value or None

    @model_validator(mode="after")
    def _consistent(self) -> "DetectorSettings":
        if self.kind == "fpn" and self.roi == "pool":
            raise ValueError("roi='pool' is of kind 'c4': a pyramid is pooled by RoIAlign")
        if self.kind == "fpn" and self.roi_size is not None:
            raise ValueError("roi_size is of kind 'c4': a pyramid's layers take 7 pixels a side")
        if min(self.anchors) <= 0 or min(self.ratios) <= 0:
            raise ValueError("anchors and ratios must be above 0")
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is below min_size={self.min_size}")
        if self.anchors_inside and min(self.anchors) >= self.min_size:
            raise ValueError(
                f"no anchor fits into images of min_size={self.min_size}: take smaller ones, or set detector.anchors_inside=false"
            )
        if min(*self.ranked, *self.proposals) < 1:
            raise ValueError("ranked and proposals must be at least 1")
        return self


def too_thin(settings: DetectorSettings, height: int, width: int, sides: Sequence[int] = ()) -> str | None:
    """Why an image of these pixels cannot be looked at: scaled to fit, its shorter side has no pixel left. None: it can be.

    sides: shorter sides in px of multi-scale testing, beside the detector's own.
    """
    short, long = sorted((height, width))
    longest = settings.max_size / settings.min_size
    looks = [settings.min_size, *(side for side in sides if side >= 16)]  # smaller ones are refused by detect
    if all(short * min(side / short, round(side * longest) / long) >= 1 for side in looks):
        return None
    return f"{width} x {height} px: too elongated, nothing is left of its shorter side where the longer one fits"


def make_settings(kind: str, levels: int, options: dict[str, Any]) -> DetectorSettings:
    """DetectorSettings of a kind with its defaults. levels: of a pyramid on this net. Raises UserError, naming the option."""
    if kind not in DEFAULTS:
        raise UserError(f"detector.kind='{kind}': must be one of {', '.join(map(repr, DEFAULTS))}")
    if unknown := next((key for key in options if key not in DetectorSettings.model_fields), None):
        raise UserError(f"no option '{unknown}' of a detector{did_you_mean(unknown, DetectorSettings.model_fields)}")
    pyramid = {"anchors": tuple(32.0 * 2**i for i in range(levels))} if kind == "fpn" else {}
    try:
        made = DetectorSettings(**{**DEFAULTS[kind], **pyramid, **options, "kind": kind})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["detector", *(str(part) for part in first["loc"][:1])])
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
    if kind == "fpn" and len(made.anchors) != levels:
        raise UserError(f"anchors: a pyramid on this network has {levels} levels and takes as many, not {len(made.anchors)}")
    return made
