"""The results of `reslearn analyze` in a folder, for a page: a picture, findings, the command."""

import json
from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.report.elements import Bullets, PageSection, Sheet, picture

TITLES = {
    "responses": "How strongly layers respond",
    "signal": "The signal forward and backward",
    "lesion": "Without blocks, and with blocks exchanged",
    "paths": "The network as many paths",
    "landscape": "The loss around the weights",
    "explain": "Where the network looks",
    "features": "What the network tells apart",
}


def read(folder: Path) -> list[PageSection]:
    """The analyses in a folder, in the order of TITLES. Other JSON files are ignored. Raises UserError for a damaged file."""
    found = [(path, result) for path in sorted(folder.glob("*.json")) if (result := _read(path)) is not None]
    found.sort(key=lambda each: [*TITLES].index(_kind(each[1])))
    return [_section(result, path) for path, result in found]


def _kind(result: dict[str, Any]) -> str:
    """`"explain"` of `explain-cat-1`."""
    return str(result["analysis"]).split("-")[0]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"analysis", "findings", "command", "models"} <= set(result) and _kind(result) in TITLES else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a result of an analysis ({type(error).__name__}: {error}); run the analysis again") from None


def _section(result: dict[str, Any], path: Path) -> PageSection:
    elements = [Sheet(picture(path.parent, f"{path.stem}.png"), ", ".join(result["models"]), "shot"), Bullets(result["findings"])]
    return PageSection(TITLES[_kind(result)], elements, after=result["command"])
