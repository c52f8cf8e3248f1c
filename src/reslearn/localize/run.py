"""A run, of either stage: begun whole or not at all, learned step by step, and gone on with bit for bit."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.images.stream import ahead
from reslearn.device import autocast, pick_device, pick_precision
from reslearn.errors import Diverged, Interrupted, UserError
from reslearn.files import write_text, writing
from reslearn.kernels.fuse import fuse, unavailable
from reslearn.localize.predict import Progress
from reslearn.localize.sets import open_to_train
from reslearn.training import checkpoint, runtime
from reslearn.training.folder import locked
from reslearn.training.recipe import Optimizer, Schedule, Section
from reslearn.training.schedule import lr
from reslearn.training.step import make_optimizer, set_lr
from reslearn.weights.store import Card

Say = Callable[[str], None]


class Plan(Section):
    """What the trainings of both stages have: images a step, seed, schedule, optimizer."""

    batch: int
    seed: int
    schedule: Schedule
    optimizer: Optimizer


class Stage(Protocol):
    """What is learned, and from what. name: the command's, train or refine. of_images: whether a batch is of whole images."""

    name: str
    of_images: bool

    @property
    def plan(self) -> Plan: ...

    def __len__(self) -> int:
        """Images of an epoch."""
        ...

    def batch(self, step: int) -> Any:
        """What a step learns from, made by worker threads: a pure function of (seed, step)."""
        ...

    def described(self, card: Card) -> nn.Module:
        """The model of a card, on the meta device."""
        ...

    def losses(self, model: nn.Module, batch: Any, on: torch.device, context: Any) -> dict[str, Tensor]:
        """By name, 0-dim; what is minimized is their sum."""
        ...

    def finish(self, model: nn.Module, folder: Path, progress: Progress, say: Say) -> dict[str, Any]:
        """Test a model and write FOLDER/model.safetensors. Returns what result.json has of it."""
        ...


def check_new(folder: Path) -> None:
    """Raise UserError where a run cannot be begun in a folder."""
    if not folder.name:
        raise UserError(f"--out {folder}: a run makes its own folder: give a new one's name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder with --out, or go on with --resume {folder}")


def facts_of(
    stage: str, data: str | Path, sets: dict[str, BoxSet], plan: Plan, chose: list[str], on: torch.device
) -> dict[str, Any]:
    """What localize.json says of a run of a stage, train or refine: all that is known before the first step, in words for its
    report, and what a resumed run goes by."""
    learned = sets["train"]
    about = {"name": Path(data).resolve().name, "classes": learned.classes, "n": {name: len(each) for name, each in sets.items()}}
    about |= {"objects": learned.counts(), "fingerprint": learned.fingerprint()}
    machine = runtime.machine(on, pick_precision("auto", on), "fused" if on.type == "cpu" and not unavailable() else "eager")
    facts: dict[str, Any] = {"command": stage, "called": runtime.command(f"reslearn.localize.{stage}()")}
    facts |= {"source": str(Path(data).resolve()), "fingerprint": about["fingerprint"], "plan": plan.model_dump(mode="json")}
    return facts | {"data": about, "machine": machine, "versions": runtime.versions(), "chose": chose}


def begin(
    folder: Path, facts: dict[str, Any], model: nn.Module, card: Card, more: Callable[[Path], object] = lambda path: None
) -> None:
    """A new run's folder, whole or not there: localize.json, what the network is before the first step, and what more(path) writes.

    So a resumed run needs nothing of what it was begun with but its images.
    """
    facts["card"] = json.loads(card.model_dump_json())
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    with writing(folder):
        try:
            partial.mkdir(parents=True)
            checkpoint.save(partial / "checkpoints", 0, checkpoint.Checkpoint(model.state_dict(), {}, {"step": 0, "log": []}, {}))
            more(partial)
            write_text(partial / "localize.json", json.dumps(facts, indent=1))
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_facts(folder: Path, command: str, plan: type[Plan]) -> dict[str, Any]:
    """What a run's localize.json says. Raises UserError where it is missing, damaged or another command's."""
    path = folder / "localize.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run of localize {command}: it has no localize.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if (other := facts.setdefault("command", "train")) != command:
            raise UserError(f"{folder} is a run of localize {other}: reslearn localize {other} --resume {folder}")
        for key in ("source", "fingerprint"):
            Path(facts[key])
        plan.model_validate(facts["plan"])
        Card.model_validate(facts["card"])
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: the run cannot be resumed") from error
    return facts


def reopened(folder: Path, facts: dict[str, Any]) -> dict[str, BoxSet]:
    """The images that a run was begun with. Raises UserError where they have changed."""
    sets = open_to_train(facts["source"])
    if sets["train"].fingerprint() != facts["fingerprint"]:
        raise UserError(f"{facts['source']} is not the data that {folder} was begun with: the run cannot be resumed")
    return sets


