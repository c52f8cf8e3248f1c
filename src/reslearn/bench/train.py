"""`reslearn bench train`: our training step beside a plain loop, and beside what the machine can do at most."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from reslearn import data as datasets
from reslearn.bench import limits
from reslearn.bench.plain import PlainProcess, reference
from reslearn.data.augment import Draws
from reslearn.device import autocast
from reslearn.errors import UserError
from reslearn.nets import create
from reslearn.nets.cost import cost
from reslearn.training import runtime
from reslearn.training.request import parse
from reslearn.training.run import make_state, prepare
from reslearn.training.step import LossModule
from reslearn.training.stepper import StepBatch, make_stepper
from reslearn.training.task import Job

ROUNDS, STEPS, SETTLE = 7, 12, 4  # rounds of steps that are timed, after some that are not


@dataclass(frozen=True)
class Speed:
    """images_per_s: median over rounds. ratio: median of the paired ratios to the plain loop."""

    what: str
    images_per_s: float
    ms_a_step: float
    ratio: float


@dataclass(frozen=True)
class Shares:
    """Percent of a step's time: the batch, forward, backward, and the update with the norm of the gradient."""

    data: float
    forward: float
    backward: float
    update: float


class OurLoop:
    """Steps as `reslearn train` runs them, without a run folder."""

    def __init__(self, job: Job[Any, Any, Any]) -> None:
        self.job, self.device, self.precision = job, job.device, job.facts["machine"]["precision"]
        self.state = make_state(job)
        self.state.model.train()
        self.stepper = make_stepper(job, self.state)

    def step(self, batch: StepBatch | None = None) -> None:
        """Train on a batch, by default the next one."""
        p = self.state.progress
        runtime.seed_step(self.job.recipe.seed, p.step)
        self.stepper(self.stepper.prepare(p.step) if batch is None else batch)
        p.step += 1

    def seconds(self, steps: int) -> float:
        """Train so many steps. Returns how long they took."""
        limits.wait_for(self.device)
        started = self._now()
        for _ in range(steps):
            self.step()
        return self._now() - started

    def shares(self, steps: int) -> Shares:
        """Where the time goes, measured by waiting after each part."""
        job, model, optimizer, seconds = self.job, self.state.model, self.state.optimizer, [0.0] * 4
        losses = LossModule(model, job.task.loss(job), autocast(self.precision, self.device))
        for _ in range(steps):
            marks = [self._now()]
            batch = self.stepper.prepare(self.state.progress.step)
            examples = batch.examples or job.task.examples(job, Draws(job.recipe.seed, batch.epochs, batch.indices))
            marks.append(self._now())
            optimizer.zero_grad(set_to_none=True)
            loss = torch.stack(list(losses(examples).parts.values())).sum()
            marks.append(self._now())
            loss.backward()
            marks.append(self._now())
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
            optimizer.step()
            marks.append(self._now())
            seconds = [total + after - before for total, before, after in zip(seconds, marks, marks[1:], strict=False)]
        return Shares(*(round(100 * part / sum(seconds), 1) for part in seconds))

    def _now(self) -> float:
        limits.wait_for(self.device)
        return time.perf_counter()


def paired(loops: dict[str, Callable[[int], float]], batch: int, rounds: int, steps: int) -> list[Speed]:
    """Rounds of steps of each loop in turn (seconds for so many steps); the first is what the others are compared with."""
    took: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, seconds in loops.items():
            seconds(SETTLE)
            took[name].append(seconds(steps) / steps)
    first = took[next(iter(loops))]
    return [
        Speed(
            name,
            round(batch / statistics.median(seconds), 1),
            round(1e3 * statistics.median(seconds), 2),
            round(statistics.median(a / b for a, b in zip(first, seconds, strict=True)), 3),
        )
        for name, seconds in took.items()
    ]


def bench(
    net: str,
    data: str = "cifar10",
    batch: int = 128,
    settings: Sequence[str] = (),
    device: str = "auto",
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, Any]:
    """The speed of training `net`, ready for JSON.

    `speeds`: of the plain loop (with our network, and torchvision's where there is one) and of ours; `shares` of a step's time;
    `limit`: images a second at the device's measured matrix rate, and at its measured bandwidth if each activation that is
    kept for backward were written once and read twice; `share_of_matrix_peak`: of our step, in percent; `chose`: what the run
    chose from the data and the machine.
    """
    opened = datasets.open(data)
    if not opened.resident:
        raise UserError(f"bench train takes small images of one size, which stay in memory; '{data}' has photos")
    base = "cifar10-paper" if opened.sizes == (32, 32) and opened.channels == 3 else "default"
    lasting = [f"batch.size={batch}", "batch.micro=null", "schedule.lr=0.1", "optimizer.style=pytorch"]
    job = prepare(parse(data, base, model=net, settings=[*lasting, *settings], device=device, quiet=True))
    recipe, on, mode = job.recipe, job.device, job.execution
    with runtime.deterministic(on):
        ours = OurLoop(job)
        about = (net, recipe.net.options(), recipe.batch.size, on)
        alike = {"threads": torch.get_num_threads(), "seed": recipe.seed}
        plain = {"plain loop": PlainProcess(data, *about, **alike)}
        try:
            if other := reference(net):
                plain[f"torchvision's {other}, plain loop"] = PlainProcess(data, *about, **alike, theirs=True)
            loops = {name: process.seconds for name, process in plain.items()}
            speeds = paired(loops | {f"reslearn, {mode}, {ours.precision}": ours.seconds}, recipe.batch.size, rounds, steps)
        finally:
            for process in plain.values():
                process.close()
        shares = ours.shares(steps)
    counted = cost(create(net, len(opened.classes), opened.channels, **recipe.net.options()), (opened.channels, *opened.sizes))
    peak, wide = limits.matrix_rate(on, ours.precision), limits.bandwidth(on)
    macs = 3 * counted.macs  # forward, and twice as many backward
    kept = (counted.backward_bytes or 0) / (2 if ours.precision == "bf16" else 1)
    return {
        "net": net,
        "data": data,
        "batch": recipe.batch.size,
        "machine": runtime.machine(on, ours.precision, mode),
        "versions": runtime.versions(),
        "chose": job.facts["chose"],
        "speeds": [asdict(speed) for speed in speeds],
        "shares": asdict(shares),
        "limit": {
            "multiply_adds_per_s": round(peak),
            "bytes_per_s": round(wide),
            "images_per_s_by_multiply_adds": round(peak / macs, 1),
            "images_per_s_by_bytes": round(wide / (3 * kept), 1),
        },
        "share_of_matrix_peak": round(100 * speeds[-1].images_per_s * macs / peak, 1),
    }
