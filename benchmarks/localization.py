"""Localization on blood cells, in the shape of DRL Tables 13 and 14: the true class given, and predicted; one crop and dense.

    python benchmarks/localization.py path/to/bccd --work localization --out benchmarks/results/localization.json

Cuts windows of one cell each out of BCCD's photos (splits as they are), trains ResNet-18 at 96 px to name them, then to localize
them: from that classifier, and from scratch. What is in the work folder already is used. The paper's numbers stand beside ours
for the shape of the table alone: they are of 1000 classes of ImageNet at 224 px. About 10 minutes on one free core.
"""

import argparse
import json
from pathlib import Path

import reslearn
from reslearn.files import write_text
from reslearn.localize import evaluate, resume, train
from reslearn.localize.crops import cut_out
from reslearn.training import runtime

SIZE, DENSE, MANY = 96, 110, (112, 128, 144)
NAMING = [f"data.size={SIZE}", "data.crop_ratio=0.875", "batch.size=32", "schedule.epochs=6"]
SCHEDULE = {"lr": 0.03, "shape": "cosine", "warmup": 0.05}
RUNS = {"fine-tuned": {"epochs": 3, "iou": (0.3, 0.5)}, "from scratch": {"epochs": 6, "iou": (0.3, 0.7)}}
# localization error, %; DRL Table 13 (the true class given; then the top 5 of predicted classes) and Table 14
PAPER = {
    "true class given": {"VGG-16, 1 crop": 33.1, "ResNet-101, 1 crop": 13.3, "ResNet-101, dense": 11.7},
    "top-5, predicted classes": {"ResNet-101, dense": 14.4, "with R-CNN": 10.6, "ensemble, val": 8.9, "ensemble, test": 9.0},
}


def trained(cells: Path, folder: Path, kinds: Path | None, epochs: int, iou: tuple[float, float]) -> None:
    """A localizer of the cells in a folder, which goes on where it stopped."""
    start = {"net": "resnet18"} if kinds is None else {"init": str(kinds)}
    if (folder / "localize.json").exists():
        resume(folder)
    else:
        train(cells, folder, **start, size=SIZE, batch=32, iou=iou, schedule={"epochs": epochs, **SCHEDULE})


def tested(model: Path, kinds: Path, cells: Path) -> dict:
    """Ours, of one model: view, whose class, error."""
    found, of = [], {}
    one, many = (evaluate(model, cells, classifier=kinds, scales=scales) for scales in ((), MANY))
    seen = {"1 crop": one["1-crop"], f"dense, {DENSE} px": one["dense"], f"dense, {MANY} px": many["dense"]}
    for view, numbers in seen.items():
        for key, what in (("true_class", "true class given"), ("top1", "top-1, predicted class")):
            found.append({"view": view, "classes": what, **numbers[key]})
        of[view] = numbers["per_class"]
    return {"n": one["n"], "rows": found, "per_class": of, "classification": one["1-crop"]["classification"]}


def main() -> None:
    """Cut, train, test, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("localization"))
    parser.add_argument("--out", type=Path, default=Path("localization.json"))
    parser.add_argument("--only", choices=RUNS, help="One of the two.")
    given = parser.parse_args()
    cells, kinds = given.work / "cells", given.work / "kinds"
    if not cells.exists():
        given.work.mkdir(parents=True, exist_ok=True)
        cut_out(given.data, cells, bad="drop")
    if not (kinds / "result.json").exists():
        reslearn.train(str(cells), "resnet18", settings=NAMING, out=kinds)
    result = {
        "command": f"python benchmarks/localization.py path/to/bccd --work localization --out {given.out}"
        + (f" --only '{given.only}'" if given.only else ""),
        "versions": runtime.versions(),
        "net": "resnet18",
        "size": SIZE,
        "windows": {split.name: len(list(split.glob("*/*.png"))) for split in sorted(cells.iterdir())},
        "not_comparable": "3 classes of cells at 96 px, one seed; the paper's are 1000 classes of ImageNet at 224 px",
        "paper": PAPER,
        "ours": {},
    }
    for name, how in RUNS.items():
        if given.only not in (None, name):
            continue
        folder = given.work / name.replace(" ", "-")
        trained(cells, folder, kinds if name == "fine-tuned" else None, **how)
        result["ours"][name] = {**how, **tested(folder, kinds, cells)}
        write_text(given.out, json.dumps(result, indent=1) + "\n")
        for row in result["ours"][name]["rows"]:
            low, high = row["interval"]
            print(f"{name:<14}{row['view']:<28}{row['classes']:<24}{row['error']:6.2f}%  ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
