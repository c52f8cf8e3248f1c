"""Short seeded runs whose weights and numbers must stay what they are: `python tests/goldens.py` compares them with goldens.json.

    python tests/goldens.py                    # all cases, side by side with the record
    python tests/goldens.py residual c4        # those whose names begin so
    python tests/goldens.py --record           # write the record anew: say in the commit what changed, and why

A case is a command line. Weights are compared by their sha256 (without the tensors' names), losses and final numbers exactly. The
same bits are promised on the same machine with the same PyTorch only; elsewhere `tests/test_goldens.py` compares the losses up to a
tolerance. All cases run on one thread of a CPU.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import boxed
import drawing
import painted_sets

RECORD = Path(__file__).with_name("goldens.json")
VARYING = ("time", "seconds", "images_per_s", "peak_memory_mb")
RECORDED_OF_CPU = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags")


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


FASHION = [
    "train fashion-sample",
    *settings("schedule.steps=12", "schedule.lr=0.02", "batch.size=32", "evaluate.every=6", "log.every=3", "data.val=200"),
]
DETECT = [
    "detect train",
    *settings("schedule.steps=6", "detector.min_size=48", "detector.max_size=64", "log.every=2", "evaluate.every=3"),
]
LOCALIZE = ["localize train DATA/painted", *settings("batch.size=8", "log.every=1")]
CROPS = settings("data.size=32", "data.jitter=[32,48]")
PHOTOS = settings("batch.size=8", "data.size=64", "log.every=2")
MANY_STEPS = ["--recipe imagenet-fast", *PHOTOS, *settings("schedule.steps=6", "evaluate.every=3", "data.grow=[32,64]")]
FEW_STEPS = ["--recipe imagenet-classic", *PHOTOS, *settings("schedule.steps=4", "evaluate.every=2")]
MANY = ("net.shortcut=A", "ema=0.9", "batch.micro=16", "optimizer.style=caffe", "precise_bn=2", "loss.label_smoothing=0.1")
MASKS = settings("detector.kind=fpn", "detector.masks=true", "schedule.lr=0.002")
ALTERNATING = settings("alternate=[1,1,1,1]", "schedule.steps=8", "schedule.warmup=0", "batch.micro=1")
FINE_TUNE = settings("net.frozen=2", "optimizer.backbone_lr=0.1", "loss.class_weights=auto")

# Each of these on the eager and on the fused path. DATA: the folder of sets; RUN/NAME: the run of a case above.
BOTH: dict[str, list[str]] = {
    "residual": [*FASHION, "--model resnet20"],
    "plain": [*FASHION, "--model plain20"],
    "pre-activation": [*FASHION, "--model preact-resnet20"],
    "highway": [*FASHION, "--model highway-19"],
    "stochastic-depth": [*FASHION, "--model resnet20", *settings("net.last_survival=0.5")],
    "bottleneck": [*FASHION, "--model preact-resnet164", *settings("schedule.steps=3", "batch.size=8")],
    "options": [*FASHION, "--model resnet20", *settings(*MANY)],
    "fp32": [*FASHION, "--model resnet20", *settings("precision=fp32", "net.order=relu-only")],
    "photos": ["train DATA/photos --model resnet18", *MANY_STEPS, *settings("precision=fp32")],
    "photos-bf16": ["train DATA/photos --model resnet50", *FEW_STEPS],
    "fine-tune": ["train DATA/photos --init RUN/photos-eager", *FEW_STEPS, *FINE_TUNE],
    "c4": [*DETECT, "DATA/cells --model resnet18"],
    "c4-init": [*DETECT, "DATA/cells --init RUN/photos-eager", *settings("detector.frozen=2")],
    "fpn-masks": [*DETECT, "DATA/masked --model resnet18", *MASKS],
    "alternating": [*DETECT, "DATA/cells --model resnet18", *ALTERNATING],
}
CASES: dict[str, list[str]] = {
    f"{name}-{execution}": [*words, *settings(f"execution={execution}")]
    for name, words in BOTH.items()
    for execution in ("eager", "fused")
} | {
    "localize": [*LOCALIZE, "--model resnet8", *CROPS, *settings("schedule.epochs=3", "schedule.lr=0.03")],
    "localize-init": [*LOCALIZE, "--init RUN/photos-eager", *CROPS, *settings("schedule.epochs=2", "schedule.lr=0.003")],
    "refine": [
        *LOCALIZE,
        "--recipe localize-regions --init RUN/localize",
        *settings("localizer.proposals=20", "schedule.epochs=3"),
    ],
}
RANKS: dict[str, list[str]] = {f"{name}-ranks": CASES[name] for name in ("residual-eager", "residual-fused", "c4-eager")}


def masked_set(root: Path) -> None:
    """A COCO folder of noise with one colored pentagon in each image, outlined."""
    numbers = np.random.default_rng(7)
    for split, count in {"train": 8, "val": 3}.items():
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            pixels = numbers.integers(90, 150, (48, 64, 3)).astype(np.uint8)
            x, y, w, h = (int(numbers.integers(low, high)) for low, high in ((0, 30), (0, 20), (16, 30), (16, 26)))
            polygon = [x, y, x + w, y, x + w, y + h, x + w // 2, y + h // 2, x, y + h]
            picture = Image.fromarray(pixels)
            ImageDraw.Draw(picture).polygon(polygon, fill=[(220, 60, 40), (40, 80, 220)][i % 2])
            picture.save(root / split / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{i}.png", "height": 48, "width": 64})
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [polygon]}
            annotations.append({"id": i + 1, "image_id": i + 1, "category_id": i % 2 + 1, **box})
        kinds = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
        document = {"images": images, "annotations": annotations, "categories": kinds}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))


def make_sets(root: Path) -> None:
    """The sets that the cases are trained on, the same on every machine."""
    drawing.draw_images(root / "photos", classes=["cat", "dog"], each=14, size=(100, 140))
    boxed.shapes(root / "cells")
    boxed.shapes(root / "cells", images=3, split="test")
    masked_set(root / "masked")
    painted_sets.write_set(root / "painted", {"train": 16, "val": 6, "test": 8})


def machine() -> str:
    """What the last bits depend on: the processor and PyTorch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    known = sorted({line for line in lines if line.partition("\t")[0].strip() in RECORDED_OF_CPU})
    return f"torch {torch.__version__}, processor {hashlib.sha256(chr(10).join(known).encode()).hexdigest()[:16]}"


