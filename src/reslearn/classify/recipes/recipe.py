"""What a recipe of classification has besides what every recipe has."""

from typing import Literal

from pydantic import Field, model_validator

from reslearn.data.augment import Flip
from reslearn.nets import spec
from reslearn.training import recipe as common
from reslearn.training.recipe import Every, HoldOut, Section


class ImageData(common.Data, frozen=True):
    """Which images are held out, and what the network sees of the others."""

    test: HoldOut = Field(
        default=0.15, description="test images: a share below 1, or a number; only for a folder that is not divided at all"
    )
    size: int | None = Field(
        default=None, ge=8, le=1024, description="side of what the network sees, px; otherwise the images' own (small images)"
    )
    crop_ratio: float = Field(default=1.0, gt=0, le=1, description="evaluation scales to size / crop_ratio, then takes the center")
    normalize: Literal["channel", "pixel-mean"] = Field(
        default="channel", description="pixel-mean: the mean of each pixel is subtracted, without division by std (DRL 4.2)"
    )
    flip: Flip = Field(default=True, description="random horizontal flip; alternate: in every other epoch")
    pad: int = Field(default=0, ge=0, le=64, description="px on each side, then a random crop of the image's size (small images)")
    pad_with: Literal["black", "mean"] = Field(default="black", description="what is padded: black, or the training images' mean")
    crop_scale: tuple[float, float] | None = Field(
        default=None, description="share of a photo's area that a random crop takes (photos)"
    )
    jitter: tuple[int, int] | None = Field(
        default=None, description="range of the shorter side, px, then a random crop of `size` (DRL 3.4; photos)"
    )
    grow: tuple[int, int] | None = Field(
        default=None, description="training views grow from one size, px, to the other as training goes on (photos)"
    )
    color: float | None = Field(
        default=None, gt=0, le=1, description="standard deviation of PCA color noise (Krizhevsky et al., 2012; photos)"
    )
    on_bad: Literal["error", "skip"] = Field(default="error", description="what to do with a file that is not an image")
    cache: Literal["auto", "on", "off"] = Field(
        default="auto", description="keep shrunk photos in the cache folder; auto: of small sets"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "ImageData":
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be two shares, 0 < low <= high <= 1")
        if self.pad_with == "mean" and not self.pad:
            raise ValueError("pad_with applies with pad above 0")
        if self.jitter is not None and self.crop_scale is not None:
            raise ValueError("give jitter or crop_scale, not both")
        if self.jitter is not None and not (self.size or 8) <= self.jitter[0] <= self.jitter[1] <= 4096:
            raise ValueError("jitter must be two sizes in px, size <= low <= high <= 4096")
        if self.jitter is not None and self.cache == "on":
            raise ValueError("cache=on does not go with jitter: what is cached is shrunk to one size")
        if self.grow is not None and (self.crop_scale is None or not 8 <= self.grow[0] <= self.grow[1] <= 1024):
            raise ValueError("grow must be two sizes in px, 8 <= from <= to <= 1024, and goes with crop_scale")
        if self.grow is not None and self.normalize == "pixel-mean":
            raise ValueError("grow does not go with normalize=pixel-mean, which is for one size")
        return self


class ImageBatch(common.Batch, frozen=True):
    """Images a step, of all ranks together; batch normalization needs two at once."""

    size: int = Field(default=128, ge=2, le=65536, description="images a step")
    micro: int | None = Field(
        default=None, ge=2, description="images per forward pass, and per BN statistic, on each rank; gradients accumulate"
    )


class Loss(Section, frozen=True):
    """Cross-entropy."""

    label_smoothing: float = Field(
        default=0, ge=0, lt=1, description="share of the target that is spread over all classes (Szegedy et al., 2016)"
    )
    class_weights: Literal["none", "auto"] = Field(
        default="none", description="auto: each class by images / (classes x images of the class)"
    )


class EvaluateImages(Every, frozen=True):
    """How often the validation set is evaluated, and on which views."""

    flip: bool = Field(default=False, description="average the logits of each image and its mirror (Krizhevsky et al., 2012)")


class ClassifyRecipe(common.Recipe, frozen=True):
    """Everything that decides the training of a classifier."""

    data: ImageData = ImageData()
    batch: ImageBatch = ImageBatch()
    loss: Loss = Loss()
    precise_bn: int | None = Field(
        default=None, ge=1, description="batches over which BN statistics are averaged after training (DRL 3.4)"
    )
    recompute: bool = Field(
        default=False, description="recompute blocks in the backward pass instead of keeping them: less memory, more time"
    )
    evaluate: EvaluateImages = EvaluateImages()

    @model_validator(mode="after")
    def _fine_tuning(self) -> "ClassifyRecipe":
        if self.optimizer.backbone_lr != 1 and self.net.init is None:
            raise ValueError("optimizer.backbone_lr applies to fine-tuning: give net.init as well")
        if self.recompute and spec(self.net.name).build is not None:
            raise ValueError(f"recompute applies to networks of blocks, which '{self.net.name}' is not")
        if self.batch.micro is not None and self.loss.class_weights == "auto":
            raise ValueError("batch.micro does not go with loss.class_weights=auto, whose mean is over a whole batch")
        return self
