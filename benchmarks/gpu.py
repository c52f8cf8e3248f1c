"""GPU checks and benchmarks in four parts of at most ten minutes each. Not run on a GPU yet; --smoke runs each part on a CPU.

    python benchmarks/gpu.py cifar       captured against eager steps, a resumed run, images/s, the paper's schedules
    python benchmarks/gpu.py table6      Table 6 and Figures 1 and 6 with the paper's protocol; repeat until it is done
    python benchmarks/gpu.py imagenet    ResNet-50 steps against torchvision's in a plain loop; --data FOLDER: also from photos
    python benchmarks/gpu.py detection --data bccd    FPN and C4 against torchvision's FPN: agreement, training, inference

Each part writes the GPU, the versions and its figures to OUT (JSON) as soon as they are measured. cifar and table6 need CIFAR-10.
"""

import argparse
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import functional as T

import reslearn
from reslearn.bench import limits
from reslearn.bench.train import OurLoop, bench
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.classify.task import CLASSIFY, ImageExamples, cross_entropy
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.read import open_boxes
from reslearn.data.boxes.source import BoxSource, Target
from reslearn.data.images.stream import ahead
from reslearn.detect import create_detector, load_detector, save_detector
from reslearn.detect.evaluate import TestOptions, find
from reslearn.detect.validation import to_device
from reslearn.device import autocast, pick_device, pick_precision
from reslearn.nets import create
from reslearn.nets.cost import cost
from reslearn.training import runtime
from reslearn.training.precise_bn import precise_bn
from reslearn.training.recipe import validate
from reslearn.training.request import parse
from reslearn.training.run import prepare
from reslearn.training.state import State
from reslearn.training.step import LossModule, update
from reslearn.training.task import Phase

NET = "resnet50-v1.5"  # torchvision's
SECONDS, GRACE = 540, 30  # time limit of a part; time for an interrupted run to save a checkpoint
Batch = tuple[list[Tensor], list[Target]]


class Record:
    """The figures of one part, written as soon as they are measured, and its time limit."""

    def __init__(self, part: str, out: Path, device: torch.device) -> None:
        self.out, self.end = out, time.monotonic() + SECONDS
        self.facts: dict[str, Any] = {"part": part, "command": " ".join(["python", *sys.argv])}
        self.facts["card"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: a CPU"
        self.facts["versions"] = runtime.versions() | {"torchvision": torchvision.__version__, "cuda": torch.version.cuda}
        self.facts["figures"] = {}

    def left(self) -> float:
        """Seconds until the time limit."""
        return self.end - time.monotonic()

    def note(self, name: str, figure: Any) -> None:
        self.facts["figures"][name] = figure
        self.out.write_text(json.dumps(self.facts, indent=1) + "\n")
        print(f"{name}: {json.dumps(figure)}", flush=True)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "reslearn", *map(str, words)]


