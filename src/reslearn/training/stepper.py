"""How steps are run: on the host's batches one by one, or as one CUDA graph on data that lies on the device.

eager: PyTorch's operations one by one. fused: with BN, addition and ReLU as one on a CPU (kernels/fuse.py). compiled: by
torch.compile. captured: draws, augmentation, forward, backward and update in one CUDA graph; compiled on a GPU is captured too.
All give the same losses up to rounding, from the same batches.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reslearn.classify.sources import Source
from reslearn.data.augment import Draws
from reslearn.data.images.resident import Resident
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.device import autocast
from reslearn.errors import UserError
from reslearn.kernels.fuse import fuse, unavailable
from reslearn.nets import spec
from reslearn.nets.options import check_options
from reslearn.training import ranks, runtime
from reslearn.training.recipe import Recipe
from reslearn.training.state import Progress, State
from reslearn.training.step import Criterion, NonFinite, gradients, train_step


class Batch(NamedTuple):
    """A step's draws, int64 (N,) each; and images float32 (n, C, H, W) with labels int64 (n,) where the host makes them: all N,
    or a rank's own.
    """

    epochs: Tensor
    indices: Tensor
    images: Tensor | None = None
    labels: Tensor | None = None


class Stepper(Protocol):
    """grad_norm: of the last step that was collected."""

    grad_norm: float

    def prepare(self, step: int) -> Batch:
        """The batch of a step (from 0): a pure function, called on other threads ahead of time."""
        ...

    def __call__(self, batch: Batch, progress: Progress) -> None:
        """One update. Adds to progress.loss, wrong and warmup_wrong, now or when collected. Raises NonFinite."""
        ...

    def collect(self, progress: Progress) -> None:
        """Bring progress up to date. Raises NonFinite."""
        ...

    def restart(self, progress: Progress) -> None:
        """Take over progress, which has been changed."""
        ...


def pick(asked: str, device: torch.device, recipe: Recipe, *, resident: bool) -> tuple[str, str | None]:
    """How to run steps, and a note where that is not the fastest way. Raises UserError for what was asked for and cannot be.

    "auto" is measured, see benchmarks/: captured on a GPU, fused on a CPU. torch.compile takes half a minute and more, and on
    a CPU its step is no faster than the fused one.
    """
    row = spec(recipe.net.name)
    # A gate that the host draws (see StochasticDepth) decides which operations run: nothing to capture.
    options = check_options(row, recipe.net.options())
    host_gates = options.last_survival < 1 and not options.per_sample
    why_not_captured = (
        "it is for GPUs"
        if device.type != "cuda"
        else "several ranks train"
        if ranks.count() > 1
        else "the images do not lie in memory"
        if not resident
        else "stochastic depth draws on the host (net.per_sample=true would not)"
        if host_gates
        else None
    )
    if device.type == "cpu":
        runtime.keep_freed_memory()
    if asked == "captured" and why_not_captured:
        raise UserError(f"step=captured cannot be used: {why_not_captured}; leave it at auto")
    if asked == "auto" and device.type == "cuda":
        return ("eager", f"steps are not captured: {why_not_captured}") if why_not_captured else ("captured", None)
    if asked in ("auto", "fused") and device.type == "cpu":
        why_not = "no BN and ReLU of this network can be fused" if row.build is not None else unavailable()
        if asked == "fused" and why_not:
            raise UserError(f"step=fused cannot be used: {why_not}; leave it at auto")
        if row.build is None and why_not:
            return "eager", f"BN and ReLU are not fused: {why_not}"
        return ("eager" if why_not else "fused"), None
    if asked == "fused":
        raise UserError("step=fused cannot be used: it is for CPUs; leave it at auto")
    return ("eager" if asked == "auto" else asked), None


def make_stepper(mode: str, recipe: Recipe, source: Source, state: State, criterion: Criterion, precision: str) -> Stepper:
    """mode: from pick."""
    if mode == "fused":
        fuse(state.model)
        fuse(state.evaluated)
    model: Any = ranks.parallel(state.model)
    if mode == "compiled":
        model = torch.compile(model, dynamic=False)
    on_gpu = next(state.model.parameters()).device.type == "cuda"
    if on_gpu and ranks.count() == 1 and mode in ("captured", "compiled") and isinstance(source, Resident):
        return DeviceStepper(recipe, source, state, criterion, precision, model)
    return HostStepper(recipe, source, state, criterion, precision, model)


class HostStepper:
    """The host makes each batch, or a rank's part of it, and reads each outcome before the weights change."""

    def __init__(
        self, recipe: Recipe, source: Source, state: State, criterion: Criterion, precision: str, model: nn.Module
    ) -> None:
        self.source, self.state, self.criterion, self.model = source, state, criterion, model
        self.order = SampleOrder(recipe.seed, len(source), recipe.batch.size)
        self.seed, self.micro = view_seed(recipe.seed), recipe.batch.micro
        self.device = next(state.model.parameters()).device
        self.autocast = autocast(precision, self.device)
        self.grad_norm = 0.0
        # Ranks that normalize by their own images have statistics of their own; their mean is that of all images.
        frozen = {id(buffer) for part in state.frozen for buffer in part.buffers()}
        buffers = [buffer for buffer in state.model.buffers() if buffer.is_floating_point() and id(buffer) not in frozen]
        self.statistics = [] if recipe.batch.sync_bn else buffers

    def prepare(self, step: int) -> Batch:
        epochs, indices = self.order[step]
        own = ranks.own(len(indices))
        draws = Draws(self.seed, epochs[own], indices[own], began=int(epochs[0]))
        return Batch(epochs, indices, *self.source.train_batch(draws))

    def __call__(self, batch: Batch, progress: Progress) -> None:
        assert batch.images is not None and batch.labels is not None
        outcome = train_step(
            self.model, batch.images, batch.labels, self.criterion, self.state.optimizer, self.autocast, self.micro
        )
        ranks.average(self.statistics)
        if self.state.ema is not None:
            self.state.ema.set_step(progress.step)
            self.state.ema.update()
        wrong = int(outcome.wrong)
        progress.loss += outcome.loss.item() * len(batch.indices)
        progress.wrong += wrong
        progress.warmup_wrong += wrong
        self.grad_norm = outcome.grad_norm.item()

    def collect(self, progress: Progress) -> None:
        pass

    def restart(self, progress: Progress) -> None:
        pass


