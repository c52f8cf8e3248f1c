"""Memory and time of training steps with and without activation checkpointing (recompute=true), each case in its own process.

    python benchmarks/recompute.py --out benchmarks/results/recompute.json

Needs CIFAR-10 (RESLEARN_DATA or the cache); takes about two minutes on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = [("resnet110", 128), ("resnet1202", 16)]
STEPS = 3


def measure(net: str, batch: int, recompute: bool) -> dict:
    """Seconds per step, and the increase of the process's peak memory since before the first step."""
    from reslearn.bench.train import OurLoop
    from reslearn.training import runtime
    from reslearn.training.request import parse
    from reslearn.training.run import prepare
    from reslearn.training.stepper import StepBatch

    settings = {"recompute": recompute, "batch.size": batch, "schedule.lr": 0.001}
    loop = OurLoop(prepare(parse("cifar10", "default", model=net, settings=settings, quiet=True)))
    batches: list[StepBatch] = [loop.stepper.prepare(step) for step in range(STEPS)]
    before, seconds = runtime.peak_memory_mb(loop.device), []
    for prepared in batches:
        started = time.perf_counter()
        loop.step(prepared)
        loop.stepper.collect()
        seconds.append(time.perf_counter() - started)
    after = runtime.peak_memory_mb(loop.device)
    machine = loop.job.facts["machine"]
    return {"seconds_a_step": round(statistics.median(seconds), 3), "memory_mb": round(after - before), "machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recompute.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        net, batch, recompute = options.one
        print(json.dumps(measure(net, int(batch), recompute == "yes")))
        return
    rows = []
    for net, batch in CASES:
        row: dict = {"net": net, "batch": batch}
        for name, recompute in (("kept", "no"), ("recomputed", "yes")):
            command = [sys.executable, __file__, "--one", net, str(batch), recompute]
            row[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row["memory_ratio"] = round(row["recomputed"]["memory_mb"] / row["kept"]["memory_mb"], 3)
        row["time_ratio"] = round(row["recomputed"]["seconds_a_step"] / row["kept"]["seconds_a_step"], 3)
        print(net, batch, f"memory {row['memory_ratio']:.2f}, time {row['time_ratio']:.2f}", flush=True)
        rows.append(row)
    record = {"command": "python benchmarks/recompute.py", "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
