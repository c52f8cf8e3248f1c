"""A deeper model file from a trained one, with the proof that its function is the same."""

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

IMAGES, BATCH = 1024, 128  # that measure the identities of a plain net; the first batch is the proof's


class Deepened(NamedTuple):
    """path: of the new model. difference: the largest of any logit over `images` images, in evaluation; changed: predictions."""

    path: Path
    difference: float
    changed: int
    images: int


def _batches(card: Card, data: str | Path | None) -> list[Tensor]:
    """Normalized batches of a data set's training images, or of noise where there is none."""
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
    """Write the model of `net`, deeper than the one at `path`, that does the same (see nets.deepen).

    data: whose training images measure the new layers of a plain net, and prove the outcome; residual nets need none.
    Raises UserError where the networks are of different families, or a plain one is given no data.
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
