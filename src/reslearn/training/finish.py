"""The end of a run: final evaluation of the last and best weights, model files and result.json."""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from reslearn.files import write_text
from reslearn.training import ranks, runtime
from reslearn.training.loop import Loop
from reslearn.training.stepper import make_model
from reslearn.training.task import EvaluationOptions


def conclude(loop: Loop, stop: runtime.Stop) -> dict[str, Any]:
    """Evaluate the weights in fp32; write model.safetensors, best.safetensors (with a validation set) and result.json.

    All ranks evaluate; the first one writes. Returns the content of result.json.
    """
    job, folder, state, p = loop.job, loop.folder, loop.state, loop.state.progress
    task, best = job.task, None
    if state.best and p.best_step != p.step:  # before the last weights: if those diverged, the best ones are still saved
        model = make_model(job, fresh=False)
        task.enter(model, len(state.phases))
        model.load_state_dict(state.best)
        best, _ = _tested(loop, model, stop)
        if ranks.first():
            task.save(job, model, folder / "best.safetensors", best)
        ranks.wait(ranks.WRITING, others=ranks.ANSWER)
    last, details = _tested(loop, state.evaluated, stop)
    result: dict[str, Any] = {
        "step": p.step,
        "epochs": round(loop.epoch(), 4),
        "seconds": round(p.seconds, 1),
        "images_per_s": round(p.step * job.recipe.batch.size / p.seconds, 2) if p.seconds else None,
        "peak_memory_mb": round(runtime.peak_memory_mb(job.device)),
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "last": {"step": p.step, **last},
    }
    if state.best:
        result["best"] = {"step": p.best_step, **(best or last)}
    if ranks.first():
        task.save(job, state.evaluated, folder / "model.safetensors", last)
        if state.best and best is None:
            task.save(job, state.evaluated, folder / "best.safetensors", last)
        shown = "test" if "test" in last else next(iter(last))
        result |= task.finish(job, state.evaluated, shown, details)
        write_text(folder / "result.json", json.dumps(result, indent=1))
    return result


def _tested(loop: Loop, model: nn.Module, stop: runtime.Stop) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Evaluates a network. Returns its full numbers and Evaluation.details by split."""
    job = loop.job
    job.task.settle(job, model, stop.check)
    numbers, details = {}, {}
    for name, source in job.sources.tested().items():

        def progress(done: int, name: str = name, total: int = len(source)) -> None:
            stop.check()
            job.display.progress(f"evaluating on {name}", done, total)

        evaluation = job.task.evaluate(job, model, source, EvaluationOptions("fp32", progress, full=True))
        numbers[name], details[name] = evaluation.numbers, evaluation.details
    return numbers, details