def seconds(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds per step, measured over `steps` steps."""
    limits.wait_for(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    limits.wait_for(device)
    return (time.perf_counter() - started) / steps


def rounds(cases: dict[str, Callable[[], object]], batch: int, count: int, steps: int, device: torch.device) -> dict[str, float]:
    """Images/s of each case in alternating rounds: medians without the first round."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(count + 1):
        for name, step in cases.items():
            times[name].append(seconds(step, steps, device))
    return {name: round(batch / statistics.median(values[1:]), 2) for name, values in times.items()}


# ---- cifar


def losses(data: str, recipe_name: str, net: str, mode: str, steps: int, device: torch.device) -> list[float]:
    """The loss of each step in fp32, at a learning rate low enough that rounding errors do not grow."""
    settings = {"precision": "fp32", "schedule.lr": 0.0003, "execution": mode}
    job = prepare(parse(data, recipe_name, model=net, settings=settings, device=str(device), quiet=True))
    with runtime.deterministic(device):
        loop, sums = OurLoop(job), [0.0]
        for _ in range(steps):
            loop.step()
            loop.stepper.collect()
            sums.append(loop.state.progress.loss)
    return [(after - before) / job.recipe.batch.size for before, after in pairwise(sums)]


def resume_is_exact(data: str, recipe: str, net: str, smoke: list[str], folder: Path, device: str) -> bool:
    """Whether a run that is killed after a checkpoint and resumed has the same weights as an uninterrupted run."""
    schedule = ["schedule.steps=60", "schedule.drops=[40]"] if recipe == "cifar10-paper" else ["schedule.steps=60"]
    settings = [*smoke, *schedule, "checkpoint.every=10", "log.every=10", "data.val=500", "ema=0.9"]
    whole = reslearn.train(data, model=net, recipe=recipe, settings=settings, out=folder / "whole", device=device, quiet=True)
    words = ("train", data, "--model", net, "--recipe", recipe, "--out", folder / "killed", "--device", device)
    process = subprocess.Popen(command(*words, *(f"--set={setting}" for setting in settings)), stdout=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "killed" / "checkpoints" / "step-00000020").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    reslearn.resume(folder / "killed", device=device, quiet=True)
    one, other = (safetensors.torch.load_file(run / "model.safetensors") for run in (whole.folder, folder / "killed"))
    return all(torch.equal(one[name], other[name]) for name in one)


def train_results(words: tuple[object, ...], out: Path) -> list[dict[str, Any]]:
    """Runs a training command with one or several seeds and returns the results."""
    subprocess.run(command(*words, "--out", out), check=True, stdout=subprocess.DEVNULL)
    return [json.loads(file.read_text()) for file in sorted([*out.glob("result.json"), *out.glob("seed-*/result.json")])]


def cifar(record: Record, options: argparse.Namespace, folder: Path) -> None:
    smoke, device = options.smoke, options.device
    data, recipe, nets = ("fashion-sample", "fashion", {"resnet8": 0.0}) if smoke else ("cifar10", "cifar10-paper", {})
    nets = nets or {"resnet20": 8.75, "resnet56": 6.97, "resnet110": 6.43}  # DRL Table 6
    modes = ("eager", "fused") if smoke else ("eager", "captured", "compiled")
    first, smoke_settings = next(iter(nets)), ["batch.size=8"] if smoke else []
    eager, other = (losses(data, recipe, first, mode, 2 if smoke else 50, device) for mode in modes[:2])
    record.note(f"largest difference of a loss, {modes[1]} and eager", max(abs(a - b) for a, b in zip(eager, other, strict=True)))
    record.note("resumed run identical", resume_is_exact(data, recipe, first, smoke_settings, folder, str(device)))
    speeds: dict[str, dict[str, float]] = {}
    for net in nets:
        for mode in modes[1:]:
            arguments = {"settings": [f"execution={mode}"], "device": str(device), "batch": 16 if smoke else 128}
            try:
                row = bench(net, data, rounds=1 if smoke else 3, steps=1 if smoke else 30, **arguments)
            except Exception as error:  # continue without a compiler
                print(f"{net}, {mode}: {error}", flush=True)
                continue
            speeds.setdefault(net, {"plain loop": row["speeds"][0]["images_per_s"]})[mode] = row["speeds"][-1]["images_per_s"]
        record.note("images/s", speeds)
    net, steps = ("resnet8", 2) if smoke else ("resnet110", 1000)
    settings = [f"schedule.steps={steps}", *(smoke_settings or ["schedule.drops=[]"])]
    words = ("train", data, "--model", net, "--recipe", recipe, "--device", device, *(f"--set={setting}" for setting in settings))
    times = {}
    for n in (1, 2 if smoke else 5):
        times[n] = max(result["seconds"] for result in train_results((*words, "--seeds", n), folder / f"{n}-seeds"))
    record.note(f"seconds of {steps} steps of {net}, by seeds trained side by side", times)
    for net, published in ({} if smoke else nets).items():
        expected = 64_000 * 128 / speeds[net]["captured"]
        if 1.15 * expected + 15 > record.left():
            record.note(f"{net}, 64,000 steps", {"expected_seconds": round(expected), "published_error": published})
            continue
        [result] = train_results(("train", data, "--model", net, "--recipe", recipe, "--set", "batch.micro=null"), folder / net)
        error = {key: result["last"]["test"][key] for key in ("top1_error", "top1_interval")}
        record.note(f"{net}, 64,000 steps", {"seconds": result["seconds"], **error, "published_error": published})


# ---- table6

WORK = [  # (experiment, network, seeds), short runs first
    *[("table6", f"resnet{depth}", 3) for depth in (20, 32, 44, 56)],
    *[("figure1", net, 3) for net in ("plain20", "plain56")],
    ("table6", "resnet110", 5),
    ("table6", "resnet1202", 1),
]


def table6(record: Record, options: argparse.Namespace, folder: Path) -> None:
    """Keeps its runs and the page in --work."""
    scale, work = ("smoke", [("figure1", "plain20", 1)]) if options.smoke else ("paper", WORK)
    pages = {"figure1": 1} if options.smoke else {"table6": 5, "figure1": 3, "figure6": 3}
    out = folder if options.smoke else options.work
    common = ("--scale", scale, "--out", out, "--device", options.device)
    for experiment, net, seeds in work:
        process = subprocess.Popen(command("reproduce", experiment, "--only", net, "--seeds", seeds, *common))
        try:
            code = process.wait(max(1.0, record.left() - GRACE))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(GRACE)
            record.note("done", f"not yet; {net} of {experiment} was interrupted: run this again")
            return
        if code:
            sys.exit(code)
    for experiment, seeds in pages.items():
        subprocess.run(command("reproduce", experiment, "--no-train", "--seeds", seeds, *common), check=True)
    record.note("done", str(out / "index.html"))


# ---- imagenet


def imagenet(record: Record, options: argparse.Namespace, folder: Path) -> None:
    """Steps on images resident on the device; with --data also on random crops of photos, prepared by threads."""
    device, (images, classes) = options.device, (4, 10) if options.smoke else (256, 1000)
    cast, generator = autocast(pick_precision("auto", device), device), torch.Generator().manual_seed(0)
    for size in (64,) if options.smoke else (224, 160):
        pixels = torch.randint(0, 255, (images, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
        labels = torch.randint(0, classes, (images,), generator=generator).to(device)
        theirs = torchvision.models.resnet50(num_classes=classes).to(device).train()
        sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        ours: nn.Module = create(NET, classes).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        recipe = validate({"net": {"name": NET}, "schedule": {"steps": 1}, "batch": {"size": images}}, ClassifyRecipe)
        state, loss = State(ours, recipe, (Phase(1),), CLASSIFY), cross_entropy(recipe.loss, torch.ones(classes))

        def plain(x: Tensor = pixels, y: Tensor = labels, model: nn.Module = theirs, sgd: torch.optim.SGD = sgd) -> None:
            sgd.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(model(x.float().mul_(1 / 58.0).sub_(2.0)), y)
            loss.backward()
            sgd.step()
            loss.item()

        def own(model: Any, x: Tensor = pixels, y: Tensor = labels, state: State = state, loss: Any = loss) -> None:
            examples = ImageExamples(x.float().mul_(1 / 58.0).sub_(2.0), y)
            update(LossModule(model, loss, cast), examples, state, lambda outcome: outcome.loss.item())

        cases: dict[str, Callable[[], object]] = {"torchvision, plain loop": plain, "reslearn, eager": lambda m=ours: own(m)}
        if not options.smoke:
            compiled = torch.compile(ours, dynamic=False)
            cases["reslearn, compiled"] = lambda m=compiled: own(m)
        if options.data:
            settings = {"batch.size": images, "data.size": size, "data.cache": "off", "execution": "eager"}
            request = parse(options.data, "imagenet-classic", model=NET, settings=settings, device=str(device), quiet=True)
            loop = OurLoop(prepare(request))
            batches = ahead(loop.stepper.prepare, range(10**6), options.workers)
            cases["reslearn, eager, from photos"] = lambda b=batches, s=loop: s.step(next(b))
        speeds = rounds(cases, images, 1 if options.smoke else 5, 1 if options.smoke else 20, device)
        limit = limits.matrix_rate(device, pick_precision("auto", device)) / (3 * cost(create(NET), (3, size, size)).macs)
        record.note(f"images/s at {size} px, batch {images}", speeds | {"limit by multiply-adds": round(limit, 1)})


# ---- detection


class Files(Dataset[tuple[Tensor, Target]]):
    """Images read with Pillow as float32, like in torchvision's references, but without flips."""

    def __init__(self, split: BoxSet) -> None:
        self.images = split.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Target]:
        with Image.open(self.images[i].path) as file:
            image = T.pil_to_tensor(file.convert("RGB"))
        return T.to_dtype(image, torch.float32, scale=True), self.images[i].target()


def as_lists(batch: list[tuple[Tensor, Target]]) -> Batch:
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def torchvision_fpn(split: BoxSet, batch_norm: str, sizes: dict[str, int], regions: int, device: torch.device) -> nn.Module:
    """torchvision's FPN from scratch, with the BN statistics of some images, varied scores, and boxes near their anchors."""
    torch.manual_seed(0)
    options = {"num_classes": len(split.classes) + 1, "box_batch_size_per_image": regions, **sizes}
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options).to(device)
    rpn, boxes = model.rpn.head, model.roi_heads.box_predictor
    for layer, std in ((rpn.cls_logits, 0.1), (boxes.cls_score, 0.1), (rpn.bbox_pred, 0.001), (boxes.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
    images = to_device(device, *as_lists([BoxSource(split)[i] for i in range(min(len(split), 8))]))[0]
    precise_bn(model.backbone, [model.transform([image])[0].tensors for image in images])
    for parent in list(model.modules()) if batch_norm == "frozen" else ():
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps).to(device)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)
    return model


def with_weights(own: nn.Module, theirs: nn.Module) -> Any:
    """Our model with the weights of theirs; their frozen BN has no batch counter."""
    own.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if name in own.state_dict()})
    return own


