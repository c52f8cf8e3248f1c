"""How a step is executed: on the host's batches one by one, or as one CUDA graph on images that are in the device's memory.

eager: PyTorch's operations one by one. fused: BN, addition and ReLU as one operation on a CPU (kernels/). compiled: by
torch.compile. captured: sampling, augmentation, forward, backward and update in one CUDA graph; compiled on a GPU is captured too.
All give the same losses up to rounding, from the same batches.
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
    """A step's draws, int64 (N,) each; and its examples where the host makes them: all N, or a rank's own."""

    epochs: Tensor
    indices: Tensor
    examples: Examples | None = None


class Stepper(Protocol):
    """grad_norm: of the last step that was collected."""

    grad_norm: float

    def prepare(self, step: int) -> StepBatch:
        """The batch of a step (from 0): a pure function, called on other threads ahead of time."""
        ...

    def __call__(self, batch: StepBatch) -> None:
        """One update. Adds to the state's progress, now or when collected. Raises NonFinite."""
        ...

    def collect(self) -> None:
        """Bring the state's progress up to date. Raises NonFinite."""
        ...

    def restart(self) -> None:
        """Take over a progress or a phase that has been changed."""
        ...


def pick(recipe: Recipe, device: torch.device, *, resident: bool, asked: Execution | str | None = None) -> tuple[str, str | None]:
    """The execution mode of a recipe's steps, and a note where it is not the fastest. asked: instead of the recipe's.

    "auto" is captured on a GPU (not measured there yet) and fused on a CPU, where torch.compile takes half a minute and more and
    its step is no faster (see benchmarks/). Raises UserError for a mode that was asked for and cannot be used.
    """
    asked, row = asked or recipe.execution, spec(recipe.net.name)
    # A gate that the host draws (see StochasticDepth) decides which operations run: nothing to capture.
    options = check_options(row, recipe.net.options())
    host_gates = options.last_survival < 1 and not options.per_sample
    why_not_captured = (
        "it is for GPUs"
        if device.type != "cuda"
        else "several ranks train"
        if ranks.count() > 1
        else "the images are not resident in memory"
        if not resident
        else "stochastic depth draws on the host (net.per_sample=true would not)"
        if host_gates
        else None
    )
    if device.type == "cpu":
        runtime.keep_freed_memory()
    if asked == "captured" and why_not_captured:
        raise UserError(f"execution=captured cannot be used: {why_not_captured}; leave it at auto")
    if asked == "auto" and device.type == "cuda":
        return ("eager", f"steps are not captured: {why_not_captured}") if why_not_captured else ("captured", None)
    if asked in ("auto", "fused") and device.type == "cpu":
        why_not = "no BN and ReLU of this network can be fused" if row.build is not None else unavailable()
        if asked == "fused" and why_not:
            raise UserError(f"execution=fused cannot be used: {why_not}; leave it at auto")
        if row.build is None and why_not:
            return "eager", f"BN and ReLU are not fused: {why_not}"
        return ("eager" if why_not else "fused"), None
    if asked == "fused":
        raise UserError("execution=fused cannot be used: it is for CPUs; leave it at auto")
    return ("eager" if asked == "auto" else asked), None


def make_model(job: Job[Any, Any, Any], *, fresh: bool) -> nn.Module:
    """The network of a run, ready to be executed its way; see Task.model."""
    model = job.task.model(job, fresh=fresh)
    return fuse(model) if job.execution == "fused" else model


def make_stepper(job: Job[Any, Any, Any], state: State) -> Stepper:
    """What executes a run's steps."""
    on_gpu = job.device.type == "cuda" and ranks.count() == 1
    if on_gpu and job.execution in ("captured", "compiled") and job.task.resident(job.sources):
        return DeviceStepper(job, state)
    return HostStepper(job, state)


