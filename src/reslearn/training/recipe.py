"""What every recipe has, whatever the task: a run is a frozen recipe, validated, in one file."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from reslearn.errors import UserError, did_you_mean
from reslearn.nets import spec
from reslearn.nets.options import OPTIONS, check_options

Execution = Literal["auto", "eager", "fused", "compiled", "captured"]


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A table of keys. Frozen; unknown keys are rejected."""


class _Named(Section, frozen=True):
    name: str = Field(description="the network (see reslearn models)")
    init: str | None = Field(default=None, description="model file or run folder to start from; otherwise random weights")
    frozen: int = Field(default=0, ge=0, description="1 freezes the stem, n + 1 the first n stages too (needs init)")


# Each option of a network as a key that may stay unset.
_optional: Any = {key: (kind | None, Field(None, description=option.about)) for key, (kind, option) in OPTIONS.items()}


class Net(create_model("_Options", __base__=_Named, **_optional), frozen=True):
    """The network, by its name and options (see NetOptions); unset options are the network's own."""

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


class Data(Section, frozen=True):
    """Which images are held out, and what the network sees of the others."""

    val: HoldOut = Field(
        default=0.1, description="validation images: a share below 1, or a number; only for sets without a val split"
    )
    workers: int = Field(default=0, ge=0, le=64, description="threads that prepare batches ahead of time")


class Batch(Section, frozen=True):
    """Images a step, of all ranks together."""

    size: int = Field(default=128, ge=1, le=65536, description="images a step")
    micro: int | None = Field(
        default=None, ge=1, description="images per forward pass, and per BN statistic, on each rank; gradients accumulate"
    )
    sync_bn: bool | None = Field(default=None, description="normalize by the images of all ranks together")

    @model_validator(mode="after")
    def _divides(self) -> "Batch":
        if self.micro is not None and self.size % self.micro:
            raise ValueError(f"size must be a multiple of micro ({self.size} is not one of {self.micro})")
        return self


class Optimizer(Section, frozen=True):
    """SGD with momentum. style: "pytorch" is v = m v + g, w -= lr v; "caffe" is v = m v + lr g, w -= v.

    The two differ for about ten steps after each change of lr. Weight decay applies to every parameter, as in the paper, unless
    `undecayed` is set.
    """

    momentum: float = Field(default=0.9, ge=0, lt=1, description="share of the momentum buffer that a step keeps")
    weight_decay: float = Field(default=1e-4, ge=0, description="L2 penalty: this times the weight is added to its gradient")
    nesterov: bool = Field(default=False, description="Nesterov's momentum")
    style: Literal["pytorch", "caffe"] = Field(
        default="pytorch", description="caffe: the momentum buffer contains lr, as in Caffe's SGD"
    )
    undecayed: Literal["norm-and-bias"] | None = Field(
        default=None, description="no decay of gammas, betas and biases (He et al., 2019, section 3.1)"
    )
    backbone_lr: float = Field(
        default=1.0, gt=0, le=1, description="share of lr for all but the last layer, when fine-tuning (net.init)"
    )

    @model_validator(mode="after")
    def _nesterov(self) -> "Optimizer":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


class Schedule(Section, frozen=True):
    """How long, and the learning rate as a rule of the step (see training/schedule.py)."""

    steps: int | None = Field(default=None, ge=1, le=10**9, description="length in steps")
    epochs: float | None = Field(default=None, gt=0, le=1e6, description="length in epochs")
    lr: float = Field(default=0.1, gt=0, description="highest learning rate")
    lr_batch: int | None = Field(
        default=None, ge=1, description="lr is for batches of this size, and scales with batch.size (Goyal et al., 2017)"
    )
    shape: Literal["steps", "cosine", "one-cycle", "plateau"] = Field(
        default="steps", description="how lr falls: at drops, along a cosine, along a line, or when the validation error stalls"
    )
    drops: tuple[int | float, ...] = Field(
        default=(), description="steps, or shares of the run, after which lr is divided by 10 (shape steps)"
    )
    patience: int | None = Field(
        default=None, ge=1, description="evaluations without a lower error before lr is divided by 10 (shape plateau; 5)"
    )
    warmup: float = Field(default=0, ge=0, description="linear warm-up: a share of the run below 1, or a number of steps")
    warmup_lr: float | None = Field(
        default=None, gt=0, description="constant warm-up lr until the training error is below warmup_until (DRL 4.2)"
    )
    warmup_until: float | None = Field(default=None, gt=0, lt=100, description="training error, percent (80)")

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


