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
    found = [(path, result) for path in sorted(folder.glob("*.json")) if (result := _read(path)) is not None]
    found.sort(key=lambda each: [*TITLES].index(_kind(each[1])))
    return [_view(result, path) for path, result in found]


def _kind(result: dict[str, Any]) -> str:
    """`"explain"` of what is called explain-cat-1, for an image."""
    return str(result["analysis"]).split("-")[0]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"analysis", "findings", "command", "models"} <= set(result) and _kind(result) in TITLES else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no result of an analysis ({type(error).__name__}: {error}); make it again") from None


def _view(result: dict[str, Any], path: Path) -> dict[str, Any]:
    return {
        "title": TITLES[_kind(result)],
        "models": ", ".join(result["models"]),
        "findings": result["findings"],
        "command": result["command"],
        "picture": png(path.parent, f"{path.stem}.png"),
    }


def png(folder: Path, name: str | None) -> str | None:
    """A PNG of a folder as a data URI; None where there is none."""
    path = folder / Path(name or "").name
    content = path.read_bytes() if path.is_file() else b""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}" if content.startswith(PNG) else None
