"""A run is a frozen recipe: every number that decides a training run, validated, in one file."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from reslearn.data.augment import Flip
from reslearn.errors import UserError, did_you_mean
from reslearn.nets import spec
from reslearn.nets.options import OPTIONS, check_options


class Section(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Named(Section):
    name: str


# Each option of a network as a key that may stay unset.
_optional: Any = {key: (kind | None, Field(None, description=option.about)) for key, (kind, option) in OPTIONS.items()}


class Net(create_model("_Options", __base__=_Named, **_optional)):
    """The network, by its name and options (see NetOptions); unset options are the network's own."""

    init: str | None = None  # a model file or run folder to start from instead of at random
    frozen: int = Field(default=0, ge=0)  # 1: its stem, and with n + 1 its first n stages too, stay as they are

    def options(self) -> dict[str, Any]:
        """Those of create() that are set."""
        return {key: value for key in OPTIONS if (value := getattr(self, key)) is not None}

    @model_validator(mode="after")
    def _known(self) -> "Net":
        row = spec(self.name)
        check_options(row, self.options())
        if self.frozen and self.init is None:
            raise ValueError("frozen keeps what init brings: give init as well")
        if self.frozen > len(row.blocks) + 1 or (self.frozen and row.build is not None):
            raise ValueError(f"frozen={self.frozen}: '{row.name}' has a stem and {len(row.blocks)} stages")
        return self


def _share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a share below 1 or a whole number of images")
    return value


HoldOut = Annotated[float, Field(ge=0), AfterValidator(_share_or_count)]


class Data(Section):
    """Which images are held out, and what the network sees of the others."""

    val: HoldOut = 0.1  # a share below 1, or a number of images; only where the set has no val split of its own
    test: HoldOut = 0.15  # likewise, for a folder that is not divided at all
    size: int | None = Field(default=None, ge=8, le=1024)  # px; None: the images' own (small images)
    crop_ratio: float = Field(default=1.0, gt=0, le=1)  # evaluation scales to size / crop_ratio, then takes the center
    normalize: Literal["channel", "pixel-mean"] = "channel"  # pixel-mean: subtracted, no division by std (DRL 4.2)
    flip: Flip = True  # mirrored by chance; "alternate": in every other epoch
    pad: int = Field(default=0, ge=0, le=64)  # px on each side, then a random crop of the image's size (small images)
    pad_with: Literal["black", "mean"] = "black"
    crop_scale: tuple[float, float] | None = None  # share of a photo's area that a random crop takes (photos)
    jitter: tuple[int, int] | None = None  # px: the shorter side is drawn from this range, then a crop of `size` (DRL 3.4; photos)
    grow: tuple[int, int] | None = None  # px: training views grow from one size to the other as training goes on (photos)
    color: float | None = Field(default=None, gt=0, le=1)  # deviation of PCA color noise (Krizhevsky et al., 2012; photos)
    on_bad: Literal["error", "skip"] = "error"  # a file that is no image
    workers: int = Field(default=0, ge=0, le=64)  # threads that prepare batches ahead of time
    cache: Literal["auto", "on", "off"] = "auto"  # shrunk photos in the cache folder; "auto": of small sets

    @model_validator(mode="after")
    def _ordered(self) -> "Data":
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


class Batch(Section):
    """Images a step, of all ranks together.

    micro: the forward and backward passes take this many at once on each rank, and so does batch normalization; the gradients of
    a step are accumulated. sync_bn: batch normalization takes those of all ranks together.
    """

    size: int = Field(default=128, ge=2, le=65536)
    micro: int | None = Field(default=None, ge=2)
    sync_bn: bool | None = None

    @model_validator(mode="after")
    def _divides(self) -> "Batch":
        if self.micro is not None and self.size % self.micro:
            raise ValueError(f"size must be a multiple of micro ({self.size} is not one of {self.micro})")
        return self


