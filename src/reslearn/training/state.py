"""The state of a run. It is saved in checkpoints and restored bit for bit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD

from reslearn.errors import UserError
from reslearn.training import checkpoint
from reslearn.training.ema import Ema
from reslearn.training.optimizer import make_optimizer, set_lr
from reslearn.training.recipe import Recipe
from reslearn.training.task import Phase, Task
from reslearn.weights.store import shape_mismatch


@dataclass
class Progress:
    """The JSON-compatible part of the state. loss, losses, wrong and seen are sums since the last line of metrics.jsonl."""

    step: int = 0
    evaluated_at: int = 0
    lr: float = 0.0
    loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)  # by name, for tasks with several losses
    wrong: int | None = None  # None for tasks that do not count wrong images
    seen: int = 0
    warmup_wrong: int = 0  # in the current window of warm-up steps
    warmup_seen: int = 0
    warmup_ended: int | None = None
    plateau_error: float | None = None  # lowest validation error so far, percent (shape plateau)
    plateau_waited: int = 0  # evaluations since then
    dropped: int = 0  # number of times that lr has been divided by 10
    best_step: int | None = None
    best_error: float = 0.0  # validation error at best_step, percent
    best_loss: float = 0.0
    seconds: float = 0.0
    metrics_bytes: int = 0
    stream: int = 0  # checksum of all training images so far, in order


def frozen_modules(model: nn.Module, frozen: int) -> list[nn.Module]:
    """The modules that net.frozen keeps unchanged: the stem (1) and the first stages (2, ...) of a network."""
    names = ["conv1", "bn1", *(f"layer{i}" for i in range(1, frozen))] if frozen else []
    return [model.get_submodule(name) for name in names]


class State:
    """Model, optimizer, average, best weights and progress. phase: current phase, from 1. trained: the module it trains."""

    def __init__(self, model: nn.Module, recipe: Recipe, phases: Sequence[Phase], task: Task[Any, Any, Any]) -> None:
        self.model, self.recipe, self.phases, self.task = model, recipe, phases, task
        self.frozen = frozen_modules(model, recipe.net.frozen)  # always in evaluation mode
        for module in self.frozen:
            module.requires_grad_(False)
        self.best: dict[str, Tensor] = {}
        self.progress = Progress(lr=recipe.schedule.lr)
        self.enter(1)
        self.ema = Ema(model, recipe.ema) if recipe.ema is not None else None

    def enter(self, phase: int) -> None:
        """Start a phase, with zero momentum buffers."""
        self.phase = phase
        self.trained = self.task.enter(self.model, phase)
        head = self.task.head(self.model)
        self.optimizer: SGD = make_optimizer(self.trained, self.recipe.optimizer, self.recipe.schedule.lr, head)

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate and save: the moving average, if there is one."""
        return self.ema.module if self.ema is not None else self.model

    @property
    def phase_step(self) -> tuple[int, int]:
        """The current step (from 0) within the current phase, and the length of that phase."""
        begin = self.phases[self.phase - 2].end if self.phase > 1 else 0
        return self.progress.step - begin, self.phases[self.phase - 1].end - begin

    def batch_norms(self) -> list[_BatchNorm]:
        """The BN layers in training mode."""
        return [module for module in self.trained.modules() if isinstance(module, _BatchNorm) and module.training]

    def keep_best(self, error: float, loss: float) -> None:
        """Keep a copy of the evaluated weights if they are the best so far: lowest validation error, then lowest loss."""
        p = self.progress
        if p.best_step is None or (error, loss) < (p.best_error, p.best_loss):
            p.best_step, p.best_error, p.best_loss = p.step, error, loss
            self.best = {name: tensor.detach().clone() for name, tensor in self.evaluated.state_dict().items()}

    def to_checkpoint(self) -> checkpoint.Checkpoint:
        state = {}
        for name, parameter in self.model.named_parameters():
            if (buffer := self.optimizer.state[parameter].get("momentum_buffer")) is not None:
                state[f"momentum.{name}"] = buffer
        if self.ema is not None:
            state |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        return checkpoint.Checkpoint(self.model.state_dict(), state, asdict(self.progress), self.best)

    def from_checkpoint(self, saved: checkpoint.Checkpoint, where: str) -> None:
        """Load a checkpoint. Raises UserError naming the first tensor that does not fit the network."""
        try:
            self.progress = Progress(**saved.facts)
        except TypeError as error:
            raise UserError(f"{where}/state.json was written by another version of reslearn: {error}") from error
        self.enter(1 + sum(phase.end <= self.progress.step for phase in self.phases[:-1]))
        self._check_shapes(self.model.state_dict(), saved.model, where)
        self.model.load_state_dict(saved.model)
        for name, parameter in self.model.named_parameters():
            if (buffer := saved.state.get(f"momentum.{name}")) is not None:
                self.optimizer.state[parameter]["momentum_buffer"].copy_(buffer)
        if self.ema is not None:
            ema = {name.removeprefix("ema."): t for name, t in saved.state.items() if name.startswith("ema.")}
            self._check_shapes(self.ema.state_dict(), ema, where)
            self.ema.module.load_state_dict(ema)
        self.best = saved.best
        set_lr(self.optimizer, self.progress.lr, "pytorch")  # the saved momentum buffers already match this lr

    @staticmethod
    def _check_shapes(expected: dict[str, Tensor], saved: dict[str, Tensor], where: str) -> None:
        difference = shape_mismatch({k: t.shape for k, t in expected.items()}, {k: t.shape for k, t in saved.items()})
        if difference:
            raise UserError(f"{where} does not fit the run's recipe: {difference}")
