"""Evaluation on a split during training, shared by all ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reslearn.evaluation import protocols
from reslearn.evaluation.protocols import EvalSource, Predictions
from reslearn.training import ranks


class Shard:
    """This rank's share of a split: every ranks.count()-th batch. The batches are those of a single rank."""

    def __init__(self, source: EvalSource, batch: int) -> None:
        starts = range(ranks.rank() * batch, len(source), ranks.count() * batch)
        indices = [torch.arange(start, min(start + batch, len(source))) for start in starts]
        self.source, self.indices = source, torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)
        self.labels = source.labels.cpu()[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def holes(self) -> set[int]:
        return {i for i, index in enumerate(self.indices.tolist()) if index in self.source.holes}

    def eval_batch(self, start: int, stop: int) -> Tensor:
        first = int(self.indices[start])
        return self.source.eval_batch(first, first + stop - start)


def single_view(
    model: nn.Module, source: Any, *, batch: int = 250, progress: Callable[[int], None] = lambda done: None, **options: Any
) -> Predictions:
    """protocols.single_view over all ranks: each evaluates its shard, and all get all predictions, in the order of the source.

    progress is called equally often on all ranks.
    """
    if ranks.count() == 1:
        return protocols.single_view(model, source, batch=batch, progress=progress, **options)
    shard: Any = Shard(source, batch)
    rounds, done = -(-len(source) // (batch * ranks.count())), 0

    def next_round(_: int) -> None:
        nonlocal done
        done += 1
        progress(min(done * batch * ranks.count(), len(source)))

    own = None
    if len(shard):
        predictions = protocols.single_view(model, shard, batch=batch, progress=next_round, **options)
        own = predictions.logits, predictions.labels, shard.indices[predictions.indices]
    while done < rounds:
        next_round(0)
    shares = [share for share in ranks.gather(own) if share is not None]
    source.holes.update(*ranks.gather(source.holes))
    source.bad = ranks.merged(source.bad)
    logits, labels, indices = (torch.cat(list(column)) for column in zip(*shares, strict=True))
    order = indices.argsort()
    return Predictions(logits[order], labels[order], indices[order])
