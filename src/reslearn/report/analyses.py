"""Results of `reslearn analyze` as page sections: a plot, the findings and the command."""

import json
from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.report.elements import Bullets, PageSection, Sheet, picture

TITLES = {
    "responses": "Layer responses",
    "signal": "Forward and backward signal",
    "lesion": "Removing and reordering blocks",
    "paths": "Paths through the network",
    "landscape": "Loss landscape",
    "explain": "Where the network looks",
    "features": "Feature embeddings",
}


def read(folder: Path) -> list[PageSection]:
    """Returns the analyses in a folder, in the order of TITLES. Ignores other JSON files. Raises UserError for a damaged file."""
    results = [(path, result) for path in sorted(folder.glob("*.json")) if (result := _read(path)) is not None]
    results.sort(key=lambda item: [*TITLES].index(_kind(item[1])))
    return [_section(path, result) for path, result in results]


def _kind(result: dict[str, Any]) -> str:
    """`"explain"` of `explain-cat-1`."""
    return str(result["analysis"]).split("-")[0]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if {"analysis", "findings", "command", "models"} <= set(result) and _kind(result) in TITLES else None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not an analysis result ({type(error).__name__}: {error}); run the analysis again") from None


def _section(path: Path, result: dict[str, Any]) -> PageSection:
    plot = Sheet(picture(path.parent, f"{path.stem}.png"), ", ".join(result["models"]), "shot")
    return PageSection(TITLES[_kind(result)], [plot, Bullets(result["findings"])], after=result["command"])
