"""The images of a split through a network while it trains: every image once, each rank taking a share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reslearn.evaluation import protocols
from reslearn.evaluation.protocols import EvalSource, Predictions
from reslearn.training import ranks


class Shard:
    """Every ranks.count()-th batch of a split: what this rank evaluates. Batches are those that one rank would take."""

    def __init__(self, source: EvalSource, batch: int) -> None:
        starts = range(ranks.rank() * batch, len(source), ranks.count() * batch)
        places = [torch.arange(start, min(start + batch, len(source))) for start in starts]
        self.source, self.places = source, torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        self.labels = source.labels.cpu()[self.places]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def holes(self) -> set[int]:
        return {i for i, place in enumerate(self.places.tolist()) if place in self.source.holes}

    def eval_batch(self, start: int, stop: int) -> Tensor:
        at = int(self.places[start])
        return self.source.eval_batch(at, at + stop - start)


def single_view(
    model: nn.Module,
    source: Any,
    *,
    batch: int = 250,
    progress: Callable[[int], None] = lambda done: None,
    **how: Any,
) -> Predictions:
    """protocols.single_view, each rank seeing a part: every image once, no image twice. progress is called by all ranks alike."""
    if ranks.count() == 1:
        return protocols.single_view(model, source, batch=batch, progress=progress, **how)
    part: Any = Shard(source, batch)
    rounds, done = -(-len(source) // (batch * ranks.count())), 0

    def next_round(_: int) -> None:
        nonlocal done
        done += 1
        progress(min(done * batch * ranks.count(), len(source)))

    seen = protocols.single_view(model, part, batch=batch, progress=next_round, **how) if len(part) else None
    while done < rounds:
        next_round(0)
    own_part = None if seen is None else (seen.logits, seen.labels, part.places[seen.indices])
    parts = [found for found in ranks.gather(own_part) if found is not None]
    source.holes.update(*ranks.gather(source.holes))
    source.bad = ranks.merged(source.bad)
    logits, labels, places = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    order = places.argsort()
    return Predictions(logits[order], labels[order], places[order])