def agreement(own: nn.Module, theirs: nn.Module, batch: Batch) -> dict[str, Any]:
    """Differences between the models in fp32: boxes of two images, losses, and gradient norm."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        distances: list[float] = []  # px, per box of theirs to the nearest of ours
        for image in batch[0]:
            with torch.no_grad():
                actual, expected = (model.eval()([image])[0] for model in (own, theirs))
            distance = (actual["boxes"][None] - expected["boxes"][:, None]).abs().amax(2)
            distance = distance.masked_fill(actual["labels"][None] != expected["labels"][:, None], math.inf)
            distances += distance.amin(1).tolist() if distance.numel() else [math.inf] * len(distance)
        rows = []
        for model in (theirs, own):
            torch.manual_seed(1)
            losses: dict[str, Tensor] = model.train()(*batch)
            sum(losses.values(), torch.zeros((), device=batch[0][0].device)).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            rows.append({name: value.item() for name, value in losses.items()} | {"gradient": norm.item()})
    reference, ours = rows
    differences = {name: abs(ours[name] - value) / max(abs(value), 1.0) for name, value in reference.items()}
    close = sum(distance <= 1e-3 for distance in distances)
    return {"boxes": len(distances), "within_0.001_px": close, "losses": reference, "differences": differences}


def plain_steps(model: nn.Module, split: BoxSet, batch: int, workers: int, device: torch.device) -> Callable[[], object]:
    """The training steps of torchvision's references with --amp, but in bf16."""
    sgd = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], 1e-8, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(Files(split), batch, shuffle=True, num_workers=workers, collate_fn=as_lists, drop_last=True)

    def repeat() -> Iterator[Batch]:
        while True:
            yield from loader

    batches = repeat()

    def step() -> None:
        images, targets = to_device(device, *next(batches))
        with torch.autocast(device.type, torch.bfloat16):
            losses: dict[str, Tensor] = model(images, targets)
            loss = sum(losses.values(), torch.zeros((), device=device))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        loss.item()

    return step


