"""Execution modes of a step. All modes give the same losses up to rounding, from the same batches.

eager: PyTorch operations one by one. fused: BN, addition and ReLU as one operation on a CPU (kernels/). compiled: torch.compile.
captured: sampling, augmentation, forward, backward and update in one CUDA graph, on images in device memory. compiled on a GPU
is captured as well.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reslearn.data.augment import Draws
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.device import autocast, pick_precision
from reslearn.errors import UserError
from reslearn.kernels.fuse import fuse, unavailable
from reslearn.nets import spec
from reslearn.nets.options import check_options
from reslearn.training import ranks, runtime
from reslearn.training.recipe import Execution, Recipe
from reslearn.training.state import State
from reslearn.training.step import LossModule, NonFinite, Outcome, update
from reslearn.training.task import Examples, Job


class StepBatch(NamedTuple):
    """Epochs and indices of a batch, int64 (N,) each. examples: this rank's share, if the host prepares them."""

    epochs: Tensor
    indices: Tensor
    examples: Examples | None = None


class Stepper(Protocol):
    """Executes steps. grad_norm: of the last collected step."""

    grad_norm: float

    def prepare(self, step: int) -> StepBatch:
        """The batch of a step (from 0). A pure function, called in advance on worker threads."""
        ...

    def __call__(self, batch: StepBatch) -> None:
        """One update. Adds to the state's progress, now or in collect(). Raises NonFinite."""
        ...

    def collect(self) -> None:
        """Bring the state's progress up to date. Raises NonFinite."""
        ...

    def restart(self) -> None:
        """Continue from a progress or phase that was changed from outside."""
        ...


def pick(recipe: Recipe, device: torch.device, *, resident: bool, mode: Execution | str | None = None) -> tuple[str, str | None]:
    """Returns the execution mode of a run, and a note if it is not the fastest one. mode: overrides that of the recipe.

    "auto" is captured on a GPU (not measured there yet) and fused on a CPU, where torch.compile takes 30 s or more to start and its
    steps are no faster (see benchmarks/). Raises UserError for a requested mode that is not available.
    """
    mode, row = mode or recipe.execution, spec(recipe.net.name)
    options = check_options(row, recipe.net.options())
    if device.type == "cpu":
        runtime.keep_freed_memory()
    if mode == "captured" or (mode == "auto" and device.type == "cuda"):
        reason = _why_not_captured(device, resident, host_gates=options.last_survival < 1 and not options.per_sample)
        if reason and mode == "captured":
            raise UserError(f"execution=captured is not available: {reason}; set execution=auto")
        return ("eager", f"steps are not captured: {reason}") if reason else ("captured", None)
    if mode in ("auto", "fused") and device.type == "cpu":
        reason = "this network has no BN and ReLU to fuse" if row.build is not None else unavailable()
        if reason and mode == "fused":
            raise UserError(f"execution=fused is not available: {reason}; set execution=auto")
        if row.build is None and reason:
            return "eager", f"BN and ReLU are not fused: {reason}"
        return ("eager" if reason else "fused"), None
    if mode == "fused":
        raise UserError("execution=fused is not available: it is for CPUs; set execution=auto")
    return ("eager" if mode == "auto" else mode), None


def _why_not_captured(device: torch.device, resident: bool, host_gates: bool) -> str | None:
    """host_gates: stochastic depth decides on the host which operations run, which a CUDA graph cannot record."""
    if device.type != "cuda":
        return "it is for GPUs"
    if ranks.count() > 1:
        return "it does not support several ranks"
    if not resident:
        return "the images are not resident in memory"
    return "stochastic depth samples on the host (unless net.per_sample=true)" if host_gates else None


def make_model(job: Job[Any, Any, Any], *, fresh: bool) -> nn.Module:
    """The network of a run, prepared for its execution mode. fresh: see Task.model."""
    model = job.task.model(job, fresh=fresh)
    return fuse(model) if job.execution == "fused" else model


def make_stepper(job: Job[Any, Any, Any], state: State) -> Stepper:
    """The stepper for the execution mode of a run."""
    on_gpu = job.device.type == "cuda" and ranks.count() == 1
    if on_gpu and job.execution in ("captured", "compiled") and job.task.resident(job.sources):
        return DeviceStepper(job, state)
    return HostStepper(job, state)


class _BaseStepper:
    def __init__(self, job: Job[Any, Any, Any], state: State) -> None:
        self.job, self.state = job, state
        recipe = job.recipe
        self.order = SampleOrder(recipe.seed, len(job.sources.train), recipe.batch.size)
        self.seed = view_seed(recipe.seed)
        network: Any = torch.compile(state.model, dynamic=False) if job.execution == "compiled" else state.model
        context = autocast(pick_precision(recipe.precision, job.device), job.device)
        self.losses = LossModule(network, job.task.loss(job), context)
        self.grad_norm = 0.0


