"""torchvision's format: a state dict that its function of the same network loads with strict=True.

GoogLeNet's needs aux_logits=False: its auxiliary heads are for training only.
"""

import re
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from reslearn.errors import UserError
from reslearn.files import write_atomic
from reslearn.nets import spec
from reslearn.weights.store import Card


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


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict, for a file."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def write(model: nn.Module, card: Card, out: Path) -> Path:
    """A .pth, .pt or .safetensors file, by the suffix of `out`. Raises UserError for a network that torchvision does not have."""
    torchvision_name(card)
    if card.preprocessing.channels != 3:
        raise UserError(f"torchvision's networks take 3 channels, and this one {card.preprocessing.channels}")
    tensors = tensors_of(model)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    if out.suffix == ".safetensors":
        write_atomic(out, lambda temporary: safetensors.torch.save_file(tensors, temporary), size)
    elif out.suffix in (".pth", ".pt"):
        write_atomic(out, lambda temporary: torch.save(tensors, temporary), size)
    else:
        raise UserError(f"cannot write {out}: for torchvision, a name that ends in .pth, .pt or .safetensors is needed")
    return out