class DeviceStepper:
    """The device does all of a step, from the draws on; the host gives the batch's indices and the lr, and waits for nothing.

    A step that is not finite changes nothing, nor does any after it: the flag is an input of the optimizer on the device.
    graph: captured as a CUDA graph at the first step; without, the same operations run one by one (on any device).
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Resident,
        state: State,
        criterion: Criterion,
        precision: str,
        model: nn.Module,
        graph: bool = True,
    ) -> None:
        self.source, self.state, self.criterion, self.model = source, state, criterion, model
        self.order = SampleOrder(recipe.seed, len(source), recipe.batch.size)
        self.seed, self.micro = view_seed(recipe.seed), recipe.batch.micro
        self.device = next(state.model.parameters()).device
        self.autocast = autocast(precision, self.device)
        self.grad_norm = 0.0
        self.epochs, self.indices = torch.zeros(2, recipe.batch.size, dtype=torch.int64, device=self.device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss x images, wrong, wrong of the warm-up window
        self.norm = torch.zeros((), device=self.device)
        self.failed = torch.zeros((), device=self.device)  # 1 from the first step on that is not finite
        self.good = torch.zeros((), dtype=torch.int64, device=self.device)  # steps before it
        state.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wanted = graph

    def prepare(self, step: int) -> Batch:
        return Batch(*self.order[step])

    def _body(self) -> None:
        images, labels = self.source.train_batch(Draws(self.seed, self.epochs, self.indices))
        outcome = gradients(self.model, images, labels, self.criterion, self.state.optimizer, self.autocast, self.micro)
        finite = torch.isfinite(outcome.loss + outcome.grad_norm)
        self.failed.copy_(torch.maximum(self.failed, (~finite).float()))
        self.good += (self.failed == 0).long()
        self.norm.copy_(outcome.grad_norm)
        self.sums += torch.stack([outcome.loss.double() * len(labels), outcome.wrong.double(), outcome.wrong.double()])
        self.state.optimizer.step()
        if self.state.ema is not None:
            self.state.ema.update()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Rehearse on another stream, as CUDA graphs need it, put everything back, then record."""
        velocities = [s["momentum_buffer"] for s in self.state.optimizer.state.values() if "momentum_buffer" in s]
        averages = [] if self.state.ema is None else list(self.state.ema.state_dict().values())
        changing = [*self.state.model.state_dict().values(), *velocities, *averages, self.sums, self.norm, self.failed, self.good]
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

    def __call__(self, batch: Batch, progress: Progress) -> None:
        self.epochs.copy_(batch.epochs, non_blocking=True)
        self.indices.copy_(batch.indices, non_blocking=True)
        if self.state.ema is not None:
            self.state.ema.set_step(progress.step)
        if not self.wanted:
            self._body()
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def collect(self, progress: Progress) -> None:
        loss, wrong, window, self.grad_norm, failed, good = torch.stack(
            [*self.sums, self.norm.double(), self.failed.double(), self.good.double()]
        ).tolist()
        if failed:
            raise NonFinite("the loss or the norm of its gradient is not finite", self.begun + int(good))
        progress.loss, progress.wrong, progress.warmup_wrong = loss, int(wrong), int(window)

    def restart(self, progress: Progress) -> None:
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
