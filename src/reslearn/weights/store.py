"""One model, one file: safetensors whose header carries the card (net, classes, preprocessing, recipe, metrics)."""

import json
import os
import struct
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
from reslearn.errors import UserError, naming
from reslearn.files import write_atomic
from reslearn.nets import create, spec
from reslearn.nets.options import check_options

FOREIGN = (".pth", ".pt", ".th", ".caffemodel")
CARD = "reslearn"  # the key of the card in the safetensors header


class Card(BaseModel):
    """What a model file says of itself. detector, localizer: of one on `net`, its settings; a detector's classes are its kinds of
    objects."""

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
            raise ValueError("classes: a classifier has at least 2")
        return self


def check_classifies(card: Card) -> None:
    """Raise UserError where a card is of something else than a classification network."""
    if card.detector is not None:
        raise UserError("holds a detector, not a classification network: take reslearn detect, or reslearn.detect.load_detector")
    if card.localizer is not None:
        raise UserError("holds a localizer, not a classification network: reslearn localize takes it")


def described(card: Card) -> nn.Module:
    """The classification network of a card, without weights (on the meta device). Raises UserError."""
    check_classifies(card)
    check_options(spec(card.net), card.options)
    with torch.device("meta"):
        return create(card.net, len(card.classes), card.preprocessing.channels, **card.options)


def save(
    model: nn.Module, path: str | Path, card: Card | None = None, *, describe: Callable[[Card], nn.Module] = described
) -> Path:
    """Write a model with its card, whole or not at all. card: the model's own (model.card) unless given. describe: see load.

    Raises UserError where there is no card, it does not fit the model, or the file cannot be written.
    """
    card = card or getattr(model, "card", None)
    if card is None:
        raise UserError("a model file needs a card: pass save(model, path, card) or use a model that load() made")
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if difference := shape_mismatch(_shapes(describe(card)), _shapes(model)):
        raise UserError(f"the card says {card.net} with {len(card.classes)} classes, which does not fit the model: {difference}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    metadata = {CARD: card.model_dump_json()}  # one key only: their order in the file would be random
    write_atomic(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata), size)
    return path


def model_file(path: str | Path) -> Path:
    """The model file that a path means: the file itself, or a run folder's model.safetensors."""
    path = Path(path)
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            hint = " (the run has not finished; resume it)" if (path / "recipe.json").is_file() else ""
            raise UserError(f"no model.safetensors in {path}{hint}")
        return path / "model.safetensors"
    if not os.path.exists(path):  # noqa: PTH110  unlike Path's, it takes names that are too long
        raise UserError(f"no model file or run folder called {path}")
    return path


def read_card(path: str | Path) -> Card:
    """The card of a model file, or of a run folder's model. Raises UserError where there is none."""
    path = model_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, struct.error) as error:
        if path.suffix in FOREIGN:
            raise UserError(f"{path} has to be imported first: reslearn import {path} -o model.safetensors") from error
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    if CARD not in metadata:
        raise UserError(f"{path} has no reslearn card: it was not written by reslearn")
    try:
        return Card.model_validate_json(metadata[CARD])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: its card is not valid at '{where}': {first['msg']}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: its card is not JSON") from error


def shape_mismatch(expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> str | None:
    """The first difference of two state dicts in words, or None."""
    for name, shape in expected.items():
        if name not in found:
            return f"'{name}' is missing"
        if found[name] != shape:
            return f"'{name}' has shape {tuple(found[name])}, not {tuple(shape)}"
    extra = [name for name in found if name not in expected]
    return f"'{extra[0]}' does not belong to it" if extra else None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def network(name_or_path: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network by its name, or that of a run or model file, without weights (on the meta device), and its input (C, H, W)."""
    try:
        spec(name_or_path)
        is_file = False  # a network's name is that network: write ./resnet20 for a folder called so
    except UserError:
        is_file = os.path.exists(name_or_path)  # noqa: PTH110  unlike Path's, it takes names that are too long
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
    """The model of a file or run folder, in evaluation mode, with its Card as `model.card`; in float32, whatever the file has.

    describe: card -> a module of the shapes that the file must have, on the meta device; of a classification network unless given.

    Raises UserError where the file is missing, damaged, without a card, or does not fit the network its card names.
    """
    path = model_file(path)
    card = read_card(path)
    on = pick_device(str(device))
    with naming(path):
        model = describe(card)  # shapes are compared before anything is allocated
    expected = _shapes(model)
    with safe_open(path, "pt") as file:
        found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if difference := shape_mismatch(expected, found):
        raise UserError(f"{path} does not fit {card.net}: {difference}")
    tensors = safetensors.torch.load_file(path, device=str(on))
    for name, own in model.state_dict().items():
        if own.is_floating_point() != tensors[name].is_floating_point():
            raise UserError(f"{path} does not fit {card.net}: '{name}' is {str(tensors[name].dtype).removeprefix('torch.')}")
        tensors[name] = tensors[name].to(own.dtype)
        if not tensors[name].isfinite().all():
            raise UserError(f"{path} is damaged: '{name}' has values that are not finite")
    model.load_state_dict(tensors, assign=True)
    model.card = card  # type: ignore[assignment]
    return model.to(on).eval()
