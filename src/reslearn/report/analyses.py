"""What `reslearn analyze` has written into a folder, for a page: a picture, what was found, the command."""

import base64
import json
from pathlib import Path
from typing import Any

from reslearn.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
TITLES = {
    "responses": "How strongly layers respond",
    "signal": "The signal forward and backward",
    "lesion": "Without blocks, and with blocks exchanged",
    "paths": "The network as many paths",
    "landscape": "The loss around the weights",
    "explain": "Where the network looks",
    "features": "What the network tells apart",
}


def read(folder: Path) -> list[dict[str, Any]]:
    """The analyses in a folder in the order of TITLES: title, models (words), findings (sentences), command, picture (a data URI
    or None). Raises UserError for one that is damaged; other JSON files are left alone.
    """
    found = [(name, _read(folder / f"{name}.json")) for name in TITLES]
    return [_view(name, result, folder) for name, result in found if result is not None]


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"findings", "command", "models"} <= set(result) else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no result of an analysis ({type(error).__name__}: {error}); make it again") from None


def _view(name: str, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {
        "title": TITLES[name],
        "models": ", ".join(result["models"]),
        "findings": result["findings"],
        "command": result["command"],
        "picture": png(folder, f"{name}.png"),
    }


def png(folder: Path, name: str | None) -> str | None:
    """A PNG of a folder as a data URI; None where there is none."""
    path = folder / Path(name or "").name
    content = path.read_bytes() if path.is_file() else b""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(PNG) else None
