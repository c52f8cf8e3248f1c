"""Kills training runs with SIGKILL at random times, resumes them, and checks that the results equal uninterrupted runs'.

    python benchmarks/kill_and_resume.py --runs 50 --out benchmarks/results/kill_and_resume.json

Runs alternate between three settings: small images prepared in the loop, small images prepared by two threads, photos prepared by
two threads. Each has a warm-up that ends depending on the training error, a learning-rate drop, several epochs, micro-batches and
a weight average.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import safetensors.numpy
from PIL import Image

STEPS, DROP = 150, 130  # the warm-up ends at step 100, where the training error is first measured
COMMON = (
    f"schedule.steps={STEPS} schedule.drops=[{DROP}] schedule.warmup_lr=0.01 schedule.warmup_until=99 schedule.lr=0.05 "
    "batch.size=32 batch.micro=16 ema=0.9 log.every=7 evaluate.every=10 checkpoint.every=4 optimizer.style=caffe"
).split()
SMALL = ["schedule.shape=steps", "schedule.warmup=0", "data.val=200"]
PHOTOS = ["schedule.shape=steps", "schedule.warmup=0", "data.size=32", "data.crop_scale=[0.4,1]", "data.workers=2"]
SETTINGS = {
    "in the loop": ("small", "fashion", [*SMALL, "data.workers=0"]),
    "two threads": ("small", "fashion", [*SMALL, "data.workers=2"]),
    "photos": ("photos", "default", PHOTOS),
}


def make_data(folder: Path) -> dict[str, str]:
    """Writes two folders of random images: 600 small ones and 60 photos. Returns their paths."""
    rng = np.random.default_rng(0)
    for kind, n, (h, w) in (("small", 600, (28, 28)), ("photos", 60, (90, 120))):
        for i in range(n):
            path = folder / kind / "train" / "abc"[i % 3] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (h, w, 3 if kind == "photos" else 1)).squeeze() // (1 + i % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return {kind: str(folder / kind) for kind in ("small", "photos")}


def start(arguments: list[str], log: Path, cache: Path, launcher: Sequence[str] = ()) -> subprocess.Popen:
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "reslearn", "train", *arguments]
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment)


def metrics(run: Path) -> list[dict]:
    """The complete lines of metrics.jsonl, without times."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in text.splitlines(True) if line.endswith("\n")]


def state(run: Path) -> dict:
    """Everything that must be identical: weights, optimizer, weight average, best weights, progress, metrics."""
    (last,) = sorted((run / "checkpoints").iterdir())[-1:]
    tensors = {}
    for file in (*sorted(last.glob("*.safetensors")), run / "model.safetensors", run / "best.safetensors"):
        for name, array in safetensors.numpy.load_file(file).items():
            tensors[f"{file.name}:{name}"] = (array.dtype.str, array.shape, array.tobytes())
    progress = json.loads((last / "state.json").read_text())
    for key in ("seconds", "metrics_bytes"):
        del progress[key]
    return {"checkpoint": last.name, "tensors": tensors, "progress": progress, "metrics": metrics(run)}


def wait(process: subprocess.Popen, log: Path) -> None:
    if process.wait(timeout=600) != 0:
        sys.exit(f"a run failed:\n{log.read_text()[-6000:]}")


def finish(rows: list[dict], out: Path | None, **facts: object) -> NoReturn:
    """Writes the results and exits, with status 1 unless all runs are identical."""
    same = sum(row["identical"] for row in rows)
    if out:
        facts = {"command": "python " + " ".join(sys.argv), "runs": len(rows), "identical": same, **facts}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**facts, "python": platform.python_version(), "rows": rows}, indent=1) + "\n")
    print(f"{same} of {len(rows)} identical")
    sys.exit(same != len(rows))


def run_killed(new: list[str], run: Path, kill_at: float, log: Path, cache: Path) -> int:
    """Starts a run, kills it `kill_at` seconds after its first step, and resumes it to the end. Returns the last step before."""
    process = start(new, log, cache)
    while process.poll() is None and not metrics(run):
        time.sleep(0.002)
    time.sleep(kill_at)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = max((line["step"] for line in metrics(run)), default=0)
    wait(start(["--resume", str(run)], log, cache), log)
    return killed_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="random seed of the times")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    times, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, cache, log = make_data(folder), folder / "cache", folder / "log"
        expected, seconds, commands = {}, {}, {}
        turns = [list(SETTINGS)[(options.seed + i) % len(SETTINGS)] for i in range(options.runs)]
        for setting in dict.fromkeys(turns):
            kind, recipe, settings = SETTINGS[setting]
            commands[setting] = [data[kind], "--model", "resnet8", "--recipe", recipe]
            commands[setting] += [f"--set={s}" for s in (*settings, *COMMON)]
            run = folder / f"whole {setting}"
            wait(start([*commands[setting], "--out", str(run)], log, cache), log)
            expected[setting] = state(run)
            rates = {line["lr"] for line in expected[setting]["metrics"] if line["event"] == "train"}
            assert len(rates) == 3, f"expected three learning rates (warm-up, base, after the drop), not {rates}"
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            seconds[setting] = lines[-1]["time"].get("seconds", 0) + max(line["time"]["seconds"] for line in lines)
        for i, setting in enumerate(turns):
            run = folder / f"run-{i}"
            new = [*commands[setting], "--out", str(run)]
            step = run_killed(new, run, times.random() * seconds[setting], log, cache)
            actual = state(run)
            differs = [key for key in actual if actual[key] != expected[setting][key]]
            rows.append({"setting": setting, "killed_at_step": step, "identical": not differs, "differs": differs})
            print(f"{i + 1:3d}/{options.runs}  {setting:<12} killed after step {step:3d}  {differs or 'identical'}", flush=True)
    finish(rows, options.out, steps=STEPS)


if __name__ == "__main__":
    main()
