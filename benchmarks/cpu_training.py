"""Compares our training of ResNet-20 on CIFAR-10 on a CPU with a plain PyTorch loop: speed and loss curves.

    python benchmarks/cpu_training.py --out benchmarks/results/cpu_training

Measures speed in paired rounds (see `reslearn bench train`) for each execution mode, the time to the first step, and the losses of
600 iterations with three seeds, whose curves must agree within noise. Writes OUT.json and OUT.png. Needs CIFAR-10 (RESLEARN_DATA
or the cache) and an otherwise idle machine; takes about 20 minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from reslearn import data as datasets
from reslearn.bench.plain import plain_loop
from reslearn.bench.train import OurLoop, bench
from reslearn.training import runtime
from reslearn.training.request import parse
from reslearn.training.run import prepare

CPU = torch.device("cpu")
WINDOW = 20  # steps of the moving average in the plot
LIKE_PLAIN = ["batch.micro=null", "optimizer.style=pytorch", "schedule.lr=0.1", "data.pad_with=black", "data.normalize=channel"]


def our_losses(seed: int, steps: int) -> list[float]:
    job = prepare(parse("cifar10", "cifar10-paper", model="resnet20", settings=LIKE_PLAIN, seed=seed, device="cpu", quiet=True))
    with runtime.deterministic(CPU):
        loop, losses, before = OurLoop(job), [], 0.0
        for _ in range(steps):
            loop.step()
            losses.append((loop.state.progress.loss - before) / job.recipe.batch.size)
            before = loop.state.progress.loss
    return losses


def plain_losses(seed: int, steps: int) -> list[float]:
    opened = datasets.open("cifar10")
    loop = plain_loop(opened, "resnet20", {}, 128, CPU, seed)
    losses = [loop.step() for _ in range(steps)]
    loop.close()
    return losses


def first_step(mode: str) -> float:
    """Seconds from an open data set to the end of the first step: creating the network, compiling, one batch."""
    settings = {"batch.micro": None, "execution": mode}
    job = prepare(parse("cifar10", "cifar10-paper", model="resnet20", settings=settings, device="cpu", quiet=True))
    started = time.perf_counter()
    OurLoop(job).step()
    return time.perf_counter() - started


def smooth(values: list[float]) -> list[float]:
    return [statistics.mean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xlabel="iterations", ylabel=f"training loss (mean of {WINDOW})", title="ResNet-20 on CIFAR-10, three seeds"
    )
    for (name, runs), color in zip(curves.items(), ("tab:blue", "tab:red"), strict=True):
        for i, run in enumerate(runs):
            axes.plot(smooth(run), lw=1, color=color, label=name if i == 0 else None)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", default="eager,fused,compiled")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_training"))
    options = parser.parse_args()
    record: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "versions": runtime.versions()}
    record["speed"] = {}
    for mode in options.modes.split(","):
        row = bench("resnet20", settings=[f"execution={mode}"], rounds=9, steps=20)
        record["speed"][mode] = row
        print(mode, json.dumps(row["speeds"]), flush=True)
    record["seconds_to_the_first_step"] = {mode: round(first_step(mode), 2) for mode in options.modes.split(",")}
    print(record["seconds_to_the_first_step"], flush=True)
    curves: dict[str, list[list[float]]] = {"reslearn, fused, bf16": [], "plain loop, fp32": []}
    for seed in range(options.seeds):
        for run, losses in zip(curves.values(), (our_losses, plain_losses), strict=True):
            run.append(losses(seed, options.steps))
        print(
            f"seed {seed}: " + ", ".join(f"{name} {statistics.mean(runs[-1][-100:]):.4f}" for name, runs in curves.items()),
            flush=True,
        )
    record["mean_loss_of_the_last_100"] = {name: [statistics.mean(run[-100:]) for run in runs] for name, runs in curves.items()}
    record["curves"] = {name: [[round(loss, 4) for loss in smooth(run)[::10]] for run in runs] for name, runs in curves.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curves, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
