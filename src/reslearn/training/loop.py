"""The training loop: steps, and three consumers of them (log, evaluate, checkpoint)."""

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import torch

from reslearn.data.images.stream import ahead
from reslearn.data.sampling import checksum
from reslearn.device import autocast, pick_precision
from reslearn.errors import Diverged, Interrupted
from reslearn.evaluation.protocols import error_and_loss
from reslearn.files import fsync_file, write_text, writing
from reslearn.training import checkpoint, ranks, runtime
from reslearn.training.board import Board
from reslearn.training.display import Display
from reslearn.training.schedule import lr
from reslearn.training.state import State
from reslearn.training.step import NonFinite, make_criterion, set_lr
from reslearn.training.stepper import Batch, CapturedForward, DeviceStepper, Stepper, make_stepper

WARMUP_UNTIL = 80  # percent of training error (DRL 4.2)
PATIENCE = 5  # evaluations without a lower error that are a plateau
WARMUP_WINDOW = 100  # steps over which the training error that ends a warm-up is measured
EVAL_BATCH = (250, 1000)  # images at once in evaluation, on a CPU, on a GPU
EVAL_PIXELS = 1 << 21  # on a CPU; of photos few at once, so that no rank waits long for another's
CHECKPOINT_SECONDS = 60  # where the recipe gives no number of steps


