"""Model files: safetensors with a card (network, classes, preprocessing, recipe, metrics) in the header."""

import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import nn

from reslearn import __version__
from reslearn.data.preprocess import Preprocessing
from reslearn.device import pick_device
from reslearn.errors import Notice, UserError, explain, naming
from reslearn.files import write_atomic
from reslearn.nets import create, spec
from reslearn.nets.options import check_options

FOREIGN = (".pth", ".pt", ".th", ".caffemodel")
CARD = "reslearn"  # the key of the card in the safetensors header


class Card(BaseModel):
    """Metadata of a model file. detector, localizer: settings of a detector or localizer with the backbone `net`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    net: str
    options: dict[str, Any] = Field(default_factory=dict)
    classes: tuple[str, ...] = Field(min_length=1)
    preprocessing: Preprocessing
    detector: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    localizer: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    recipe: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    made_by: str = f"reslearn {__version__}"

    @model_validator(mode="after")
    def _enough_classes(self) -> "Card":
        if self.detector is None and len(self.classes) < 2:
            raise ValueError("classes: a classifier needs at least 2")
        return self


def check_classifies(card: Card) -> None:
    """Raises UserError unless the card is that of a classification network."""
    if card.detector is not None:
        raise UserError("holds a detector, not a classification network: use reslearn detect or reslearn.detect.load_detector")
    if card.localizer is not None:
        raise UserError("holds a localizer, not a classification network: use reslearn localize")


def described(card: Card) -> nn.Module:
    """The classification network of a card on the meta device (without weights). Raises UserError."""
    check_classifies(card)
    check_options(spec(card.net), card.options)
    with torch.device("meta"):
        return create(card.net, len(card.classes), card.preprocessing.channels, **card.options)


def save(
    model: nn.Module, path: str | Path, card: Card | None = None, *, describe: Callable[[Card], nn.Module] = described
) -> Path:
    """Writes a model with its card atomically. card: default: model.card. describe: see load.

    Raises UserError if there is no card, the card does not fit the model, or the file cannot be written.
    """
    card = card or getattr(model, "card", None)
    if card is None:
        raise UserError("a model file needs a card: call save(model, path, card), or save a model from load()")
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if difference := shape_mismatch(_shapes(describe(card)), _shapes(model)):
        raise UserError(f"the card ({card.net} with {len(card.classes)} classes) does not fit the model: {difference}")
    tensors = cpu_tensors(model)
    metadata = {CARD: card.model_dump_json()}  # a single key, because safetensors writes several in random order
    write_atomic(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata), megabytes(tensors))
    return path


def cpu_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model, contiguous and on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def megabytes(tensors: dict[str, torch.Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e6


def model_file(path: str | Path) -> Path:
    """Resolves a model file or run folder to the model file; an unfinished run to its last checkpoint, with a warning."""
    path = Path(path)
    if path.is_dir():
        if (path / "model.safetensors").is_file():
            return path / "model.safetensors"
        if (weights := _weights_so_far(path)) is not None:
            kind = "best weights so far" if weights.stem == "best" else "weights"
            step = int(weights.parent.name.removeprefix("step-"))
            warnings.warn(f"{path} has not finished: using its {kind} (checkpoint of step {step:,})", Notice, stacklevel=2)
            return weights
        begun = (path / "recipe.json").is_file()
        hint = " (the run has not finished and has no weights to use yet: resume it with --resume)" if begun else ""
        raise UserError(f"no model.safetensors in {path}{hint}")
    if not os.path.exists(path):  # noqa: PTH110  unlike Path.exists, it accepts names that are too long
        raise UserError(f"no model file or run folder called {path}")
    return path


def _weights_so_far(run: Path) -> Path | None:
    """The best weights, else the last ones, in the newest checkpoint of a run; None if there is none, or it has no card."""
    for name in ("best", "model"):
        for file in sorted((run / "checkpoints").glob(f"step-*/{name}.safetensors"), reverse=True)[:1]:
            try:
                with safe_open(file, "pt") as opened:
                    usable = CARD in (opened.metadata() or {}) and opened.keys()
                if name == "model":  # it is the average that a run with ema evaluates and keeps
                    with safe_open(file.with_name("state.safetensors"), "pt") as state:
                        usable = usable and not any(key.startswith("ema.") for key in state.keys())  # noqa: SIM118
            except (SafetensorError, OSError):
                usable = True  # damaged: read_card says how
            if usable:
                return file
    return None


def read_card(path: str | Path) -> Card:
    """Reads the card of a model file or run folder. Raises UserError if there is none."""
    path = model_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, struct.error) as error:
        if path.suffix in FOREIGN:
            raise UserError(f"{path} must be imported first: reslearn import {path} -o model.safetensors") from error
        raise UserError(f"{path} is not a complete safetensors file ({error})") from error
    if CARD not in metadata:
        raise UserError(f"{path} has no reslearn card: it was not written by reslearn")
    try:
        return Card.model_validate_json(metadata[CARD])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: its card is not valid at '{key}': {explain(first)}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: its card is not valid JSON") from error


def shape_mismatch(expected: dict[str, torch.Size], actual: dict[str, torch.Size]) -> str | None:
    """Describes the first difference of two state dicts; None if there is none."""
    for name, shape in expected.items():
        if name not in actual:
            return f"'{name}' is missing"
        if actual[name] != shape:
            return f"'{name}' has shape {tuple(actual[name])}, not {tuple(shape)}"
    extra = [name for name in actual if name not in expected]
    return f"'{extra[0]}' is unexpected" if extra else None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def network(name_or_path: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The network with a name, or of a model file or run folder, on the meta device (without weights), and its input (C, H, W)."""
    try:
        spec(name_or_path)
        is_file = False  # names take precedence: ./resnet20 refers to a folder
    except UserError:
        is_file = os.path.exists(name_or_path)  # noqa: PTH110  unlike Path.exists, it accepts names that are too long
    if is_file or "/" in name_or_path or name_or_path.endswith(".safetensors"):
        card = read_card(name_or_path)
        with naming(model_file(name_or_path)):
            check_classifies(card)
        name, classes, options = card.net, len(card.classes), card.options
        size = (card.preprocessing.channels, *card.preprocessing.size)
    else:
        name, classes, options = name_or_path, None, {}
        size = (3, spec(name).size, spec(name).size)
    with torch.device("meta"):
        return create(name, classes, size[0], **options), size


