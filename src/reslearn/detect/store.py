"""Detectors in model files: the format of classification models, with the detector's settings in the card."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from reslearn.detect.build import assemble
from reslearn.detect.detector import Detector
from reslearn.detect.settings import DetectorSettings
from reslearn.errors import UserError, explain
from reslearn.nets import create, spec
from reslearn.nets.options import check_options
from reslearn.weights.store import Card, load, save

S = TypeVar("S", bound=BaseModel)


def card_settings(kind: type[S], section: str, values: dict[str, Any]) -> S:
    """The settings of a section of a card. Raises UserError, naming the first invalid key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"its card is not valid at '{section}.{'.'.join(map(str, first['loc']))}': {explain(first)}") from error


def described(card: Card) -> Detector:
    """The detector of a card on the meta device, without weights. Raises UserError for other models or invalid settings."""
    if card.localizer is not None:
        raise UserError("holds a localizer, not a detector: use reslearn localize eval")
    if card.detector is None:
        hint = "to use it as a backbone, see reslearn detect train --init, or create_detector in Python"
        raise UserError(f"holds a classification network, not a detector: {hint}")
    settings, row = card_settings(DetectorSettings, "detector", card.detector), spec(card.net)
    check_options(row, card.options)
    with torch.device("meta"):
        net = create(card.net, row.classes, card.preprocessing.channels, **card.options)
        return assemble(net, card.classes, settings, card.preprocessing, card)


def save_detector(model: Detector, path: str | Path, card: Card | None = None) -> Path:
    """Writes a detector with its card, atomically. card: replaces the model's own, for example to add metrics:
    `model.card.model_copy(update={"metrics": ...})`.

    Raises UserError if there is no card (the backbone was a module without one), or the file cannot be written.
    """
    if card is None and model.card is None:
        raise UserError("cannot save a detector whose backbone has no card: create it by name or from a model file")
    return save(model, path, card, describe=described)


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> Detector:
    """Loads the detector of a file or run folder, in evaluation mode.

    Raises UserError if the file is missing, damaged, or not a detector.
    """
    model = load(path, device, describe=described)
    assert isinstance(model, Detector)
    return model
