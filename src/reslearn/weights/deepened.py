"""Deepens a model file and verifies that its outputs stay the same."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reslearn import data as datasets
from reslearn.data.images.resident import Resident
from reslearn.data.images.stream import Photos
from reslearn.nets import create
from reslearn.nets.deepen import Where, check_family, deepen
from reslearn.weights.store import Card, load, save

IMAGES, BATCH = 1024, 128  # to calibrate a plain network; the first batch also verifies the result


class Deepened(NamedTuple):
    """path: the new model. Over `images` images: difference: the largest of any logit; changed: number of changed predictions."""

    path: Path
    difference: float
    changed: int
    images: int


def _batches(card: Card, data: str | Path | None) -> list[Tensor]:
    """Normalized batches of a data set's training images, or one batch of noise without a data set."""
    if data is None:
        shape = (BATCH, card.preprocessing.channels, *card.preprocessing.size)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return [card.preprocessing.normalizer()(noise)]
    opened = datasets.open(data)
    split = opened.splits.get("train") or next(iter(opened.splits.values()))
    split = split.take(torch.linspace(0, len(split) - 1, min(len(split), IMAGES)).long().unique())
    source = Resident(split, card.preprocessing) if split.pixels is not None else Photos(split, card.preprocessing)
    return [source.eval_batch(start, start + BATCH) for start in range(0, len(source), BATCH)]


def deepen_model(path: str | Path, net: str, out: str | Path, where: Where = "spread", data: str | Path | None = None) -> Deepened:
    """Deepens the model at `path` to the network `net` (see nets.deepen) and writes it to `out`.

    data: training images to calibrate a plain network and to verify the result; optional for residual networks.
    Raises UserError if the networks are not of one family, or for a plain network without data.
    """
    model = load(path)
    card: Card = model.card  # type: ignore[assignment]
    check_family(card.net, net, card.options)
    batches = _batches(card, data)
    torch.manual_seed(0)
    deeper = create(net, len(card.classes), card.preprocessing.channels, **card.options)
    deepen(model, deeper, where, batches if data is not None else ())  # type: ignore[arg-type]
    with torch.inference_mode():
        old, new = model(batches[0]), deeper.eval()(batches[0])
    deepened = {"net": net, "recipe": {}, "data": {**card.data, "deepened_from": card.net}}
    save(deeper, out, card.model_copy(update=deepened))
    changed = int((old.argmax(1) != new.argmax(1)).sum())
    return Deepened(Path(out), (old - new).abs().max().item(), changed, len(old))
