"""The training loop: steps, logging, evaluation and checkpoints."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NoReturn

import torch

from reslearn.data.images.stream import ahead
from reslearn.data.sampling import checksum
from reslearn.device import pick_precision
from reslearn.errors import Diverged, Interrupted
from reslearn.files import fsync_file, write_text, writing
from reslearn.training import checkpoint, ranks, runtime
from reslearn.training.board import Board
from reslearn.training.optimizer import set_lr
from reslearn.training.recipe import Recipe
from reslearn.training.schedule import lr
from reslearn.training.state import State
from reslearn.training.step import NonFinite
from reslearn.training.stepper import CapturedForward, DeviceStepper, StepBatch, Stepper
from reslearn.training.task import EvaluationOptions, Job

WARMUP_UNTIL = 80  # training error that ends a warm-up at warmup_lr, percent (DRL 4.2)
WARMUP_WINDOW = 100  # steps over which that error is measured
PATIENCE = 5  # evaluations without a lower error until lr is divided by 10
CHECKPOINT_SECONDS = 60  # time between checkpoints if checkpoint.every is unset


class Loop:
    """Trains a run from its current step to the end. Everything is a function of (recipe, data, step)."""

    def __init__(self, job: Job[Any, Any, Any], state: State, stepper: Stepper) -> None:
        self.job, self.state, self.stepper = job, state, stepper
        self.recipe: Recipe = job.recipe
        self.display, self.folder = job.display, job.folder
        self.images, self.total = len(job.sources.train), state.phases[-1].end
        self.stepper.restart()
        self.forward = CapturedForward(state.evaluated) if isinstance(stepper, DeviceStepper) else None
        self.metrics = self.folder / "metrics.jsonl"
        self.board = Board(self.folder, state.progress.step) if self.recipe.log.tensorboard and ranks.first() else None
        self.seed_rank = ranks.seed_rank(state.model)
        self.stream = 0  # checksum of this rank's images since the last collection
        self.interval_images, self.interval_seconds = 0, 0.0
        self.saved_at = time.monotonic()

    def steps(self, stop: runtime.Stop) -> Iterator[None]:
        """Train to the end; each iteration is one step. After a signal, save a checkpoint and raise Interrupted."""
        p = self.state.progress
        self._truncate_metrics()
        self.state.model.train()
        for module in self.state.frozen:
            module.eval()
        self.display.progress("training", p.step, self.total)
        workers = self.recipe.data.workers
        stuck = getattr(self.job.sources.train, "stuck", lambda: "")
        try:
            with closing(ahead(self.stepper.prepare, range(p.step, self.total), workers, stuck)) as batches:
                while True:
                    if self._evaluation_due():
                        self._evaluate(stop)
                    if self._checkpoint_due():
                        self.save()
                    if p.step == self.total:
                        return
                    stop.check()
                    started = time.perf_counter()
                    self._step(next(batches))
                    if due := self._log_due():
                        self._collect()
                    self._count(time.perf_counter() - started)
                    if due:
                        self._log()
                    yield
        except Interrupted:
            self.save()
            raise
        finally:
            if self.board is not None:
                self.board.close()

    def epoch(self) -> float:
        """The current epoch, fractional."""
        return self.state.progress.step * self.recipe.batch.size / self.images

    def _step(self, batch: StepBatch) -> None:
        p, recipe = self.state.progress, self.recipe
        step, total = self.state.phase_step
        p.lr = lr(recipe.schedule, step, total, p.warmup_ended, batch=recipe.batch.size, dropped=p.dropped)
        set_lr(self.state.optimizer, p.lr, recipe.optimizer.style)
        runtime.seed_step(recipe.seed, p.step, self.seed_rank)
        try:
            self.stepper(batch)
        except NonFinite as error:
            self._raise_diverged(error)
        own, size = ranks.own(recipe.batch.size), recipe.batch.size
        self.stream += checksum(p.step * size + own.start, batch.epochs[own], batch.indices[own])
        p.step += 1
        p.seen += size
        p.warmup_seen += size
        self._end_warmup()
        if p.step == self.state.phases[self.state.phase - 1].end < self.total:
            self.state.enter(self.state.phase + 1)  # a checkpoint of this step must contain the state of the next phase

    def _collect(self) -> None:
        p = self.state.progress
        try:
            self.stepper.collect()
        except NonFinite as error:
            self._raise_diverged(error)
        p.stream, self.stream = (p.stream + int(ranks.total(torch.tensor(self.stream)))) % 2**32, 0

    def _end_warmup(self) -> None:
        """End the warm-up at warmup_lr once the measured training error is below warmup_until (DRL 4.2)."""
        p, schedule = self.state.progress, self.recipe.schedule
        if schedule.warmup_lr is None or p.warmup_ended is not None:
            return
        if p.step % WARMUP_WINDOW == 0:
            self._collect()
            if 100 * p.warmup_wrong / p.warmup_seen < (schedule.warmup_until or WARMUP_UNTIL):  # percent
                p.warmup_ended = p.step
            p.warmup_wrong = p.warmup_seen = 0
            self.stepper.restart()

    def _raise_diverged(self, error: NonFinite) -> NoReturn:
        p = self.state.progress
        step = p.step if error.step is None else error.step
        names = [self.job.sources.train.names[int(i)] for i in self.stepper.prepare(step).indices]
        if ranks.first():
            write_text(self.folder / "nonfinite.json", json.dumps({"step": step + 1, "lr": p.lr, "batch": names}, indent=1))
        saved = checkpoint.find(self.folder / "checkpoints")
        last = f"the last checkpoint is {saved[-1].name}" if saved else "there is no checkpoint yet"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise Diverged(
            f"step {step + 1}: {error}; the weights were not updated, and {last}; batch: {', '.join(names[:3])}{more}, "
            f"all listed in {self.folder / 'nonfinite.json'}; start a new run with a lower schedule.lr (now {p.lr:g})"
        ) from error

    def _count(self, seconds: float) -> None:
        self.interval_images += self.recipe.batch.size
        self.interval_seconds += seconds
        self.state.progress.seconds += seconds
        speed = self.interval_images / self.interval_seconds
        self.display.progress("training", self.state.progress.step, self.total, f"{speed:,.0f} images/s")

    def _write(self, line: dict[str, Any]) -> None:
        if not ranks.first():
            return
        with writing(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.state.progress.metrics_bytes = self.metrics.stat().st_size
        if self.board is not None:
            self.board.write(line)

    def _truncate_metrics(self) -> None:
        """Remove the lines after the checkpoint: those steps are repeated."""
        if not ranks.first():
            return
        with writing(self.metrics), self.metrics.open("a") as file:
            size = file.tell()
            if size < self.state.progress.metrics_bytes:
                self.display.say(f"note     {self.metrics} is shorter than at the checkpoint: curves in the report will have a gap")
            file.truncate(min(size, self.state.progress.metrics_bytes))

    def _log_due(self) -> bool:
        p = self.state.progress
        return p.step % self.recipe.log.every == 0 or any(p.step == phase.end for phase in self.state.phases)

    def _log(self) -> None:
        p = self.state.progress
        line = {
            "event": "train",
            "step": p.step,
            "epoch": round(self.epoch(), 4),
            "lr": p.lr,
            "loss": p.loss / p.seen,
            **self._parts(),
            "grad_norm": self.stepper.grad_norm,
            "stream": f"{p.stream:08x}",
        }
        speed = self.interval_images / self.interval_seconds if self.interval_seconds else 0.0
        self._write(line | {"time": {"seconds": round(p.seconds, 3), "images_per_s": round(speed, 1)}})
        self.display.train(line, self.total, speed)
        p.loss, p.losses, p.wrong, p.seen = 0.0, {}, None, 0
        self.stepper.restart()
        self.interval_images, self.interval_seconds = 0, 0.0

    def _parts(self) -> dict[str, Any]:
        """The entries of a training line that only some tasks have: phase, training error in percent, losses by name."""
        p, ends = self.state.progress, [phase.end for phase in self.state.phases]
        line: dict[str, Any] = {"phase": 1 + sum(end < p.step for end in ends[:-1])} if len(ends) > 1 else {}
        if p.wrong is not None:
            line["error"] = 100 * p.wrong / p.seen
        if p.losses:
            line["losses"] = {name: total / p.seen for name, total in p.losses.items()}
        return line

    def _evaluation_due(self) -> bool:
        p, every = self.state.progress, self.recipe.evaluate.every
        if self.job.sources.val is None or p.step == 0 or p.evaluated_at == p.step:
            return False
        if not next(phase for phase in self.state.phases if p.step <= phase.end).evaluated:
            return False
        batch = self.recipe.batch.size
        new_epoch = p.step * batch // self.images > (p.step - 1) * batch // self.images
        return p.step == self.total or (new_epoch if every is None else p.step % every == 0)

    def _evaluate(self, stop: runtime.Stop) -> None:
        p, started = self.state.progress, time.perf_counter()
        self._collect()
        precision = pick_precision(self.recipe.precision, self.job.device)
        options = EvaluationOptions(precision, lambda done: stop.check(), self.forward)
        error, numbers, text, _ = self.job.task.evaluate(self.job, self.state.evaluated, self.job.sources.val, options)
        self.state.keep_best(error, numbers.get("loss", 0.0))
        self._watch_plateau(error)
        p.evaluated_at = p.step
        p.seconds += (seconds := time.perf_counter() - started)
        line = {"event": "eval", "split": "val", "step": p.step, "epoch": round(self.epoch(), 4)}
        self._write(line | numbers | {"time": {"seconds": round(seconds, 3)}})
        self.display.evaluation(p.step, self.epoch(), text + (f"  loss {numbers['loss']:.4f}" if "loss" in numbers else ""))

    def _watch_plateau(self, error: float) -> None:
        """Divide lr by 10 when the validation error plateaus (DRL 3.4)."""
        p, schedule = self.state.progress, self.recipe.schedule
        if schedule.shape != "plateau":
            return
        if p.plateau_error is None or error < p.plateau_error:
            p.plateau_error, p.plateau_waited = error, 0
        else:
            p.plateau_waited += 1
        if p.plateau_waited == (schedule.patience or PATIENCE):
            p.plateau_waited, p.dropped = 0, p.dropped + 1

    def _checkpoint_due(self) -> bool:
        p, every = self.state.progress, self.recipe.checkpoint.every
        if p.step == 0 or p.step == self.total:
            return p.step > 0
        return p.step % every == 0 if every else bool(ranks.agree(time.monotonic() - self.saved_at > CHECKPOINT_SECONDS))

    def save(self) -> None:
        """Write a checkpoint of the current step. All ranks have the same state; the first one writes."""
        self._collect()
        if ranks.first():
            if self.metrics.exists():
                fsync_file(self.metrics)  # the checkpoint records its size
            card = self.job.task.card(self.job, self.state.evaluated, {}) if len(self.state.phases) == 1 else None
            checkpoint.save(self.folder / "checkpoints", self.state.progress.step, self.state.to_checkpoint(), card)
        ranks.wait(ranks.WRITING, others=ranks.ANSWER)  # the other ranks only wait
        self.saved_at = time.monotonic()
