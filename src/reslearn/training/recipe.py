"""The recipe keys that all tasks share. A recipe is frozen and validated, and fully determines a run."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from reslearn.errors import UserError, did_you_mean, explain
from reslearn.html import table
from reslearn.nets import spec
from reslearn.nets.options import OPTIONS, check_options

Execution = Literal["auto", "eager", "fused", "compiled", "captured"]


class Section(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A group of keys. Unknown keys are rejected."""


class _Named(Section, frozen=True):
    name: str = Field(description="network name (see reslearn models)")
    init: str | None = Field(default=None, description="model file or run folder to start from; unset: random weights")
    frozen: int = Field(default=0, ge=0, description="1 freezes the stem, n + 1 also the first n stages (needs init)")


# Each network option as a key that may be unset.
_optional: Any = {key: (kind | None, Field(None, description=option.about)) for key, (kind, option) in OPTIONS.items()}


class Net(create_model("_Options", __base__=_Named, **_optional), frozen=True):
    """The network: its name and options (see NetOptions). Unset options take the network's own values."""

    def options(self) -> dict[str, Any]:
        """The options that are set, as arguments of create()."""
        return {key: value for key in OPTIONS if (value := getattr(self, key)) is not None}

    @model_validator(mode="after")
    def _known(self) -> "Net":
        row = spec(self.name)
        check_options(row, self.options())
        if self.frozen and self.init is None:
            raise ValueError("frozen needs init: random weights cannot be frozen")
        if self.frozen > len(row.blocks) + 1 or (self.frozen and row.build is not None):
            raise ValueError(f"frozen={self.frozen}: '{row.name}' has a stem and {len(row.blocks)} stages")
        return self


def _share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a fraction below 1 or a whole number of images")
    return value


HoldOut = Annotated[float, Field(ge=0), AfterValidator(_share_or_count)]


class Data(Section, frozen=True):
    """Validation split and data loading."""

    val: HoldOut = Field(
        default=0.1, description="validation images, as a fraction below 1 or a number; only for sets without a val split"
    )
    workers: int = Field(default=0, ge=0, le=64, description="threads that prepare batches in advance")


class Batch(Section, frozen=True):
    """Batch size over all ranks."""

    size: int = Field(default=128, ge=1, le=65536, description="images per step, over all ranks")
    micro: int | None = Field(
        default=None, ge=1, description="images per forward pass and BN statistic, per rank; gradients are accumulated"
    )
    sync_bn: bool | None = Field(default=None, description="compute BN statistics over all ranks")

    @model_validator(mode="after")
    def _divides(self) -> "Batch":
        if self.micro is not None and self.size % self.micro:
            raise ValueError(f"size must be a multiple of micro ({self.size} is not a multiple of {self.micro})")
        return self


class Optimizer(Section, frozen=True):
    """SGD with momentum. style: "pytorch" is v = m v + g, w -= lr v; "caffe" is v = m v + lr g, w -= v.

    The two differ for about ten steps after each change of lr. Weight decay applies to all parameters, as in the paper, unless
    `undecayed` is set.
    """

    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum coefficient")
    weight_decay: float = Field(default=1e-4, ge=0, description="L2 penalty: weight_decay * w is added to the gradient of w")
    nesterov: bool = Field(default=False, description="use Nesterov momentum")
    style: Literal["pytorch", "caffe"] = Field(
        default="pytorch", description="caffe: the momentum buffer includes lr, as in Caffe's SGD"
    )
    undecayed: Literal["norm-and-bias"] | None = Field(
        default=None, description="exempt BN parameters and biases from weight decay (He et al., 2019, section 3.1)"
    )
    backbone_lr: float = Field(
        default=1.0, gt=0, le=1, description="factor on lr for all but the last layer, for fine-tuning (needs net.init)"
    )

    @model_validator(mode="after")
    def _nesterov(self) -> "Optimizer":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        return self


class Schedule(Section, frozen=True):
    """Length of the run and learning rate (see training/schedule.py)."""

    steps: int | None = Field(default=None, ge=1, le=10**9, description="length in steps")
    epochs: float | None = Field(default=None, gt=0, le=1e6, description="length in epochs")
    lr: float = Field(default=0.1, gt=0, description="peak learning rate")
    lr_batch: int | None = Field(
        default=None, ge=1, description="batch size that lr is given for; lr scales linearly with batch.size (Goyal et al., 2017)"
    )
    shape: Literal["steps", "cosine", "one-cycle", "plateau"] = Field(
        default="steps", description="lr decay: at drops, cosine, linear (one-cycle), or when the validation error plateaus"
    )
    drops: tuple[int | float, ...] = Field(
        default=(), description="steps, or fractions of the run, at which lr is divided by 10 (shape steps)"
    )
    patience: int | None = Field(
        default=None, ge=1, description="evaluations without improvement before lr is divided by 10 (shape plateau; default 5)"
    )
    warmup: float = Field(default=0, ge=0, description="length of the linear warm-up: a fraction of the run below 1, or steps")
    warmup_lr: float | None = Field(
        default=None, gt=0, description="constant warm-up lr, until the training error is below warmup_until (DRL 4.2)"
    )
    warmup_until: float | None = Field(
        default=None, gt=0, lt=100, description="training error that ends the warm-up at warmup_lr, percent (default 80)"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "Schedule":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        share = all(0 < d < 1 for d in self.drops)
        if list(self.drops) != sorted(set(self.drops)) or not (share or all(d >= 1 and d == int(d) for d in self.drops)):
            raise ValueError("drops must be increasing steps, or increasing fractions of the run below 1")
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
        """Length of the run in steps. An epoch is images / batch steps."""
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * images / batch))