class _Stepping:
    """What both steppers have."""

    def __init__(self, job: Job[Any, Any, Any], state: State) -> None:
        self.job, self.state = job, state
        recipe = job.recipe
        self.order = SampleOrder(recipe.seed, len(job.sources.train), recipe.batch.size)
        self.seed = view_seed(recipe.seed)
        network: Any = torch.compile(state.model, dynamic=False) if job.execution == "compiled" else state.model
        context = autocast(pick_precision(recipe.precision, job.device), job.device)
        self.losses = LossModule(network, job.task.loss(job), context)
        self.grad_norm = 0.0


class HostStepper(_Stepping):
    """The host makes each batch, or a rank's share of it, and reads each outcome before the weights change."""

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
        *losses, wrong, norm = torch.cat([outcome.values, outcome.grad_norm.to(outcome.values)[None]]).tolist()  # the only wait
        loss = sum(losses)
        if not math.isfinite(loss + norm):
            raise NonFinite(f"the loss is {loss:g} and the norm of its gradient {norm:g}")
        progress.loss += loss * images
        for name, value in zip(outcome.names, losses, strict=True) if len(losses) > 1 else ():
            progress.losses[name] = progress.losses.get(name, 0.0) + value * images
        progress.wrong += int(wrong)
        progress.warmup_wrong += int(wrong)
        self.grad_norm = norm

    def collect(self) -> None:
        pass

    def restart(self) -> None:
        if self.state.phase != self.phase:  # other parameters have gradients now
            self.model, self.phase = ranks.parallel(self.losses), self.state.phase


class DeviceStepper(_Stepping):
    """The device does all of a step, sampling included; the host gives the batch's indices and the lr, and waits for nothing.

    A step that is not finite changes nothing, nor does any after it: the flag is an input of the optimizer on the device.
    graph: captured as a CUDA graph at the first step; without, the same operations run one by one (on any device).
    """

    def __init__(self, job: Job[Any, Any, Any], state: State, graph: bool = True) -> None:
        super().__init__(job, state)
        on, size = job.device, job.recipe.batch.size
        self.epochs, self.indices = torch.zeros(2, size, dtype=torch.int64, device=on)
        self.sums = torch.zeros(3, dtype=torch.float64, device=on)  # loss x images, wrong, wrong of the warm-up window
        self.norm = torch.zeros((), device=on)
        self.failed = torch.zeros((), device=on)  # 1 from the first step on that is not finite
        self.good = torch.zeros((), dtype=torch.int64, device=on)  # steps before it
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wanted = graph
        self.restart()

    def prepare(self, step: int) -> StepBatch:
        return StepBatch(*self.order[step])

    def _body(self) -> None:
        examples = self.job.task.examples(self.job, Draws(self.seed, self.epochs, self.indices))
        update(self.losses, examples, self.state, self._note)

    def _note(self, outcome: Outcome) -> None:
        """Keep the outcome of a step on the device."""
        loss, wrong = outcome.loss, outcome.values[-1]
        finite = torch.isfinite(loss + outcome.grad_norm)
        self.failed.copy_(torch.maximum(self.failed, (~finite).float()))
        self.good += (self.failed == 0).long()
        self.norm.copy_(outcome.grad_norm)
        self.sums += torch.stack([loss * len(self.indices), wrong, wrong])

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Rehearse on another stream, as CUDA graphs need it, put everything back, then record."""
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
        if not self.wanted:
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
            raise NonFinite("the loss or the norm of its gradient is not finite", self.begun + int(good))
        progress = self.state.progress
        progress.loss, progress.wrong, progress.warmup_wrong = loss, int(wrong), int(window)

    def restart(self) -> None:
        progress, optimizer = self.state.progress, self.state.optimizer
        if getattr(optimizer, "found_inf", None) is not self.failed:  # another phase's
            self.graph, optimizer.found_inf = None, self.failed  # type: ignore[attr-defined]  # PyTorch's own way to skip an update
        self.sums.copy_(torch.tensor([progress.loss, progress.wrong, progress.warmup_wrong], dtype=torch.float64))
        self.begun = progress.step
        self.good.zero_()


class CapturedForward:
    """A network in evaluation as a CUDA graph; batches of another shape than the first run without it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits; they are overwritten by the next call."""
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