def inference(own: Any, theirs: nn.Module, split: BoxSet, images: int, folder: Path, device: torch.device) -> dict[str, float]:
    """Median milliseconds per image, from pixels to boxes in main memory, in the device's precision."""
    options = TestOptions((load_detector(save_detector(own, folder / "model.safetensors"), device),))
    files, times = Files(split), []
    chosen = [split.images[i % len(split)] for i in range(images)]
    with autocast(pick_precision("auto", device), device), torch.no_grad():
        find(chosen[:2], [options])
        ours = find(chosen, [options])[0].seconds
        theirs.eval()([files[0][0].to(device)])
        for i in range(images):
            image, started = files[i % len(split)][0], time.perf_counter()
            _ = {key: value.cpu() for key, value in theirs([image.to(device)])[0].items()}
            times.append(time.perf_counter() - started)
    return {"torchvision": round(1e3 * statistics.median(times), 2), "reslearn": round(1e3 * ours, 2)}


def detection(record: Record, options: argparse.Namespace, folder: Path) -> None:
    smoke, device = options.smoke, options.device
    if options.data is None:
        sys.exit("detection needs a data set with boxes: pass one with --data")
    size, regions, batch, steps, workers = (48, 4, 1, 1, 0) if smoke else (800, 512, 8, 100, options.workers)
    sizes = {"min_size": size, "max_size": round(size * 1333 / 800)}
    splits = open_boxes(options.data, bad="drop")
    split = splits.get("train") or next(iter(splits.values()))
    two = to_device(device, *as_lists([BoxSource(split)[i] for i in range(2)]))
    for batch_norm in ("live", "frozen"):
        theirs = torchvision_fpn(split, batch_norm, sizes, regions, device)
        own = create_detector(NET, split.classes, kind="fpn", batch_norm=batch_norm, **sizes, regions=regions)
        own = with_weights(own.to(device), theirs)
        record.note(f"inference, FPN, BN {batch_norm}, ms", inference(own, theirs, split, 2 if smoke else 24, folder, device))
        record.note(f"agreement, FPN, BN {batch_norm}", agreement(own, theirs, two))
        plain = {"torchvision": plain_steps(theirs, split, batch, workers, device)}
        record.note(f"training, FPN, BN {batch_norm}, plain loop, images/s", rounds(plain, batch, 1, max(1, steps // 2), device))
    for kind, batch_norm in (("fpn", "live"), ("fpn", "frozen"), ("c4", "live")):
        if record.left() < 90:
            break
        settings = [f"detector.kind={kind}", f"detector.batch_norm={batch_norm}", *(f"detector.{k}={v}" for k, v in sizes.items())]
        settings += [f"schedule.steps={steps}", f"evaluate.every={steps}", f"batch.size={batch}", "data.bad=drop"]
        settings += [f"data.workers={max(1, workers)}"] + (["detector.regions=4"] if smoke else [])
        out, common = folder / f"{kind}-{batch_norm}", {"device": str(device), "task": "detect", "quiet": True}
        result = reslearn.train(options.data, model=NET, settings=settings, seed=0, out=out, **common).result
        numbers = {key: result[key] for key in ("step", "seconds", "images_per_s", "peak_memory_mb")}
        numbers |= {name: metrics["AP50"] for name, metrics in result["last"].items() if name in ("val", "test")}
        record.note(f"training, {kind}, BN {batch_norm}", numbers)


PARTS = {"cifar": cifar, "table6": table6, "imagenet": imagenet, "detection": detection}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", help="imagenet: folder of photos; detection: data set with boxes")
    parser.add_argument("--out", type=Path, help="[default: benchmarks/results/gpu_PART.json]")
    parser.add_argument("--work", type=Path, default=Path("reproduction"), help="table6: folder of the runs, kept between calls")
    parser.add_argument("--workers", type=int, default=8, help="threads or processes that prepare batches")
    parser.add_argument("--smoke", action="store_true", help="run with tiny settings on a CPU")
    options = parser.parse_args()
    options.device = pick_device("cpu" if options.smoke else "cuda")
    record = Record(options.part, options.out or Path(f"benchmarks/results/gpu_{options.part}.json"), options.device)
    record.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        PARTS[options.part](record, options, Path(folder))
    print(f"wrote {record.out}")


if __name__ == "__main__":
    main()