def load(path: str | Path, device: torch.device | str = "cpu", *, describe: Callable[[Card], nn.Module] = described) -> nn.Module:
    """Loads the model of a file or run folder in evaluation mode and float32, with its Card as `model.card`.

    describe: builds the module of a card on the meta device; default: a classification network.

    Raises UserError if the file is missing, damaged, has no card, or does not fit the network in its card.
    """
    path = model_file(path)
    card = read_card(path)
    target = pick_device(str(device))
    with naming(path):
        model = describe(card)  # compare shapes before allocating memory
    expected = _shapes(model)
    with safe_open(path, "pt") as file:
        actual = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if difference := shape_mismatch(expected, actual):
        raise UserError(f"{path} does not fit {card.net}: {difference}")
    tensors = safetensors.torch.load_file(path, device=str(target))
    for name, own in model.state_dict().items():
        if own.is_floating_point() != tensors[name].is_floating_point():
            raise UserError(f"{path} does not fit {card.net}: '{name}' is {str(tensors[name].dtype).removeprefix('torch.')}")
        tensors[name] = tensors[name].to(own.dtype)
        if not tensors[name].isfinite().all():
            raise UserError(f"{path} is damaged: '{name}' has non-finite values")
    model.load_state_dict(tensors, assign=True)
    model.card = card  # type: ignore[assignment]
    return model.to(target).eval()
