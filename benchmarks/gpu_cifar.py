"""CIFAR-10 on a GPU: is the captured step right, how fast is it, and the paper's whole schedule with its errors.

    PYTHONPATH=src python benchmarks/gpu_cifar.py --minutes 9 --out benchmarks/results/gpu_cifar

In this order, as far as the minutes go: losses of the captured step against the eager one in fp32; a run resumed from each of
five checkpoints; images/s of every way to run a step, beside the plain loop; five seeds side by side against one; the 64,000
iterations of ResNet-20, 56 and 110. What does not fit is predicted from the measured speed, and said to be so. Prints one
table, writes OUT.json. Needs CIFAR-10 (RESLEARN_DATA or the cache).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import reslearn
from reslearn.bench.train import OurLoop, bench
from reslearn.device import pick_device
from reslearn.training import many, runtime
from reslearn.training.request import parse
from reslearn.training.run import begin, prepare

PAPER = {"resnet20": 8.75, "resnet56": 6.97, "resnet110": 6.43}  # DRL Table 6
STEPS = 64_000


def losses(net: str, mode: str, steps: int) -> list[float]:
    """The loss of each step in fp32, at a rate at which roundings do not grow."""
    settings = {"precision": "fp32", "schedule.lr": 0.0003, "execution": mode}
    job = prepare(parse("cifar10", "cifar10-paper", model=net, settings=settings, quiet=True))
    with runtime.deterministic(job.device):
        loop, found, before = OurLoop(job), [], 0.0
        for _ in range(steps):
            loop.step()
            loop.stepper.collect()
            found.append((loop.state.progress.loss - before) / job.recipe.batch.size)
            before = loop.state.progress.loss
    return found


def resumed(folder: Path) -> dict[str, int]:
    """Runs that were stopped after a checkpoint and went on, against the one that was not."""
    settings = ["schedule.steps=60", "schedule.drops=[40]", "checkpoint.every=10", "log.every=10", "data.val=500", "ema=0.9"]
    how: dict[str, Any] = {"model": "resnet20", "settings": settings, "quiet": True}
    whole = reslearn.train("cifar10", "cifar10-paper", out=folder / "whole", **how).folder
    same = 0
    for stop_at in (10, 20, 30, 40, 50):
        run = folder / f"stopped-{stop_at}"
        begin(parse("cifar10", "cifar10-paper", out=run, **how))
        process = subprocess.Popen([sys.executable, "-m", "reslearn", "train", "--resume", str(run)], stdout=subprocess.DEVNULL)
        while process.poll() is None and not (run / "checkpoints" / f"step-{stop_at:08d}").exists():
            time.sleep(0.005)
        process.kill()
        process.wait()
        reslearn.resume(run, quiet=True)
        one, other = (safetensors.torch.load_file(path / "model.safetensors") for path in (whole, run))
        same += all(torch.equal(one[name], other[name]) for name in one)
    return {"runs": 5, "identical": same}


def seeds_at_once(net: str, seeds: int, steps: int, folder: Path) -> dict[str, float]:
    """Seconds of training steps, of one seed alone and of several side by side."""
    took = {}
    for n in (1, seeds):
        settings = [f"schedule.steps={steps}", "schedule.drops=[]", "evaluate.every=1000000", f"checkpoint.every={steps}"]
        how: dict[str, Any] = {"model": net, "settings": settings, "quiet": True}
        out = folder / f"{net}-{n}"
        jobs = [begin(parse("cifar10", "cifar10-paper", seed=seed, out=out / str(seed), **how)) for seed in range(n)]
        runs = many.side_by_side(jobs)
        took[n] = max(run.result["seconds"] for run in runs)
    return {"net": net, "steps": steps, "one": took[1], f"{seeds}": took[seeds], "ratio": took[seeds] / took[1]}  # type: ignore[dict-item]


def whole_schedule(net: str, folder: Path) -> dict[str, Any]:
    """The paper's 64,000 iterations through the command line."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "reslearn", "train", "cifar10", "--model", net, "--recipe", "cifar10-paper"]
    subprocess.run([*command, "--set", "batch.micro=null", "--out", str(folder / net)], check=True, stdout=subprocess.DEVNULL)
    result = json.loads((folder / net / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / net / "metrics.jsonl").read_text().splitlines()]
    return {
        "net": net,
        "paper": PAPER[net],
        "test_error": result["last"]["test"]["top1_error"],
        "test_interval": result["last"]["test"]["top1_interval"],
        "training_seconds": result["seconds"],
        "command_seconds": round(time.perf_counter() - started, 1),
        "held_out": [[line["step"], line["top1_error"]] for line in lines if line["event"] == "eval"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_cifar"))
    options = parser.parse_args()
    end = time.perf_counter() + 60 * options.minutes
    device = pick_device()
    if device.type != "cuda":
        sys.exit("gpu_cifar.py needs a GPU; on a CPU run: reslearn bench train")
    record: dict[str, Any] = {"command": " ".join(sys.argv), "card": torch.cuda.get_device_name(), "versions": runtime.versions()}
    record["cuda"] = torch.version.cuda
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def note(key: str, value: Any) -> None:
        """Keep what is known so far, whatever happens later."""
        record[key] = value
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{key}: {json.dumps(value)[:400]}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        eager, captured = losses("resnet20", "eager", 50), losses("resnet20", "captured", 50)
        note("captured_against_eager", max(abs(a - b) for a, b in zip(eager, captured, strict=True)))
        note("resumed", resumed(folder))
        speeds: dict[str, dict[str, float]] = {}
        for net in PAPER:
            for mode in ("captured", "compiled", "eager"):
                try:
                    row = bench(net, settings=[f"execution={mode}"], rounds=3, steps=30)
                except Exception as error:  # a compiler that is not there must not cost the rest
                    print(f"{net} {mode}: {error}", flush=True)
                    continue
                speeds.setdefault(net, {"plain": row["speeds"][0]["images_per_s"]})[mode] = row["speeds"][-1]["images_per_s"]
            note("images_per_s", speeds)
        note("seeds", seeds_at_once("resnet110", 5, 1000, folder))
        rows = []
        for net in PAPER:
            predicted = STEPS * 128 / speeds[net]["captured"]
            if time.perf_counter() + 1.15 * predicted + 15 > end:
                rows.append({"net": net, "paper": PAPER[net], "predicted_seconds": round(predicted, 1)})
            else:
                rows.append(whole_schedule(net, folder))
            note("whole_schedules", rows)
    print(f"\n{'net':<11} {'plain':>9} {'captured':>9} {'x':>6} {'seconds':>9} {'test error':>11} {'paper':>6}")
    for row in rows:
        speed = speeds[row["net"]]
        seconds = f"{row['training_seconds']:.1f}" if "training_seconds" in row else f"~{row['predicted_seconds']:.0f}"
        error = f"{row['test_error']:.2f}" if "test_error" in row else "not run"
        ratio = speed["captured"] / speed["plain"]
        print(
            f"{row['net']:<11} {speed['plain']:>9,.0f} {speed['captured']:>9,.0f} {ratio:>6.1f} {seconds:>9} "
            f"{error:>11} {row['paper']:>6.2f}"
        )
    print(f"five seeds of ResNet-110 take {record['seeds']['ratio']:.2f} times as long as one")
    print(f"median speed-up over the plain loop {statistics.median(s['captured'] / s['plain'] for s in speeds.values()):.1f}")


if __name__ == "__main__":
    main()
