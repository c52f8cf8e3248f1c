"""The config.json beside timm's weights: class names and preprocessing."""

from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError, explain

NAME = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in a folder, the first that exists


class _Input(BaseModel):
    input_size: tuple[int, int, int]
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_names: tuple[str, ...] | None = None


class _Config(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    architecture: str
    num_classes: int
    label_names: tuple[str, ...] | None = None
    pretrained_cfg: _Input


class TimmConfig(NamedTuple):
    """classes: None if the file has no names. notes: what could not be taken over."""

    classes: tuple[str, ...] | None
    view: Preprocessing
    notes: list[str]


def read(path: Path, net: str, classes: int, channels: int) -> TimmConfig:
    """Reads a config.json. Raises UserError if it is not timm's, or not that of weights of `net`."""
    try:
        config = _Config.model_validate_json(path.read_bytes())
        view = config.pretrained_cfg
        theirs = config.architecture.replace("_", "-"), config.num_classes, view.input_size[0]
        if theirs != (net.removesuffix("-v1.5"), classes, channels):
            described = f"{theirs[0]} with {theirs[1]} classes and {theirs[2]} channels"
            raise UserError(f"{path} is of {described}, the weights are of {net} with {classes} and {channels}")
        size = view.input_size[1], view.input_size[2]
        made = Preprocessing(channels=channels, size=size, crop_ratio=view.crop_pct, mean=view.mean, std=view.std)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["", *map(str, first["loc"])])
        raise UserError(f"{path}{where and f': {where[1:]}'}: {explain(first)}; expected the config of a timm model") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    resized = [] if view.interpolation == "bilinear" else [f"interpolation: bilinear here ({view.interpolation} in {NAME})"]
    return TimmConfig(config.label_names or view.label_names, made, resized)