class Optimizer(Section):
    """SGD with momentum. style: "pytorch" is v = m v + g, w -= lr v; "caffe" is v = m v + lr g, w -= v.

    The two differ for about ten steps after each change of lr. Every parameter is decayed, as in the paper, unless `undecayed`.
    """

    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    nesterov: bool = False
    style: Literal["pytorch", "caffe"] = "pytorch"
    undecayed: Literal["norm-and-bias"] | None = None  # no decay of gammas, betas and biases (He et al., 2019, section 3.1)
    backbone_lr: float = Field(default=1.0, gt=0, le=1)  # share of lr for all but the last layer, when fine-tuning (net.init)

    @model_validator(mode="after")
    def _nesterov(self) -> "Optimizer":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


class Schedule(Section):
    """How long, and the learning rate as a rule of the step (see train/schedule.py)."""

    steps: int | None = Field(default=None, ge=1, le=10**9)
    epochs: float | None = Field(default=None, gt=0, le=1e6)
    lr: float = Field(default=0.1, gt=0)
    lr_batch: int | None = Field(default=None, ge=1)  # lr is for batches of this size, and in proportion (Goyal et al., 2017)
    shape: Literal["steps", "cosine", "one-cycle", "plateau"] = "steps"
    drops: tuple[int | float, ...] = ()  # "steps": the steps, or shares of the run, after which lr is divided by 10
    patience: int | None = Field(default=None, ge=1)  # "plateau": lr / 10 after so many evaluations without a lower error; 5
    warmup: float = Field(default=0, ge=0)  # a share of the run below 1, or a number of steps, of linear rise
    warmup_lr: float | None = Field(default=None, gt=0)  # this lr until the training error is below warmup_until (DRL 4.2)
    warmup_until: float | None = Field(default=None, gt=0, lt=100)  # percent; 80 unless given

    @model_validator(mode="after")
    def _one_length(self) -> "Schedule":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        share = all(0 < d < 1 for d in self.drops)
        if list(self.drops) != sorted(set(self.drops)) or not (share or all(d >= 1 and d == int(d) for d in self.drops)):
            raise ValueError("drops must be rising numbers of steps, or rising shares of the run below 1")
        if self.patience is not None and self.shape != "plateau":
            raise ValueError(f"patience applies to shape 'plateau', not to '{self.shape}'")
        if self.drops and self.shape != "steps":
            raise ValueError(f"drops applies to shape 'steps', not to '{self.shape}'")
        if self.warmup and self.warmup_lr is not None:
            raise ValueError("give warmup or warmup_lr, not both")
        if self.warmup_until is not None and self.warmup_lr is None:
            raise ValueError("warmup_until applies with warmup_lr")
        return self

    def total(self, images: int, batch: int) -> int:
        """Steps of the whole run. An epoch is images / batch steps."""
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * images / batch))


class Loss(Section):
    """Cross-entropy. class_weights "auto": each class by images / (classes x images of the class)."""

    label_smoothing: float = Field(default=0, ge=0, lt=1)
    class_weights: Literal["none", "auto"] = "none"


class Every(Section):
    """How often, in steps; None: once an epoch."""

    every: int | None = Field(default=None, ge=1)


class Evaluate(Every):
    """flip: the mean of the logits of each image and its mirror, as AlexNet's tests average views (Krizhevsky et al., 2012)."""

    flip: bool = False


class Log(Section):
    """A line of metrics.jsonl every so many steps; tensorboard: the same numbers for TensorBoard."""

    every: int = Field(default=50, ge=1)
    tensorboard: bool = False


class Common(Section):
    """What every run has, whatever it is trained to do."""

    name: str = "custom"
    seed: int = Field(default=0, ge=0, lt=2**31)
    net: Net
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of an average of the weights, used for evaluation
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint: Every = Every()
    log: Log = Log()


