"""The constructed solution on CIFAR-10: deepens published ResNet-20 weights, compares the outputs, and continues training.

    python benchmarks/deepen_published.py --weights resnet20-12fca82f.th --out benchmarks/results/deepen_published

Deepens the imported network, and a plain-20 trained here for a few steps, to 32, 44, 56 and 110 layers; compares the logits of
all 10,000 test images; trains ResNet-20 and the deepened ResNet-56 for some more steps on the same batches.
Writes OUT.json and OUT.png. Needs CIFAR-10 (RESLEARN_DATA or the cache); takes about 15 minutes on two cores.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import reslearn
from reslearn import data
from reslearn.data.images.resident import Resident
from reslearn.evaluation.protocols import single_view
from reslearn.weights.deepened import deepen_model
from reslearn.weights.read import import_weights

DEPTHS = (32, 44, 56, 110)


def test_logits(model: Path) -> tuple[Tensor, Tensor]:
    """float32 logits (10000, 10) and labels of CIFAR-10's test images."""
    net = reslearn.load(model)
    predictions = single_view(net, Resident(data.open("cifar10").splits["test"], net.card.preprocessing))
    return predictions.logits, predictions.labels


def deepened(shallow: Path, family: str, folder: Path, data_name: str | None) -> list[dict]:
    """One row per deeper network: test error, changed predictions, largest difference of a logit."""
    before, labels = test_logits(shallow)
    rows = []
    for depth in DEPTHS:
        path = folder / f"{family}{depth}.safetensors"
        deepen_model(shallow, f"{family}{depth}", path, data=data_name)
        after, _ = test_logits(path)
        row = {
            "net": f"{family}{depth}",
            "top1_error_before": 100 * (before.argmax(1) != labels).double().mean().item(),
            "top1_error": 100 * (after.argmax(1) != labels).double().mean().item(),
            "images": len(labels),
            "predictions_changed": int((after.argmax(1) != before.argmax(1)).sum()),
            "largest_logit_difference": (after - before).abs().max().item(),
            "largest_logit": before.abs().max().item(),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def continue_training(model: Path, steps: int, folder: Path) -> dict:
    """Trains with the paper's last learning rate. Returns the test error and the loss of every ten steps."""
    settings = [f"schedule.steps={steps}", "schedule.drops=[]", "schedule.lr=0.001", "log.every=10"]
    run = reslearn.train(
        "cifar10", recipe="cifar10-paper", settings=settings, init=model, out=folder / f"on-{model.stem}", quiet=True
    )
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "net": model.stem,
        "settings": settings,
        "test_error": run.result["last"]["test"]["top1_error"],
        "curve": [{key: line[key] for key in ("step", "loss", "error")} for line in lines if line["event"] == "train"],
    }


def draw(curves: list[dict], path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="iterations", ylabel="training loss", title="Continued training from the same function")
    for curve, style in zip(curves, ("-", "--"), strict=True):
        points = curve["curve"]
        axes.plot([p["step"] for p in points], [p["loss"] for p in points], style, label=curve["net"])
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="published ResNet-20 weights for CIFAR-10")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deepen_published"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shallow, _ = import_weights(options.weights, out=folder / "resnet20.safetensors")
        rows = deepened(shallow, "resnet", folder, None)
        plain = reslearn.train(
            "cifar10",
            "cifar10-paper",
            model="plain20",
            settings={"schedule.steps": options.steps},
            out=folder / "plain",
            quiet=True,
        )
        rows += deepened(plain.folder / "model.safetensors", "plain", folder, "cifar10")
        curves = [continue_training(path, options.steps, folder) for path in (shallow, folder / "resnet56.safetensors")]
    record = {
        "command": f"python benchmarks/deepen_published.py --weights {options.weights.name} --steps {options.steps}",
        "versions": {"reslearn": reslearn.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "deepened": rows,
        "trained_on": curves,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(curves, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
