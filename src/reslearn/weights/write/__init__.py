"""Write a model file in another program's format: `reslearn export`. A format is a module here and a row of FORMATS."""

from pathlib import Path

from reslearn.errors import UserError, did_you_mean
from reslearn.weights.store import Card, load
from reslearn.weights.write import timm, torchvision

FORMATS = {"torchvision": torchvision.write, "timm": timm.write}
"""Each takes (model, its card, path) and returns the path of what it wrote."""


def export(model_path: str | Path, format: str, out: str | Path) -> Path:
    """Write a model file or a run's model in one of FORMATS. Returns what was written.

    Raises UserError for a format that is not known, and for a network that the other program does not have.
    """
    if format not in FORMATS:
        raise UserError(f"format '{format}': must be one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}")
    model, out = load(model_path), Path(out)
    card = model.card
    assert isinstance(card, Card)
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    return FORMATS[format](model, card, out)
