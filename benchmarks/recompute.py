"""What recompute=true saves and costs: memory and time of training steps, each case in a process of its own.

    python benchmarks/recompute.py --out benchmarks/results/recompute.json

Needs no data: the images are noise. About two minutes on two cores.
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
    """Seconds of a step, and the process's largest memory above what it had before the first one."""
    import torch

    from reslearn.classify.sources import make_model
    from reslearn.device import autocast, pick_device, pick_precision
    from reslearn.training import runtime
    from reslearn.training.recipe import validate
    from reslearn.training.step import make_criterion, make_optimizer, train_step
    from reslearn.training.stepper import pick

    device = pick_device("auto")
    recipe = validate({"net": {"name": net}, "schedule": {"steps": 1}, "recompute": recompute, "batch": {"size": batch}})
    mode, _ = pick("auto", device, recipe, resident=True)
    precision = pick_precision("auto", device)
    model = make_model(recipe, 10, 3, device).train()
    optimizer, criterion = make_optimizer(model, recipe.optimizer, 0.001), make_criterion(recipe.loss, torch.ones(10))
    images, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    before, took = runtime.peak_memory_mb(device), []
    for _ in range(STEPS):
        started = time.perf_counter()
        train_step(model, images, labels, criterion, optimizer, autocast(precision, device)).loss.item()
        took.append(time.perf_counter() - started)
    after = runtime.peak_memory_mb(device)
    machine = runtime.machine(device, precision, mode)
    return {"seconds_a_step": round(statistics.median(took), 3), "memory_mb": round(after - before), "machine": machine}


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
        for name, how in (("kept", "no"), ("recomputed", "yes")):
            command = [sys.executable, __file__, "--one", net, str(batch), how]
            row[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row["memory_ratio"] = round(row["recomputed"]["memory_mb"] / row["kept"]["memory_mb"], 3)
        row["time_ratio"] = round(row["recomputed"]["seconds_a_step"] / row["kept"]["seconds_a_step"], 3)
        print(net, batch, f"memory {row['memory_ratio']:.2f}, time {row['time_ratio']:.2f}", flush=True)
        rows.append(row)
    record = {"command": "python benchmarks/recompute.py", "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