def go_on(folder: Path, facts: dict[str, Any], stage: Stage, device: str, say: Say) -> dict[str, Any]:
    """A run from its last checkpoint to its end; returns its result. Raises Interrupted after a signal."""
    card, on = Card.model_validate(facts["card"]), pick_device(device)
    with locked(folder), runtime.stop_on_signals() as stop, runtime.deterministic(on):
        if (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text(encoding="utf-8"))
        found = checkpoint.found(folder / "checkpoints")
        if not found:
            raise UserError(f"{folder} has no checkpoint: remove it and train again")
        saved = checkpoint.load(found[-1])
        model = stage.described(card).to_empty(device=on).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.load_state_dict(saved.model)
        if on.type == "cpu" and not unavailable():
            fuse(model)
        try:
            log, seconds = _learn(model.train(), stage, saved, folder, on, stop, say)
            _write_metrics(folder, log)  # again: a run that was killed when it had saved its last step did not
            step = log[-1]["step"] if log else 0
            result: dict[str, Any] = {"step": step, "epochs": round(step * stage.plan.batch / len(stage), 4)}
            rate = round(step * stage.plan.batch / seconds, 1) if seconds and stage.of_images else None
            result |= {"seconds": round(seconds, 1), "images_per_s": rate, "peak_memory_mb": round(runtime.peak_memory_mb(on))}
            result["losses"] = log[-1].get("losses", {}) if log else {}
            result |= stage.finish(model.eval(), folder, lambda what, done, total: stop.check(), say)
            stop.check()
        except Interrupted as signal:
            again = f"reslearn localize {stage.name} --resume {shlex.quote(str(folder))}"
            raise Interrupted(signal.number, folder, again) from None
        write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
        checkpoint.prune(folder / "checkpoints", 1)
        return result


def _write_metrics(folder: Path, log: list[dict[str, Any]]) -> None:
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in log))


def _learn(
    model: nn.Module, stage: Stage, saved: checkpoint.Checkpoint, folder: Path, on: torch.device, stop: runtime.Stop, say: Say
) -> tuple[list[dict[str, Any]], float]:
    """Every step that is left. Returns the log, and the seconds that all steps took."""
    plan = stage.plan
    total = plan.schedule.total(len(stage), plan.batch)
    every = max(1, len(stage) // plan.batch)  # steps: about an epoch
    often = max(1, every // 10)  # steps from one line of metrics.jsonl to the next
    optimizer = make_optimizer(model, plan.optimizer, plan.schedule.lr)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        if (buffer := saved.state.get(names[parameter])) is not None:
            state["momentum_buffer"].copy_(buffer)
    context = pick_precision("auto", on)
    log: list[dict[str, Any]] = list(saved.facts["log"])
    first = step = int(saved.facts["step"])
    before, began = float(saved.facts.get("seconds", 0)), time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - began

    def save() -> None:
        if step > first:
            there = {names[p]: s["momentum_buffer"] for p, s in optimizer.state.items()}
            state = checkpoint.Checkpoint(model.state_dict(), there, {"step": step, "log": log, "seconds": seconds()}, {})
            checkpoint.save(folder / "checkpoints", step, state)
            _write_metrics(folder, log)

    with closing(ahead(stage.batch, range(first, total), min(os.cpu_count() or 1, 4))) as batches:
        for batch in batches:
            try:
                stop.check()
            except Interrupted:
                save()
                raise
            runtime.seed_step(plan.seed, step)
            rate = lr(plan.schedule, step, total, batch=plan.batch)
            set_lr(optimizer, rate, plan.optimizer.style)
            optimizer.zero_grad(set_to_none=True)
            found = stage.losses(model, batch, on, autocast(context, on))
            loss = sum(found.values(), torch.zeros((), device=on))
            if not torch.isfinite(loss):  # the weights stay as they were, and the run ends
                raise Diverged(f"the loss is no longer a number at step {step + 1}: try a lower learning rate")
            loss.backward()
            optimizer.step()
            step += 1
            if step % often == 0 or step == total:
                parts = {name: round(value.item(), 6) for name, value in found.items()}
                line = {"event": "train", "step": step, "epoch": round(step * plan.batch / len(stage), 4), "lr": rate}
                log.append(line | {"loss": round(loss.item(), 6), "losses": parts})
            if step % every == 0 or step == total:
                of = {name: value.item() for name, value in found.items()}
                say(f"step {step:>6}/{total}  lr {rate:.4f}  " + "  ".join(f"{k} {v:.4f}" for k, v in of.items()))
                if step == total or step // every % max(1, total // every // 10) == 0:
                    save()
    return log, seconds()
