"""Detectors in model files: the classification model's file, whose card has the detector's settings as well."""

from pathlib import Path

import torch
from pydantic import ValidationError

from reslearn.detect.build import assemble
from reslearn.detect.detector import Detector
from reslearn.detect.settings import DetectorSettings
from reslearn.errors import UserError
from reslearn.nets import create, spec
from reslearn.nets.options import check_options
from reslearn.weights.store import Card, load, save


def described(card: Card) -> Detector:
    """The detector of a card, without weights (on the meta device). Raises UserError."""
    if card.localizer is not None:
        raise UserError("holds a localizer, not a detector: reslearn localize eval tests it")
    if card.detector is None:
        makes = "reslearn detect train --init, or create_detector in Python, makes one of it"
        raise UserError(f"holds a classification network, not a detector: {makes}")
    try:
        settings = DetectorSettings.model_validate(card.detector)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"its card is not valid at 'detector.{'.'.join(map(str, first['loc']))}': {first['msg']}") from error
    row = spec(card.net)
    check_options(row, card.options)
    with torch.device("meta"):
        net = create(card.net, row.classes, card.preprocessing.channels, **card.options)
        return assemble(net, card.classes, settings, card.preprocessing, card)


def save_detector(model: Detector, path: str | Path, card: Card | None = None) -> Path:
    """Write a detector with its card, whole or not at all. card: its own unless given, such as one with metrics:
    `model.card.model_copy(update={"metrics": ...})`.

    Raises UserError where there is no card (a backbone that was given without one), or the file cannot be written.
    """
    if card is None and model.card is None:
        raise UserError("a detector on a network without a card cannot say what it is: create it by name or from a model file")
    return save(model, path, card, describe=described)


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> Detector:
    """The detector of a file or run folder, in evaluation mode.

    Raises UserError where the file is missing, damaged, or holds something else.
    """
    model = load(path, device, describe=described)
    assert isinstance(model, Detector)
    return model
