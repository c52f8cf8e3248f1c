"""timm's format: a folder with config.json, model.safetensors and README.md, loaded by timm as local-dir:FOLDER."""

import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from reslearn import __version__
from reslearn.errors import UserError
from reslearn.files import write_atomic, write_text, writing
from reslearn.weights.store import Card, cpu_tensors, megabytes
from reslearn.weights.write.torchvision import torchvision_name


def timm_name(card: Card) -> str:
    """timm's name for the network, if its tensors have the same names there. Raises UserError otherwise."""
    name = torchvision_name(card)
    if not name.startswith(("resnet", "densenet")):
        raise UserError(f"timm's {name} has other layers and names: use --format torchvision")
    if card.preprocessing.pixel_mean is not None:
        raise UserError("timm supports per-channel means only, but this model has a mean image: use --format torchvision")
    return name


def timm_config(card: Card, features: int) -> dict[str, Any]:
    """The content of config.json. features: inputs of the head."""
    view, name = card.preprocessing, timm_name(card)
    size = [view.channels, *view.size]
    dense = name.startswith("densenet")
    return {
        "architecture": name,
        "num_classes": len(card.classes),
        "num_features": features,
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
    """The content of README.md."""
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
- resize (bilinear) so that the input is {view.crop_ratio:g} of the shorter side, then center crop
{numbers}
```python
import timm

model = timm.create_model("local-dir:this/folder", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""


def write(model: nn.Module, card: Card, out: Path) -> Path:
    """Writes a new folder. Raises UserError for a network that timm does not have with the same tensor names."""
    tensors = cpu_tensors(model)
    *_, head, _ = tensors.values()
    config, size = timm_config(card, head.shape[1]), megabytes(tensors)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; the timm format needs a new folder")
    with writing(out, size), tempfile.TemporaryDirectory(prefix=".timm-", dir=out.parent) as temporary:
        folder = Path(temporary) / "model"  # renamed when complete
        folder.mkdir()
        weights = folder / "model.safetensors"
        write_atomic(weights, lambda partial: safetensors.torch.save_file(tensors, partial, {"format": "pt"}), size)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "README.md", model_card(card, config["architecture"]))
        folder.rename(out)
    return out
