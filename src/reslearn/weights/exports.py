"""A model file -> torchvision's or timm's weights: `reslearn export`."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import nn

from reslearn import __version__
from reslearn.errors import UserError, did_you_mean
from reslearn.files import write_atomic, write_text, writing
from reslearn.nets import spec
from reslearn.weights.store import Card, load

Format = Literal["torchvision", "timm"]
FORMATS = ("torchvision", "timm")


def export(model_path: str | Path, format: Format | str, out: str | Path) -> Path:
    """Write a model file or a run's model for torchvision or timm.

    "torchvision": a state dict, .pth or .safetensors by out's suffix, that torchvision's function loads with strict=True
    (googlenet's with aux_logits=False: its auxiliary heads are for training only).
    "timm": a folder (config.json, model.safetensors, README.md) that timm loads. Returns what was written. Raises UserError
    for a network that they do not have.
    """
    if format not in FORMATS:
        raise UserError(f"format '{format}': must be one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    model, out = load(model_path), Path(out)
    card = model.card
    assert isinstance(card, Card)
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    return _torchvision(model, card, out) if format == "torchvision" else _timm(model, card, out)


def torchvision_name(card: Card) -> str:
    """torchvision's function that makes the same network as the card's. Raises UserError where there is none."""
    row = spec(card.net)
    if row.build is not None and row.source == "torchvision":
        return card.net.replace("-", "_")

    def refuse(why: str) -> UserError:
        return UserError(f"torchvision and timm have no network like '{card.net}': {why}")

    match = re.fullmatch(r"resnet(18|34|50|101|152)(-v1\.5)?", card.net)
    if not match:
        raise refuse("theirs are resnet18, 34, and 50, 101, 152 in the variant v1.5, and torchvision's baselines")
    usual = {"shortcut": "B", "pool": "padded", "order": "original", "merge": "residual", "last_survival": 1.0}
    usual |= {"stride_in": "3x3"} if row.block == "bottleneck" else {}
    for key, theirs in usual.items():
        own = card.options.get(key, getattr(row, key, theirs))
        if own != theirs:
            hint = f"; train {card.net}-v1.5 to export it" if key == "stride_in" and key not in card.options else ""
            raise refuse(f"its {key} is {own!r}, and theirs {theirs!r}{hint}")
    return f"resnet{match[1]}"


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _torchvision(model: nn.Module, card: Card, out: Path) -> Path:
    torchvision_name(card)
    if card.preprocessing.channels != 3:
        raise UserError(f"torchvision's networks take 3 channels, and this one {card.preprocessing.channels}")
    tensors = _tensors(model)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    if out.suffix == ".safetensors":
        write_atomic(out, lambda temporary: safetensors.torch.save_file(tensors, temporary), size)
    elif out.suffix in (".pth", ".pt"):
        write_atomic(out, lambda temporary: torch.save(tensors, temporary), size)
    else:
        raise UserError(f"cannot write {out}: for torchvision, a name that ends in .pth, .pt or .safetensors is needed")
    return out


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
    features = {
        "resnet18": 512,
        "resnet34": 512,
        "densenet121": 1024,
        "densenet161": 2208,
        "densenet169": 1664,
        "densenet201": 1920,
    }
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


def _timm(model: nn.Module, card: Card, out: Path) -> Path:
    config = timm_config(card)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists; timm's format is a new folder")
    tensors = _tensors(model)
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
