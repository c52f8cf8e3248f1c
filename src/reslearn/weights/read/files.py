"""Files of named tensors. The format is detected from the first bytes, not from the file name."""

from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.weights.read import safetensors_files, torch_files
from reslearn.weights.read.refused import Refused

# (offset, bytes at that offset, loader); the first match is used
FORMATS = (
    (0, b"PK\x03\x04", torch_files.load_zip),
    (2, torch_files.MAGIC, torch_files.load_legacy),
    (8, b"{", safetensors_files.load),
    (0, b"\x80", torch_files.refuse_pickle),
)


def read(path: Path) -> Any:
    """Loads the object in a .pth, .pt, .th or .safetensors file. Raises UserError."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
        for offset, signature, load in FORMATS:
            if head[offset:].startswith(signature):
                return load(path)
        raise Refused("is not a supported weights file: .pth, .pt, .th (PyTorch), .safetensors or .caffemodel")
    except Refused as error:
        raise UserError(f"{path} {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