class Loop:
    """One run from its present step to its end. Everything that happens is a function of (recipe, data, step)."""

    def __init__(
        self,
        folder: Path,
        recipe: Any,
        sources: Any,
        state: State,
        device: torch.device,
        mode: str,
        display: Display,
    ) -> None:
        self.folder, self.recipe, self.sources, self.state, self.display = folder, recipe, sources, state, display
        train = sources.train
        self.images = len(train)
        self.total = recipe.schedule.total(self.images, recipe.batch.size)
        self.precision = pick_precision(recipe.precision, device)
        self.device = device
        self.stepper = self.make_stepper(mode)
        self.stepper.restart(state.progress)
        self.forward = CapturedForward(state.evaluated) if isinstance(self.stepper, DeviceStepper) else None
        self.metrics = folder / "metrics.jsonl"
        self.board = Board(folder, state.progress.step) if recipe.log.tensorboard and ranks.first() else None
        self.draws = ranks.draws(state.model)
        self.stream = 0  # checksum of this rank's images since it was last added up
        self.interval_images, self.interval_seconds = 0, 0.0
        self.saved_at = time.monotonic()

    def make_stepper(self, mode: str) -> Stepper:
        recipe, train = self.recipe, self.sources.train
        criterion = make_criterion(recipe.loss, torch.bincount(train.labels, minlength=self.sources.classes))
        return make_stepper(mode, recipe, train, self.state, criterion, self.precision)

    def steps(self, stop: runtime.Stop) -> Iterator[None]:
        """Train to the end, one step for each time it is asked. Once a signal asks to stop: save, then raise Interrupted."""
        p = self.state.progress
        self._cut_metrics()
        self.state.model.train()
        for part in self.state.frozen:
            part.eval()
        self.display.progress("training", p.step, self.total)
        workers = self.recipe.data.workers
        stuck = getattr(self.sources.train, "stuck", lambda: "")
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
        """Passes over the training images so far."""
        return self.state.progress.step * self.recipe.batch.size / self.images

    def stretch(self) -> tuple[int, int]:
        """The present step (from 0) and the number of steps, as the lr's schedule counts them."""
        return self.state.progress.step, self.total

    def _step(self, batch: Batch) -> None:
        p, recipe = self.state.progress, self.recipe
        step, total = self.stretch()
        p.lr = lr(recipe.schedule, step, total, p.warmup_ended, batch=recipe.batch.size, dropped=p.dropped)
        set_lr(self.state.optimizer, p.lr, recipe.optimizer.style)
        runtime.seed_step(recipe.seed, p.step, self.draws)
        try:
            self.stepper(batch, p)
        except NonFinite as error:
            self._refuse(error)
        own, size = ranks.own(recipe.batch.size), recipe.batch.size
        self.stream += checksum(p.step * size + own.start, batch.epochs[own], batch.indices[own])
        p.step += 1
        p.seen += size
        p.warmup_seen += size
        self._end_warmup()

    def _collect(self) -> None:
        p = self.state.progress
        try:
            self.stepper.collect(p)
        except NonFinite as error:
            self._refuse(error)
        p.stream, self.stream = (p.stream + int(ranks.total(torch.tensor(self.stream)))) % 2**32, 0

    def _end_warmup(self) -> None:
        """DRL 4.2: the low rate ends once the measured training error is below 80%; that it has ended is state."""
        p, schedule = self.state.progress, self.recipe.schedule
        if schedule.warmup_lr is None or p.warmup_ended is not None:
            return
        if p.step % WARMUP_WINDOW == 0:
            self._collect()
            if 100 * p.warmup_wrong / p.warmup_seen < (schedule.warmup_until or WARMUP_UNTIL):
                p.warmup_ended = p.step
            p.warmup_wrong = p.warmup_seen = 0
            self.stepper.restart(p)

    def _refuse(self, error: NonFinite) -> NoReturn:
        p = self.state.progress
        step = p.step if error.step is None else error.step
        names = [self.sources.train.names[int(i)] for i in self.stepper.prepare(step).indices]
        if ranks.first():
            write_text(self.folder / "nonfinite.json", json.dumps({"step": step + 1, "lr": p.lr, "batch": names}, indent=1))
        saved = checkpoint.found(self.folder / "checkpoints")
        where = f"the last checkpoint is {saved[-1].name}" if saved else "there is no checkpoint yet"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise Diverged(
            f"step {step + 1}: {error}; the weights are untouched and {where}; batch: {', '.join(names[:3])}{more}, "
            f"all in {self.folder / 'nonfinite.json'}; a lower schedule.lr (now {p.lr:g}) in a new run may help"
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

    def _cut_metrics(self) -> None:
        """Lines after the checkpoint will come again."""
        if not ranks.first():
            return
        with writing(self.metrics), self.metrics.open("a") as file:
            there = file.tell()
            if there < self.state.progress.metrics_bytes:
                self.display.say(
                    f"note     {self.metrics} has lost lines since the checkpoint: the report's curves will have a gap"
                )
            file.truncate(min(there, self.state.progress.metrics_bytes))

    def _log_due(self) -> bool:
        p = self.state.progress
        return p.step % self.recipe.log.every == 0 or p.step == self.total

    def _log(self) -> None:
        p = self.state.progress
        line = {
            "event": "train",
            "step": p.step,
            "epoch": round(self.epoch(), 4),
            "lr": p.lr,
            "loss": p.loss / p.seen,
            **self.trained(),
            "grad_norm": self.stepper.grad_norm,
            "stream": f"{p.stream:08x}",
        }
        speed = self.interval_images / self.interval_seconds if self.interval_seconds else 0.0
        self._write(line | {"time": {"seconds": round(p.seconds, 3), "images_per_s": round(speed, 1)}})
        self.display.train(line, self.total, speed)
        p.loss, p.losses, p.wrong, p.seen = 0.0, {}, 0, 0
        self.stepper.restart(p)
        self.interval_images, self.interval_seconds = 0, 0.0

    def trained(self) -> dict[str, Any]:
        """What a training line says beside the loss, of the steps since the last one."""
        p = self.state.progress
        return {"error": 100 * p.wrong / p.seen}

    def _evaluation_due(self) -> bool:
        p, every = self.state.progress, self.recipe.evaluate.every
        if self.sources.val is None or p.step == 0 or p.evaluated_at == p.step:
            return False
        batch = self.recipe.batch.size
        new_epoch = p.step * batch // self.images > (p.step - 1) * batch // self.images
        return p.step == self.total or (new_epoch if every is None else p.step % every == 0)

    def _evaluate(self, stop: runtime.Stop) -> None:
        p, started = self.state.progress, time.perf_counter()
        self._collect()
        error, numbers = self.judge(stop)
        self.state.keep_best(error, numbers["loss"])
        self._watch_plateau(error)
        p.evaluated_at = p.step
        p.seconds += (seconds := time.perf_counter() - started)
        line = {"event": "eval", "split": "val", "step": p.step, "epoch": round(self.epoch(), 4)}
        line |= numbers
        self._write(line | {"time": {"seconds": round(seconds, 3)}})
        self.display.evaluation(line)

    def eval_batch(self) -> int:
        """How many images are evaluated at once."""
        height, width = self.sources.preprocessing.size
        on_cpu, on_gpu = EVAL_BATCH
        return on_gpu if self.device.type == "cuda" else max(min(on_cpu, EVAL_PIXELS // (height * width)), 1)

    def judge(self, stop: runtime.Stop) -> tuple[float, dict[str, Any]]:
        """The evaluated weights on the held-out images: the error in percent that the best weights have least of, and what a line
        says of them, `loss` for one."""
        assert self.sources.val is not None
        seen = ranks.single_view(
            self.state.evaluated,
            self.sources.val,
            batch=self.eval_batch(),
            forward=self.forward,
            flip=self.recipe.evaluate.flip,
            autocast=autocast(self.precision, self.device),
            progress=lambda done: stop.check(),
        )
        error, loss = error_and_loss(seen.logits, seen.labels)
        return error, {"loss": loss, "top1_error": error}

    def _watch_plateau(self, error: float) -> None:
        """DRL 3.4: lr "is divided by 10 when the error plateaus"."""
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
        """Write a checkpoint of the present step, which is all ranks' state."""
        self._collect()
        if ranks.first():
            if self.metrics.exists():
                fsync_file(self.metrics)  # a checkpoint counts its bytes
            checkpoint.save(self.folder / "checkpoints", self.state.progress.step, self.state.to_checkpoint())
        ranks.wait(ranks.WRITING, others=ranks.ANSWER)  # who have nothing to do but to wait
        self.saved_at = time.monotonic()