class HostStepper(_BaseStepper):
    """The host prepares each batch, or this rank's share of it, and reads each outcome before the update."""

    def __init__(self, job: Job[Any, Any, Any], state: State) -> None:
        super().__init__(job, state)
        self.model, self.phase = ranks.parallel(self.losses), state.phase

    def prepare(self, step: int) -> StepBatch:
        epochs, indices = self.order[step]
        own = ranks.own(len(indices))
        draws = Draws(self.seed, epochs[own], indices[own], began=int(epochs[0]))
        return StepBatch(epochs, indices, self.job.task.examples(self.job, draws))

    def __call__(self, batch: StepBatch) -> None:
        assert batch.examples is not None
        images, state = len(batch.indices), self.state
        if state.ema is not None:
            state.ema.set_step(state.progress.step)
        update(self.model, batch.examples, state, lambda outcome: self._read(outcome, images))

    def _read(self, outcome: Outcome, images: int) -> None:
        """Add the outcome of a step to the progress. Raises NonFinite."""
        progress = self.state.progress
        # The only synchronization with the device in a step:
        *losses, wrong, norm = torch.cat([outcome.values, outcome.grad_norm.to(outcome.values)[None]]).tolist()
        loss = sum(losses)
        if not math.isfinite(loss + norm):
            raise NonFinite(f"the loss is {loss:g} and the gradient norm is {norm:g}")
        progress.loss += loss * images
        for name, value in zip(outcome.names, losses, strict=True) if len(losses) > 1 else ():
            progress.losses[name] = progress.losses.get(name, 0.0) + value * images
        if outcome.counted:
            progress.wrong = (progress.wrong or 0) + int(wrong)
            progress.warmup_wrong += int(wrong)
        self.grad_norm = norm

    def collect(self) -> None:
        pass

    def restart(self) -> None:
        if self.state.phase != self.phase:  # DDP must be set up for the parameters that are trained now
            self.model, self.phase = ranks.parallel(self.losses), self.state.phase


class DeviceStepper(_BaseStepper):
    """The device executes the whole step, including sampling. The host sets the indices and lr, and never waits for a result.

    After a non-finite step the weights no longer change: a flag on the device makes the optimizer skip its updates.
    graph: capture a CUDA graph at the first step; otherwise run the same operations one by one (on any device).
    """

    def __init__(self, job: Job[Any, Any, Any], state: State, graph: bool = True) -> None:
        super().__init__(job, state)
        on, size = job.device, job.recipe.batch.size
        self.epochs, self.indices = torch.zeros(2, size, dtype=torch.int64, device=on)
        self.sums = torch.zeros(3, dtype=torch.float64, device=on)  # loss * images, wrong, wrong in the warm-up window
        self.norm = torch.zeros((), device=on)
        self.failed = torch.zeros((), device=on)  # 1 from the first non-finite step on
        self.good = torch.zeros((), dtype=torch.int64, device=on)  # number of steps before it
        self.counted = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.use_graph = graph
        self.restart()

    def prepare(self, step: int) -> StepBatch:
        return StepBatch(*self.order[step])

    def _body(self) -> None:
        examples = self.job.task.examples(self.job, Draws(self.seed, self.epochs, self.indices))
        update(self.losses, examples, self.state, self._record)

    def _record(self, outcome: Outcome) -> None:
        """Add the outcome of a step to the sums on the device."""
        loss, wrong, self.counted = outcome.loss, outcome.values[-1], outcome.counted
        finite = torch.isfinite(loss + outcome.grad_norm)
        self.failed.copy_(torch.maximum(self.failed, (~finite).float()))
        self.good += (self.failed == 0).long()
        self.norm.copy_(outcome.grad_norm)
        self.sums += torch.stack([loss * len(self.indices), wrong, wrong])

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Warm up on a side stream, as CUDA graphs require, restore all tensors, then capture."""
        buffers = [s["momentum_buffer"] for s in self.state.optimizer.state.values() if "momentum_buffer" in s]
        averages = [] if self.state.ema is None else list(self.state.ema.state_dict().values())
        changing = [*self.state.model.state_dict().values(), *buffers, *averages, self.sums, self.norm, self.failed, self.good]
        before = [tensor.clone() for tensor in changing]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._body()
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for tensor, old in zip(changing, before, strict=True):
                tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._body()
        return graph

    def __call__(self, batch: StepBatch) -> None:
        self.epochs.copy_(batch.epochs, non_blocking=True)
        self.indices.copy_(batch.indices, non_blocking=True)
        if self.state.ema is not None:
            self.state.ema.set_step(self.state.progress.step)
        if not self.use_graph:
            self._body()
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def collect(self) -> None:
        loss, wrong, window, self.grad_norm, failed, good = torch.stack(
            [*self.sums, self.norm.double(), self.failed.double(), self.good.double()]
        ).tolist()
        if failed:
            raise NonFinite("the loss or the gradient norm is not finite", self.begun + int(good))
        progress = self.state.progress
        progress.loss, progress.wrong, progress.warmup_wrong = loss, int(wrong) if self.counted else None, int(window)

    def restart(self) -> None:
        progress, optimizer = self.state.progress, self.state.optimizer
        if getattr(optimizer, "found_inf", None) is not self.failed:  # a new phase has a new optimizer
            self.graph, optimizer.found_inf = None, self.failed  # type: ignore[attr-defined]  # PyTorch skips the update if it is 1
        self.sums.copy_(torch.tensor([progress.loss, progress.wrong or 0, progress.warmup_wrong], dtype=torch.float64))
        self.counted |= progress.wrong is not None
        self.begun = progress.step
        self.good.zero_()


class CapturedForward:
    """The forward pass of a network in evaluation mode as a CUDA graph. Batches of another shape than the first run eagerly."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Returns logits, which the next call overwrites."""
        if self.graph is None:
            self.images = images.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.model(self.images)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.model(self.images)
        if images.shape != self.images.shape:
            return self.model(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.logits
