"""The end of a run, whatever it trains: the numbers of its last and its best weights, the model files and result.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from reslearn.files import write_text
from reslearn.training import ranks, runtime
from reslearn.training.loop import Loop

Seen = TypeVar("Seen")
Numbers = dict[str, Any]
"""By split: test, and what is held out."""


def conclude(
    loop: Loop,
    network: Callable[[], nn.Module],
    numbers: Callable[[nn.Module], tuple[Numbers, Seen]],
    save: Callable[[nn.Module, Path, Numbers], object],
    more: Callable[[Seen], dict[str, Any]],
) -> dict[str, Any]:
    """Test the weights, write model.safetensors, best.safetensors (where there are held-out images) and result.json.

    network: one to load the best weights into. numbers: of a model, and what was seen of it. save: writes a model's file. more:
    what the result has besides, and pictures, of what was seen of the last weights. All ranks test; the first one writes. Returns
    the result.
    """
    folder, state, p = loop.folder, loop.state, loop.state.progress
    best: Numbers | None = None
    if state.best and p.best_step != p.step:  # first: should the last weights have gone astray, the best ones are kept
        model = network()
        model.load_state_dict(state.best)
        best = numbers(model)[0]
        if ranks.first():
            save(model, folder / "best.safetensors", best)
        ranks.wait(ranks.WRITING, others=ranks.ANSWER)
    last, seen = numbers(state.evaluated)
    result: dict[str, Any] = {
        "step": p.step,
        "epochs": round(loop.epoch(), 4),
        "seconds": round(p.seconds, 1),
        "images_per_s": round(p.step * loop.recipe.batch.size / p.seconds, 2) if p.seconds else None,
        "peak_memory_mb": round(runtime.peak_memory_mb(loop.device)),
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "last": {"step": p.step, **last},
    }
    if state.best:
        result["best"] = {"step": p.best_step, **(best or last)}
    if ranks.first():
        save(state.evaluated, folder / "model.safetensors", last)
        if state.best and best is None:
            save(state.evaluated, folder / "best.safetensors", last)
        result |= more(seen)
        write_text(folder / "result.json", json.dumps(result, indent=1))
    return result
