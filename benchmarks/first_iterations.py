"""The first iterations of the paper's CIFAR-10 training for ResNet-20 and plain-20: loss, error, speed, memory.

    python benchmarks/first_iterations.py --steps 1200 --out benchmarks/results/first_iterations

Writes OUT.json and OUT.png. Needs CIFAR-10 (RESLEARN_DATA or the cache); takes about five minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

NETS = ("resnet20", "plain20")


def train(net: str, steps: int, folder: Path) -> dict:
    command = f"reslearn train cifar10 --model {net} --recipe cifar10-paper".split()
    command += [f"--set=schedule.steps={steps}", "--set=log.every=50", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    result = json.loads((folder / "result.json").read_text())
    facts = json.loads((folder / "recipe.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [line for line in lines if line["event"] == "train"]
    speeds = sorted(line["time"]["images_per_s"] for line in curve)
    last = result["last"]
    return {
        "net": net,
        "command": " ".join(command[:-1]) + f" runs/{net}",
        "machine": facts["machine"],
        "versions": facts["versions"],
        "training_loss": curve[-1]["loss"],
        "training_error": curve[-1]["error"],
        "test_error": last["test"]["top1_error"],
        "test_interval": last["test"]["top1_interval"],
        "held_out_error": last["val"]["top1_error"],
        "images_per_s": {"median": speeds[len(speeds) // 2], "lowest": speeds[0], "highest": speeds[-1]},
        "seconds": result["seconds"],
        "peak_memory_mb": result["peak_memory_mb"],
        "curve": [{k: line[k] for k in ("step", "lr", "loss", "error")} for line in curve],
        "held_out": [{k: line[k] for k in ("step", "loss", "top1_error")} for line in lines if line["event"] == "eval"],
    }


def draw(rows: list[dict], path: Path) -> None:
    """Training error dashed, validation error bold, as in the paper's Figure 6."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iterations", ylabel="error (%)", title="CIFAR-10, the paper's recipe, first iterations")
    for row, color in zip(rows, ("tab:red", "tab:blue"), strict=True):
        axes.plot(*zip(*((p["step"], p["error"]) for p in row["curve"]), strict=True), "--", lw=1, color=color)
        validation = [(p["step"], p["top1_error"]) for p in row["held_out"]]
        axes.plot(*zip(*validation, strict=True), "o-", lw=2.5, color=color, label=f"{row['net']}: test {row['test_error']:.2f}%")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/first_iterations"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [train(net, options.steps, Path(folder) / net) for net in NETS]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": "python " + " ".join(sys.argv), "steps": options.steps, "runs": rows}
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
