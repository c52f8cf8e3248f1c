"""timm's format: a folder of config.json, model.safetensors and README.md, which timm loads as local-dir:FOLDER."""

import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from reslearn import __version__
from reslearn.errors import UserError
from reslearn.files import write_atomic, write_text, writing
from reslearn.weights.store import Card
from reslearn.weights.write.torchvision import tensors_of, torchvision_name


def timm_name(card: Card) -> str:
    """timm's architecture that makes the same network with the same names. Raises UserError where there is none."""
    name = torchvision_name(card)
    if not name.startswith(("resnet", "densenet")):
        raise UserError(f"timm's {name} has other layers and names: export it for torchvision")
    if card.preprocessing.pixel_mean is not None:
        raise UserError("timm subtracts one mean a channel, and this model has a mean image: export it for torchvision")
    return name


def timm_config(card: Card) -> dict[str, Any]:
    """config.json as timm reads it from a model's folder."""
    view, name = card.preprocessing, timm_name(card)
    size = [view.channels, *view.size]
    dense = name.startswith("densenet")
    features = {"resnet18": 512, "resnet34": 512}
    features |= {"densenet121": 1024, "densenet161": 2208, "densenet169": 1664, "densenet201": 1920}
    return {
        "architecture": name,
        "num_classes": len(card.classes),
        "num_features": features.get(name, 2048),
        "global_pool": "avg",
        "model_args": {"in_chans": view.channels} if view.channels != 3 else {},
        "label_names": list(card.classes),
        "pretrained_cfg": {
            "tag": "reslearn",
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": view.crop_ratio,
            "crop_mode": "center",
            "mean": list(view.mean),
            "std": list(view.std),
            "num_classes": len(card.classes),
            "pool_size": [-(-n // 32) for n in view.size],
            "first_conv": "features.conv0" if dense else "conv1",
            "classifier": "classifier" if dense else "fc",
            "label_names": list(card.classes),
        },
    }


def model_card(card: Card, name: str) -> str:
    """README.md of a timm folder."""
    view = card.preprocessing
    numbers = "".join(f"- {key}: {value}\n" for key, value in card.metrics.items() if isinstance(value, int | float | str))
    return f"""---
tags:
- image-classification
- timm
library_name: timm
---
# {name}, {len(card.classes)} classes

Trained or imported with {card.made_by}, exported with reslearn {__version__} from the network `{card.net}`.

- input: {view.channels}x{view.size[0]}x{view.size[1]}, RGB on [0, 1], mean {list(view.mean)}, std {list(view.std)}
- images are scaled (bilinear) so that the input is {view.crop_ratio:g} of the shorter side, and the center is taken
{numbers}
```python
import timm

model = timm.create_model("local-dir:this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""


def write(model: nn.Module, card: Card, out: Path) -> Path:
    """A new folder. Raises UserError for a network that timm does not have under the same names."""
    config = timm_config(card)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; timm's format is a new folder")
    tensors = tensors_of(model)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    with writing(out, size), tempfile.TemporaryDirectory(prefix=".timm-", dir=out.parent) as temporary:
        folder = Path(temporary) / "model"  # whole or not at all
        folder.mkdir()
        weights = folder / "model.safetensors"
        write_atomic(weights, lambda partial: safetensors.torch.save_file(tensors, partial, {"format": "pt"}), size)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "README.md", model_card(card, config["architecture"]))
        folder.rename(out)
    return out