class Every(Section, frozen=True):
    """How often something happens."""

    every: int | None = Field(default=None, ge=1, description="steps between two; otherwise once an epoch")


class CheckpointEvery(Section, frozen=True):
    """When the run's state is saved; always at its end and after a signal, too."""

    every: int | None = Field(default=None, ge=1, description="steps between two; otherwise once a minute")


class Log(Section, frozen=True):
    """Lines of metrics.jsonl, and the same numbers for TensorBoard."""

    every: int = Field(default=50, ge=1, description="steps between two lines of metrics.jsonl")
    tensorboard: bool = Field(default=False, description="write the same numbers for TensorBoard")


class Recipe(Section, frozen=True):
    """What decides a run of any task. The same recipe, data, seed and machine give the same weights, bit for bit."""

    name: str = Field(default="custom", description="the recipe's name, in reports")
    seed: int = Field(default=0, ge=0, lt=2**31, description="random seed")
    net: Net
    data: Data = Data()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    ema: float | None = Field(default=None, gt=0, lt=1, description="decay of an average of the weights, used for evaluation")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the forward pass in training; auto: bf16 where the hardware computes in it, else fp32"
    )
    execution: Execution = Field(default="auto", description="how a step is executed (see training/stepper.py)")
    evaluate: Every = Every()
    checkpoint: CheckpointEvery = CheckpointEvery()
    log: Log = Log()


R = TypeVar("R", bound=Recipe)


class Cited(NamedTuple):
    """A value of a named recipe with where it comes from."""

    value: Any
    source: str


class Chosen(NamedTuple):
    """What a named recipe says. values: nested, leaves may be Cited. reasons: for values that were chosen from the data, a
    sentence with the reason, by dotted key."""

    values: dict[str, Any]
    reasons: dict[str, str]

    def plain(self) -> dict[str, Any]:
        """The values without their sources."""
        return _uncited(self.values)

    def sources(self) -> dict[str, str]:
        """Where values come from, by dotted key."""
        return {key: value.source for key, value in flatten(self.values).items() if isinstance(value, Cited)}


def _uncited(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _uncited(value) if isinstance(value, dict) else value.value if isinstance(value, Cited) else value
        for key, value in values.items()
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def fields(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that --set takes, dotted, with what is known of it."""
    for name, field in kind.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from fields(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def keys(kind: type[Recipe]) -> list[str]:
    """Every key that --set takes, dotted."""
    return [key for key, _ in fields(kind)]


def validate(values: dict[str, Any], kind: type[R], where: str = "recipe", base: str = "default") -> R:
    """A recipe of nested values, or UserError naming the first key that is wrong, with the nearest known one.

    base: the named recipe to suggest where a key is missing.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, kind, base)}") from error


def _first(error: ValidationError) -> tuple[Any, str]:
    """The problem to report and its dotted key. A key that is not known is why another one is missing."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return first, ".".join(str(part) for part in first["loc"] if not isinstance(part, int))


def _explain(error: ValidationError, kind: type[Recipe], base: str) -> str:
    first, key = _first(error)
    if first["type"] == "extra_forbidden":
        return f"no key '{key}'{did_you_mean(key, [*keys(kind), 'base'])}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # an item of a list, the last of those that are missing
        places = [problem["loc"][-1] for problem in error.errors() if problem["loc"][:-1] == first["loc"][:-1]]
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


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values of `over` on top of those of `base`; schedule.steps and schedule.epochs replace each other."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
        if both and key == "schedule" and len({"steps", "epochs"} & set(value)) == 1:
            merged[key].pop("epochs" if "steps" in value else "steps", None)
    return merged


def change(recipe: R, settings: Mapping[str, Any]) -> R:
    """The recipe with other values, by dotted key. Raises UserError naming what is wrong."""
    values = recipe.model_dump()
    for key, value in settings.items():
        *sections, last = key.split(".")
        target = values
        for section in sections:
            target = target[section]
        target[last] = value
        if key in ("schedule.steps", "schedule.epochs"):
            target["epochs" if last == "steps" else "steps"] = None
    try:
        return type(recipe).model_validate(values)
    except ValidationError as error:
        _, wrong = _first(error)
        named = {wrong: settings[wrong]} if wrong in settings else settings
        where = " ".join(f"--set {key}={shown(value)}" for key, value in named.items()) or "recipe"
        raise UserError(f"{where}: {_explain(error, type(recipe), 'default')}") from error


def shown(value: Any) -> str:
    """A value as --set takes it and as recipes are printed."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


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
