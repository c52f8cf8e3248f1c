"""Files of named tensors. Their format is seen from their first bytes, whatever their names."""

from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.weights.read import safetensors_files, torch_files
from reslearn.weights.read.refused import Refused

# (offset, the bytes there, what loads such a file); the first row that fits counts
FORMATS = (
    (0, b"PK\x03\x04", torch_files.load_zip),
    (2, torch_files.MAGIC, torch_files.load_legacy),
    (8, b"{", safetensors_files.load),
    (0, b"\x80", torch_files.refuse_pickle),
)


def read(path: Path) -> Any:
    """What a .pth, .pt, .th or .safetensors file holds. Raises UserError."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
        for offset, mark, load in FORMATS:
            if head[offset:].startswith(mark):
                return load(path)
        raise Refused("is no weights file that reslearn reads: .pth, .pt, .th (PyTorch), .safetensors or .caffemodel")
    except Refused as why:
        raise UserError(f"{path} {why}") from why
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
