"""Export to the formats of other libraries: `reslearn export`. Each format is a module here and an entry of FORMATS."""

from pathlib import Path

from reslearn.errors import UserError, did_you_mean
from reslearn.weights.store import Card, load
from reslearn.weights.write import timm, torchvision

FORMATS = {"torchvision": torchvision.write, "timm": timm.write}
"""format -> function (model, card, path) that writes the model and returns the path."""


def export(model_path: str | Path, format: str, out: str | Path) -> Path:
    """Exports a model file or run folder to one of FORMATS and returns the path written.

    Raises UserError for an unknown format or a network that the target library does not have.
    """
    if format not in FORMATS:
        raise UserError(f"format '{format}': must be one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    model, out = load(model_path), Path(out)
    card = model.card
    assert isinstance(card, Card)
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    return FORMATS[format](model, card, out)
