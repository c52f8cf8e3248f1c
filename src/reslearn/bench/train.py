"""`reslearn bench train`: compares our training step with a plain loop and with the limits of the machine."""

import statistics
import time
from collections.abc import Callable, Sequence
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

ROUNDS, STEPS, WARM_UP = 7, 12, 4  # rounds; timed steps per round; untimed steps before them


class OurLoop:
    """The steps of `reslearn train`, without a run folder."""

    def __init__(self, job: Job[Any, Any, Any]) -> None:
        self.job, self.device, self.precision = job, job.device, job.facts["machine"]["precision"]
        self.state = make_state(job)
        self.state.model.train()
        self.stepper = make_stepper(job, self.state)

    def step(self, batch: StepBatch | None = None) -> None:
        """Trains on a batch; default: the next one."""
        p = self.state.progress
        runtime.seed_step(self.job.recipe.seed, p.step)
        self.stepper(self.stepper.prepare(p.step) if batch is None else batch)
        p.step += 1

    def seconds(self, steps: int) -> float:
        """Trains `steps` steps and returns their time."""
        limits.wait_for(self.device)
        started = self._now()
        for _ in range(steps):
            self.step()
        return self._now() - started

    def shares(self, steps: int) -> dict[str, float]:
        """Percent of a step's time per phase, measured by waiting for the device after each; update includes the gradient norm."""
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
        phases = ("data", "forward", "backward", "update")
        return {name: round(100 * share / sum(seconds), 1) for name, share in zip(phases, seconds, strict=True)}

    def _now(self) -> float:
        limits.wait_for(self.device)
        return time.perf_counter()


def paired(loops: dict[str, Callable[[int], float]], batch: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measures the loops in alternating rounds: medians, and the median of the paired ratios to the first loop's speed.

    loops: name -> function from steps to seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, seconds in loops.items():
            seconds(WARM_UP)
            times[name].append(seconds(steps) / steps)
    first = times[next(iter(loops))]
    return [
        {
            "what": name,
            "images_per_s": round(batch / statistics.median(seconds), 1),
            "ms_a_step": round(1e3 * statistics.median(seconds), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(first, seconds, strict=True)), 3),
        }
        for name, seconds in times.items()
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
    """Measures the training speed of `net`. Returns a JSON-compatible dict.

    - `speeds`: of the plain loop (with our network and, if it exists, torchvision's) and of ours;
    - `shares`: of a step's time, in percent;
    - `limit`: images per second at the device's measured matrix rate, and at its measured bandwidth if each activation saved
      for the backward pass is written once and read twice;
    - `share_of_matrix_peak`: of our step, in percent;
    - `chose`: automatic choices of the run.
    """
    opened = datasets.open(data)
    if not opened.resident:
        raise UserError(f"bench train needs small images of one size that fit in memory; '{data}' has photos")
    base = "cifar10-paper" if opened.sizes == (32, 32) and opened.channels == 3 else "default"
    common = [f"batch.size={batch}", "batch.micro=null", "schedule.lr=0.1", "optimizer.style=pytorch"]
    job = prepare(parse(data, base, model=net, settings=[*common, *settings], device=device, quiet=True))
    recipe, target, mode = job.recipe, job.device, job.execution
    with runtime.deterministic(target):
        ours = OurLoop(job)
        arguments = (net, recipe.net.options(), recipe.batch.size, target)
        options = {"threads": torch.get_num_threads(), "seed": recipe.seed}
        plain = {"plain loop": PlainProcess(data, *arguments, **options)}
        try:
            if other := reference(net):
                plain[f"torchvision's {other}, plain loop"] = PlainProcess(data, *arguments, **options, theirs=True)
            loops = {name: process.seconds for name, process in plain.items()}
            speeds = paired(loops | {f"reslearn, {mode}, {ours.precision}": ours.seconds}, recipe.batch.size, rounds, steps)
        finally:
            for process in plain.values():
                process.close()
        shares = ours.shares(steps)
    counted = cost(create(net, len(opened.classes), opened.channels, **recipe.net.options()), (opened.channels, *opened.sizes))
    peak, bandwidth = limits.matrix_rate(target, ours.precision), limits.bandwidth(target)
    macs = 3 * counted.macs  # forward, and twice as many backward
    saved = (counted.backward_bytes or 0) / (2 if ours.precision == "bf16" else 1)
    return {
        "net": net,
        "data": data,
        "batch": recipe.batch.size,
        "machine": runtime.machine(target, ours.precision, mode),
        "versions": runtime.versions(),
        "chose": job.facts["chose"],
        "speeds": speeds,
        "shares": shares,
        "limit": {
            "multiply_adds_per_s": round(peak),
            "bytes_per_s": round(bandwidth),
            "images_per_s_by_multiply_adds": round(peak / macs, 1),
            "images_per_s_by_bytes": round(bandwidth / (3 * saved), 1),
        },
        "share_of_matrix_peak": round(100 * speeds[-1]["images_per_s"] * macs / peak, 1),
    }
