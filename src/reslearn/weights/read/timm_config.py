"""The config.json beside timm's weights: class names and preprocessing."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError, explain

NAME = "config.json"


class _Input(BaseModel):
    input_size: tuple[int, int, int]
    crop_pct: float = 0.875
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_names: tuple[str, ...] | None = None


class _Config(BaseModel):
    label_names: tuple[str, ...] | None = None
    pretrained_cfg: _Input


def read(weights: Path) -> tuple[tuple[str, ...] | None, Preprocessing] | None:
    """Class names (None if there are none) and preprocessing from the config.json beside a weights file; None without that file.

    Raises UserError if the file is not timm's.
    """
    path = weights.parent / NAME
    if not path.is_file():
        return None
    try:
        config = _Config.model_validate_json(path.read_bytes())
        view = config.pretrained_cfg
        channels, height, width = view.input_size
        names = config.label_names or view.label_names
        return names, Preprocessing(channels=channels, size=(height, width), crop_ratio=view.crop_pct, mean=view.mean, std=view.std)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: {f'{key}: ' if key else ''}{explain(first)}: expected timm's config (or move the file away)"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
