"""Safetensors files. The safetensors library checks all sizes against the size of the file."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from reslearn.weights.read.refused import Refused


def load(path: Path) -> dict[str, Tensor]:
    """Loads all tensors of a file. Raises Refused."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise Refused(f"is not a complete safetensors file ({str(error)[:120]})") from error