def digest_weights(path: Path) -> str:
    """A sha256 of the tensors in a model file, whatever their names."""
    digests = []
    for tensor in load_file(path).values():
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digests.append(hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def values(found: Any) -> list[Any]:
    """Every number and text in nested JSON, in order, but for what varies from run to run."""
    if isinstance(found, dict):
        return [value for key, inner in found.items() if key not in VARYING for value in values(inner)]
    if isinstance(found, list):
        return [value for inner in found for value in values(inner)]
    return [found] if isinstance(found, int | float | str) and not isinstance(found, bool) else []


def run(name: str, root: Path) -> dict[str, Any]:
    """Train a case in root/runs/NAME. Raises RuntimeError where the command fails."""
    if not (root / "data").exists():
        make_sets(root / "data")
    words, ranks = RANKS.get(name, CASES.get(name, [])), 2 if name in RANKS else 1
    for needed in re.findall(r"RUN/(\S+)", " ".join(words)):
        if not (root / "runs" / needed).exists():
            run(needed, root)
    line = " ".join(words).replace("DATA/", f"{root}/data/").replace("RUN/", f"{root}/runs/")
    start = ["-m", "reslearn"]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *start]
    out = root / "runs" / name
    command = [sys.executable, *start, *line.split(), "--out", str(out), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return read(out)


def read(out: Path) -> dict[str, Any]:
    """What is recorded of a run folder."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((out / "result.json").read_text())
    seen = {
        "weights": digest_weights(out / "model.safetensors"),
        "losses": [line["loss"] for line in lines if "loss" in line],
        "log": hashlib.sha256(json.dumps(values(lines)).encode()).hexdigest(),
        "result": hashlib.sha256(json.dumps(values(result)).encode()).hexdigest(),
    }
    return seen | ({"best": digest_weights(out / "best.safetensors")} if (out / "best.safetensors").exists() else {})


def main(words: list[str]) -> int:
    record, only = "--record" in words, tuple(word for word in words if not word.startswith("--"))
    names = [name for name in (*CASES, *RANKS) if not only or name.startswith(only)]
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {"machine": "", "cases": {}}
    if before["machine"] != machine():
        print(f"recorded on another machine ({before['machine']}; here: {machine()}): the last bits may differ")
    now, differing = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            now[name], old = run(name, Path(folder)), before["cases"].get(name, {})
            different = [key for key in {**old, **now[name]} if old.get(key) != now[name].get(key)]
            differing += [name] if different else []
            print(f"{name:<26}{'same' if not different else 'DIFFERS in ' + ', '.join(different)}", flush=True)
    if record:
        RECORD.write_text(json.dumps({"machine": machine(), "cases": before["cases"] | now}, indent=1) + "\n")
    return 1 if differing and not record else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