class Recipe(Common):
    """Everything that decides a run. The same recipe, data, seed and machine give the same weights, bit for bit."""

    data: Data = Data()
    batch: Batch = Batch()
    loss: Loss = Loss()
    precise_bn: int | None = Field(default=None, ge=1)  # batches that BN's statistics are averaged over after training (DRL 3.4)
    recompute: bool = False  # blocks are computed again in the backward pass instead of kept: less memory, more time
    step: Literal["auto", "eager", "fused", "compiled", "captured"] = "auto"  # how it is run, see training/stepper.py
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _fine_tuning(self) -> "Recipe":
        if self.optimizer.backbone_lr != 1 and self.net.init is None:
            raise ValueError("optimizer.backbone_lr applies to fine-tuning: give net.init as well")
        if self.recompute and spec(self.net.name).build is not None:
            raise ValueError(f"recompute applies to networks of blocks, which '{self.net.name}' is not")
        if self.batch.micro is not None and self.loss.class_weights == "auto":
            raise ValueError("batch.micro does not go with loss.class_weights=auto, whose mean is over a whole batch")
        return self


Chosen = tuple[dict[str, Any], dict[str, str]]
"""The values of a named recipe, and what of them was chosen from the data: a sentence, with the reason, by key."""

R = TypeVar("R", bound=Common)


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key that --set takes, dotted."""
    found = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def validate(values: dict[str, Any], where: str = "recipe", kind: type[Common] = Recipe, base: str = "default") -> Any:
    """A recipe of that kind of nested values, or UserError naming the first key that is wrong, with the nearest known one.

    base: what is named to begin with where a key is missing."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, kind, base)}") from error


def _explain(error: ValidationError, kind: type[Common], base: str) -> str:
    # A key that is not known is why another one is missing.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "extra_forbidden":
        return f"no key '{key}'{did_you_mean(key, [*keys(kind), 'base'])}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # an item of a list, the last of those that are missing
        places = [each["loc"][-1] for each in error.errors() if each["loc"][:-1] == first["loc"][:-1]]
        return f"{key}: takes {1 + max(place for place in places if isinstance(place, int))} values (not {first['input']!r})"
    if first["type"] == "missing":
        return f'no {key}: give it, or begin with a base, such as base = "{base}"'
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        listed = first.get("ctx", {}).get("expected", "")
        expected = [word.strip(" '") for word in listed.replace(" or ", ",").split(",")]
        hint = did_you_mean(str(first["input"]), expected) if isinstance(first["input"], str) else ""
        message += hint if "did you mean" in hint else ""  # else they are all listed already
    given = "" if isinstance(first["input"], dict | BaseModel) else f" (not {first['input']!r})"
    return f"{key}: {message}{given}" if key else message


def _value(text: str) -> Any:
    """A value as the command line gives it: JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also a number of thousands of digits
        return {"True": True, "False": False, "None": None, "none": "none"}.get(text, text)


def change(recipe: R, settings: Sequence[str]) -> R:
    """The recipe with `key=value` settings applied; schedule.steps and schedule.epochs, one of them, replace the recipe's."""
    values = recipe.model_dump()
    lengths = [setting for setting in settings if setting.startswith(("schedule.steps=", "schedule.epochs="))]
    if len({setting.partition("=")[0] for setting in lengths}) > 1:
        raise UserError(
            f"{' and '.join(f'--set {setting}' for setting in lengths)}: give one of them, the length in steps or in epochs"
        )
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as key=value, such as --set schedule.epochs=20")
        if key not in (known := keys(type(recipe))):
            raise UserError(f"--set {setting}: no key '{key}'{did_you_mean(key, known)}")
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[last] = _value(text)
        if key in ("schedule.steps", "schedule.epochs"):
            target["epochs" if last == "steps" else "steps"] = None
    return validate(values, " ".join(f"--set {setting}" for setting in settings) or "recipe", type(recipe))


def read_file(path: Path) -> dict[str, Any]:
    """The nested values of a recipe file (.toml or .json; a run's recipe.json too)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid {path.suffix.lstrip('.') or 'JSON'}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"]
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a recipe (a table of keys)")
    return values
