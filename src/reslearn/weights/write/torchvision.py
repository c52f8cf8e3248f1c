"""torchvision's format: a state dict for torchvision's model of the same architecture (strict=True).

torchvision.models.googlenet needs aux_logits=False, because the auxiliary heads are used in training only.
"""

import re
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from reslearn.errors import UserError
from reslearn.files import write_atomic
from reslearn.nets import spec
from reslearn.weights.store import CARD, Card, cpu_tensors, megabytes


def torchvision_name(card: Card) -> str:
    """The name of torchvision's function for the network of the card. Raises UserError if there is none."""
    row = spec(card.net)
    if row.build is not None and row.source == "torchvision":
        return card.net.replace("-", "_")

    def unsupported(reason: str) -> UserError:
        return UserError(f"torchvision and timm have no equivalent of '{card.net}': {reason}")

    match = re.fullmatch(r"resnet(18|34|50|101|152)(-v1\.5)?", card.net)
    if not match:
        raise unsupported("they have resnet18, resnet34, resnet50-v1.5, resnet101-v1.5, resnet152-v1.5 and torchvision's baselines")
    required = {"shortcut": "B", "pool": "padded", "order": "original", "merge": "residual", "last_survival": 1.0}
    required |= {"stride_in": "3x3"} if row.block == "bottleneck" else {}
    for key, theirs in required.items():
        own = card.options.get(key, getattr(row, key, theirs))
        if own != theirs:
            hint = f"; train {card.net}-v1.5 to export it" if key == "stride_in" and key not in card.options else ""
            raise unsupported(f"{key} is {own!r}, theirs is {theirs!r}{hint}")
    return f"resnet{match[1]}"


def write(model: nn.Module, card: Card, out: Path) -> Path:
    """Writes a .pth, .pt or .safetensors file. Raises UserError for a network that torchvision does not have."""
    torchvision_name(card)
    if card.preprocessing.channels != 3:
        raise UserError(f"torchvision's networks take 3 channels, but this model takes {card.preprocessing.channels}")
    tensors = cpu_tensors(model)
    size = megabytes(tensors)
    if out.suffix == ".safetensors":
        metadata = {CARD: card.model_dump_json()}  # so that it can also be loaded here
        write_atomic(out, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata), size)
    elif out.suffix in (".pth", ".pt"):
        write_atomic(out, lambda temporary: torch.save(tensors, temporary), size)
    else:
        raise UserError(f"cannot write {out}: the torchvision format needs a name that ends in .pth, .pt or .safetensors")
    return out