class Every(Section, frozen=True):
    """Evaluation on the validation set."""

    every: int | None = Field(default=None, ge=1, description="steps between evaluations; unset: one per epoch")


class CheckpointEvery(Section, frozen=True):
    """Checkpoints. One is also written at the end of the run and after a signal."""

    every: int | None = Field(default=None, ge=1, description="steps between checkpoints; unset: one per minute")


class Log(Section, frozen=True):
    """Training metrics."""

    every: int = Field(default=50, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(default=False, description="also write the metrics for TensorBoard")


class Recipe(Section, frozen=True):
    """The keys of a run of any task. The same recipe, data and machine give the same weights, bit for bit."""

    name: str = Field(default="custom", description="name of the recipe, for reports")
    seed: int = Field(default=0, ge=0, lt=2**31, description="random seed")
    net: Net
    data: Data = Data()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the exponential moving average of the weights, used for evaluation"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="precision of the forward pass; auto: bf16 if the hardware supports it, else fp32"
    )
    execution: Execution = Field(
        default="auto", description="auto, eager, fused (CPU), compiled (torch.compile) or captured (CUDA graph)"
    )
    evaluate: Every = Every()
    checkpoint: CheckpointEvery = CheckpointEvery()
    log: Log = Log()

    def _repr_html_(self) -> str:
        values = flatten(self.model_dump())
        rows = [(key, shown(values.get(key)), field.description or "") for key, field in fields(type(self))]
        return table(rows, ("key", "value", "meaning"), title=self.name)


R = TypeVar("R", bound=Recipe)
TYPES = ("bool", "int", "float", "str")  # names of the alternatives of a union in the errors of pydantic


class Cited(NamedTuple):
    """A value of a named recipe, with its source."""

    value: Any
    source: str


class Chosen(NamedTuple):
    """The values of a named recipe.

    values: nested; leaves may be Cited. reasons: why values were chosen from the data, by dotted key.
    """

    values: dict[str, Any]
    reasons: dict[str, str]

    def plain(self) -> dict[str, Any]:
        """The values without their sources."""
        return _uncited(self.values)

    def sources(self) -> dict[str, str]:
        """The sources of cited values, by dotted key."""
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
    """Yields every key that --set accepts, dotted, with its field."""
    for name, field in kind.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from fields(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def keys(kind: type[Recipe]) -> list[str]:
    """Every key that --set accepts, dotted."""
    return [key for key, _ in fields(kind)]


def validate(values: dict[str, Any], kind: type[R], where: str = "recipe", base: str = "default") -> R:
    """Returns a recipe from nested values. Raises UserError naming the first invalid key, with a suggestion.

    where: start of the error message. base: recipe to suggest if a key is missing.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, kind, base)}") from error


def _first(error: ValidationError) -> tuple[Any, str]:
    """The problem to report, and its dotted key. Unknown keys come first: a misspelled key is why another one is missing."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    return first, _key(first)


def _key(problem: Any) -> str:
    """The dotted key of a problem, without the places in lists and the alternatives of a union."""
    return ".".join(str(name) for name in problem["loc"] if not (isinstance(name, int) or name in TYPES or "[" in name))


def _explain(error: ValidationError, kind: type[Recipe], base: str) -> str:
    first, key = _first(error)
    if first["type"] == "extra_forbidden":
        return f"no key '{key}'{did_you_mean(key, [*keys(kind), 'base'])}"
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # a list that is too short
        indices = [problem["loc"][-1] for problem in error.errors() if problem["loc"][:-1] == first["loc"][:-1]]
        return f"{key}: takes {1 + max(i for i in indices if isinstance(i, int))} values (not {first['input']!r})"
    if first["type"] == "missing":
        return f'{key} is missing: set it, or start from a base recipe, such as base = "{base}"'
    alternatives = dict.fromkeys(explain(problem) for problem in error.errors() if _key(problem) == key)
    message = " or ".join([explain(first), *(text.removeprefix("must be ") for text in list(alternatives)[1:])])
    if first["type"] == "literal_error":
        expected = [word.strip(" '") for word in first.get("ctx", {}).get("expected", "").replace(" or ", ",").split(",")]
        hint = did_you_mean(str(first["input"]), expected) if isinstance(first["input"], str) else ""
        message += hint if "did you mean" in hint else ""  # otherwise pydantic's message lists them all
    value = "" if isinstance(first["input"], dict | BaseModel) else f" (not {first['input']!r})"
    return f"{key}: {message}{value}" if key else message


def merge(base: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested values; those of `override` win. schedule.steps and schedule.epochs replace each other."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
        if both and key == "schedule" and len({"steps", "epochs"} & set(value)) == 1:
            merged[key].pop("epochs" if "steps" in value else "steps", None)
    return merged


def change(recipe: R, settings: Mapping[str, Any]) -> R:
    """Returns the recipe with new values, by dotted key. Raises UserError naming the invalid setting."""
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
        _, invalid = _first(error)
        suspects = {invalid: settings[invalid]} if invalid in settings else settings
        where = " ".join(f"--set {key}={shown(value)}" for key, value in suspects.items()) or "recipe"
        raise UserError(f"{where}: {_explain(error, type(recipe), 'default')}") from error


def shown(value: Any) -> str:
    """A value in the syntax of --set."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)


def read_file(path: Path) -> dict[str, Any]:
    """Reads the nested values of a recipe file: .toml or .json, or the recipe.json of a run."""
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
        raise UserError(f"{path} does not contain a recipe (a table of keys)")
    return values
