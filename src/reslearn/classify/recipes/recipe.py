"""The recipe of classification."""

from typing import Literal

from pydantic import Field, model_validator

from reslearn.data.augment import Flip
from reslearn.nets import spec
from reslearn.training import recipe as common
from reslearn.training.recipe import Every, HoldOut, Section


class ImageData(common.Data, frozen=True):
    """Splits, preprocessing and augmentation."""

    test: HoldOut = Field(default=0.15, description="test images, as a fraction below 1 or a number; only for data without splits")
    size: int | None = Field(
        default=None, ge=8, le=1024, description="side of the network's input, px; unset: that of the images (small images)"
    )
    crop_ratio: float = Field(
        default=1.0, gt=0, le=1, description="evaluation scales the shorter side to size / crop_ratio, then crops the center"
    )
    normalize: Literal["channel", "pixel-mean"] = Field(
        default="channel", description="pixel-mean: subtract the mean of each pixel, without division by std (DRL 4.2)"
    )
    flip: Flip = Field(default=True, description="random horizontal flip; alternate: every other epoch")
    pad: int = Field(default=0, ge=0, le=64, description="pad each side by this many px, then crop at random (small images)")
    pad_with: Literal["black", "mean"] = Field(default="black", description="padding color: black, or the training images' mean")
    crop_scale: tuple[float, float] | None = Field(
        default=None, description="range of the area of a random crop, as fractions of the image (photos)"
    )
    jitter: tuple[int, int] | None = Field(
        default=None, description="range of the shorter side before a random crop of `size`, px (DRL 3.4; photos)"
    )
    grow: tuple[int, int] | None = Field(
        default=None, description="training size at the start and at the end of the run, px (progressive resizing; photos)"
    )
    color: float | None = Field(
        default=None, gt=0, le=1, description="standard deviation of PCA color noise (Krizhevsky et al., 2012; photos)"
    )
    on_bad: Literal["error", "skip"] = Field(default="error", description="fail on files that are not valid images, or skip them")
    cache: Literal["auto", "on", "off"] = Field(
        default="auto", description="cache shrunk photos on disk; auto: only for small data sets (photos)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ImageData":
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be two fractions, 0 < low <= high <= 1")
        if self.pad_with == "mean" and not self.pad:
            raise ValueError("pad_with needs pad above 0")
        if self.jitter is not None and self.crop_scale is not None:
            raise ValueError("give jitter or crop_scale, not both")
        if self.jitter is not None and not (self.size or 8) <= self.jitter[0] <= self.jitter[1] <= 4096:
            raise ValueError("jitter must be two sizes in px, size <= low <= high <= 4096")
        if self.jitter is not None and self.cache == "on":
            raise ValueError("cache=on cannot be combined with jitter: cached photos have a single size")
        if self.grow is not None and (self.crop_scale is None or not 8 <= self.grow[0] <= self.grow[1] <= 1024):
            raise ValueError("grow must be two sizes in px, 8 <= from <= to <= 1024, and needs crop_scale")
        if self.grow is not None and self.normalize == "pixel-mean":
            raise ValueError("grow cannot be combined with normalize=pixel-mean, which has a single size")
        return self


class ImageBatch(common.Batch, frozen=True):
    """Batch size over all ranks, at least 2: BN needs two images."""

    size: int = Field(default=128, ge=2, le=65536, description="images per step, over all ranks")
    micro: int | None = Field(
        default=None, ge=2, description="images per forward pass and BN statistic, per rank; gradients are accumulated"
    )


class Loss(Section, frozen=True):
    """Cross-entropy."""

    label_smoothing: float = Field(default=0, ge=0, lt=1, description="label smoothing (Szegedy et al., 2016)")
    class_weights: Literal["none", "auto"] = Field(
        default="none", description="auto: weight each class by images / (classes x images of the class)"
    )


class EvaluateImages(Every, frozen=True):
    """Evaluation on the validation set."""

    flip: bool = Field(default=False, description="average the logits of each image and its mirror (Krizhevsky et al., 2012)")


class ClassifyRecipe(common.Recipe, frozen=True):
    """The recipe of a classifier."""

    data: ImageData = ImageData()
    batch: ImageBatch = ImageBatch()
    loss: Loss = Loss()
    precise_bn: int | None = Field(
        default=None, ge=1, description="number of batches to average BN statistics over after training (DRL 3.4)"
    )
    recompute: bool = Field(
        default=False, description="recompute blocks in the backward pass (activation checkpointing): less memory, more time"
    )
    evaluate: EvaluateImages = EvaluateImages()

    @model_validator(mode="after")
    def _fine_tuning(self) -> "ClassifyRecipe":
        if self.optimizer.backbone_lr != 1 and self.net.init is None:
            raise ValueError("optimizer.backbone_lr needs net.init")
        if self.recompute and spec(self.net.name).build is not None:
            raise ValueError(f"recompute does not apply to '{self.net.name}', which has no blocks")
        if self.batch.micro is not None and self.loss.class_weights == "auto":
            raise ValueError("batch.micro cannot be combined with loss.class_weights=auto, which averages over the whole batch")
        return self
