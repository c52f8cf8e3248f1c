"""Detection on a GPU: our training step and our way to look at images beside torchvision's FPN in a plain loop; whether they agree.

    PYTHONPATH=src python benchmarks/gpu_detection.py bccd --minutes 8 --out benchmarks/results/gpu_detection

In this order, as far as the minutes go: losses and gradients of one batch, and boxes, of torchvision's fasterrcnn_resnet50_fpn
and of ours with its weights, in fp32; training of FPN with BN live and frozen, and of C4 (where the plain loop has our model, as
torchvision has none), on images that lie on the device and on files; inference, image after image; with --train N, N steps of
`detect train` with ResNet-50, from scratch. All cases of a part take turns in rounds; medians. The plain loop is that of
torchvision's references: SGD, autocast, worker processes, torch's usual memory layout. Each part is printed and written to OUT.json
as it ends. `--device cpu --size 96 --images 4 --rounds 1 --steps 1 --batch 2 --regions 16` shows that it runs.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2 import functional as T

import reslearn
from reslearn.bench.detectors import NET, Asked, Case, Ours, Plain, cases, memory
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.read import open_boxes
from reslearn.detect import Detector, create_detector, heads, load_detector, save_detector
from reslearn.detect.backbone import settle_batch_norm
from reslearn.detect.evaluate import TestOptions, find
from reslearn.detect.step import on
from reslearn.device import autocast, pick_device, pick_precision
from reslearn.training import runtime

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as runtime.deterministic sets it, for everybody
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WHOLE = ("val", "test")


@contextmanager
def exact() -> Iterator[None]:
    """float32 without the tensor cores' shorter products."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def torchvisions(asked: Asked, split: BoxSet, batch_norm: str) -> nn.Module:
    """torchvision's FPN, from scratch, with BN statistics of some of the images and scores that differ from region to region; boxes
    stay near where they began, since far ones multiply the rounding."""
    torch.manual_seed(0)
    options: dict[str, Any] = asked.sizes | ({"box_batch_size_per_image": asked.regions} if asked.regions else {})
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=len(split.classes) + 1, **options)
    model.to(asked.device)
    for layer in (model.roi_heads.box_predictor.cls_score, model.rpn.head.cls_logits):
        nn.init.normal_(layer.weight, std=0.1)
    for layer in (model.roi_heads.box_predictor.bbox_pred, model.rpn.head.bbox_pred):
        nn.init.normal_(layer.weight, std=0.001)
    images = on(asked.device, *memory(split, min(asked.images, 8)))[0]
    settle_batch_norm(model.backbone, [model.transform([image])[0].tensors for image in images])
    for parent in list(model.modules()) if batch_norm == "frozen" else ():
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                fixed = FrozenBatchNorm2d(child.num_features, child.eps).to(asked.device)
                fixed.load_state_dict(child.state_dict())
                setattr(parent, name, fixed)
    return model


def weights(model: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """A model's state for another, of the names that it has (frozen BN counts no batches)."""
    wanted = like.state_dict()
    return {name: tensor for name, tensor in model.state_dict().items() if name in wanted}


def agreement(asked: Asked, split: BoxSet, batch_norm: str) -> dict[str, Any]:
    """Largest differences of ours from torchvision's in fp32: losses and the gradient's norm of a batch, in torch's memory layout
    and channels last, relative where they are above 1; and boxes in pixels of what both find, of each box the nearest."""
    theirs = torchvisions(asked, split, batch_norm)
    options = asked.sizes | {"regions": asked.regions or 512}
    mine = create_detector(NET, split.classes, kind="fpn", batch_norm=batch_norm, **options).to(asked.device)
    mine.load_state_dict(weights(theirs, mine))
    images, targets = on(asked.device, *memory(split, 2))
    row: dict[str, Any] = {"batch_norm": batch_norm}

    def losses(model: nn.Module) -> dict[str, float]:
        model.train().zero_grad()
        torch.manual_seed(1)
        found: dict[str, Tensor] = model(images, targets)
        sum(found.values(), torch.zeros((), device=asked.device)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return {name: value.item() for name, value in found.items()} | {"gradient": norm.item()}

    with exact():  # and not in deterministic mode, for which torchvision's RoIAlign is another one
        found = []
        for image in images:
            with torch.no_grad():
                found.append([model.eval()([image])[0] for model in (mine, theirs)])
        expected, state = losses(theirs), {name: tensor.clone() for name, tensor in weights(theirs, mine).items()}
        row["losses"] = expected
        for layout, format in LAYOUTS.items():
            mine.load_state_dict(state)
            own = losses(mine.to(memory_format=format))  # type: ignore[call-overload]
            row[layout] = {name: abs(own[name] - value) / max(abs(value), 1.0) for name, value in expected.items()}
    apart = []
    for ours, those in found:
        far = (ours["boxes"][None] - those["boxes"][:, None]).abs().amax(2)
        far = far.masked_fill(ours["labels"][None] != those["labels"][:, None], math.inf)
        apart += far.amin(1).tolist() if far.numel() else [math.inf] * len(far)
    row["boxes"] = {
        "ours": sum(len(ours["boxes"]) for ours, _ in found),
        "torchvision": len(apart),
        "within_0.001_px": sum(each <= 1e-3 for each in apart),
        "largest_px": max((each for each in apart if each < math.inf), default=None),
    }
    row["losses_agree"] = max(value for name, value in row["contiguous"].items() if name != "gradient") <= 1e-4
    row["boxes_agree"] = row["boxes"]["within_0.001_px"] == len(apart) == row["boxes"]["ours"]
    return row


def static(model: nn.Module) -> int:
    """Bytes of a model that is trained: weights, gradients, velocities, buffers."""
    trained = sum(3 * p.numel() * p.element_size() for p in model.parameters())
    return trained + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def training(
    asked: Asked, split: BoxSet, kind: str, batch_norm: str, batch: int, deadline: float, profiled: bool
) -> dict[str, Any]:
    """Images/s and the most memory of a step; what the other model of the two holds is taken off."""
    precisions = tuple(dict.fromkeys([pick_precision("auto", asked.device), "fp32"]))
    with tempfile.TemporaryDirectory() as folder:
        own = Ours(asked, kind, batch_norm, batch, precisions, Path(folder) / "run")
        if kind == "fpn":
            model, name = torchvisions(asked, split, batch_norm), "torchvision, plain loop"
            own.model.load_state_dict(weights(model, own.model))
        else:
            assert isinstance(own.model, Detector)
            options = {name: getattr(own.model.settings, name) for name in type(own.model.settings).model_fields if name != "kind"}
            model, name = create_detector(NET, split.classes, kind, **options).to(asked.device), "our model, plain loop"
            model.load_state_dict(weights(own.model, model))
        plain = Plain(asked, model, own.loop.sources.train.split, batch)
        all_ = cases(plain, own, name, precisions)
        row: dict[str, Any] = {"kind": kind, "batch_norm": batch_norm, "batch": batch, "parameters": 0, "peak_memory_mb": {}}
        row["parameters"] = sum(p.numel() for p in own.model.parameters())
        for case in all_.values():  # the plain loop's first: its processes are forked before our threads are there
            case.seconds(min(asked.steps, 2))
        took: dict[str, list[float]] = {what: [] for what in all_}
        for done in range(asked.rounds):
            for what, case in all_.items():
                if asked.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(asked.device)
                took[what].append(case.seconds(asked.steps))
                if asked.device.type == "cuda":
                    other = plain.model if case.program is own else own.model
                    peak = torch.cuda.max_memory_allocated(asked.device) - static(other)
                    row["peak_memory_mb"][what] = max(round(peak / 1e6), row["peak_memory_mb"].get(what, 0))
            row["rounds"] = done + 1
            if time.perf_counter() > deadline:
                break
        row["images_per_s"] = {what: round(batch / statistics.median(each), 2) for what, each in took.items()}
        row["ratio"] = {
            what: round(statistics.median(a / b for a, b in zip(took[case.base], took[what], strict=True)), 3)
            for what, case in all_.items()
        }
        two = [name for name in all_ if name.endswith(precisions[0])]
        if asked.device.type == "cuda":
            row["waits_a_step"] = {what: waits(all_[what]) for what in two}
        if profiled:
            row["profile"] = {what: profile(all_[what], asked.device) for what in two}
            with mock.patch.object(heads, "own_pooling", nullcontext):
                first, later = (all_[two[1]].seconds(1) for _ in range(2))
            row["with torchvision's deterministic RoIAlign"] = {"first_step_s": first, "images_per_s": batch / later}
        own.batches.close()  # type: ignore[attr-defined]
        plain.batches.close()  # type: ignore[attr-defined]
    return row


def waits(case: Case) -> dict[str, Any]:
    """How often the host waits for the device in a step, and at which lines most."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            case.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in said if "synchronizing" in str(each.message))
    return {"all": lines.total(), "most": dict(lines.most_common(12))}


def profile(case: Case, device: torch.device) -> list[str]:
    """The operations that take longest in three steps."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as found:
        case.seconds(3)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=15).splitlines()


def inference(asked: Asked, split: BoxSet, batch_norm: str) -> dict[str, Any]:
    """Milliseconds an image, from pixels in memory to boxes in memory, the median over images and rounds."""
    theirs = torchvisions(asked, split, batch_norm).eval()
    mine = create_detector(NET, split.classes, kind="fpn", batch_norm=batch_norm, **asked.sizes)
    mine.load_state_dict(weights(theirs, mine))
    with tempfile.TemporaryDirectory() as folder:
        way = TestOptions((load_detector(save_detector(mine, Path(folder) / "model.safetensors"), asked.device),))
    images = [split.images[i % len(split)] for i in range(asked.images)]
    pixels = [each.float().div(255) for each in (T.pil_to_tensor(Image.open(image.path).convert("RGB")) for image in images)]
    precisions = tuple(dict.fromkeys(["fp32", pick_precision("auto", asked.device)]))
    took: dict[str, list[float]] = {}

    def plain() -> float:
        each = []
        for image in pixels:
            began = time.perf_counter()
            with torch.no_grad():
                found = theirs([image.to(asked.device)])[0]
            _ = {key: value.cpu() for key, value in found.items()}
            each.append(time.perf_counter() - began)
        return statistics.median(each)

    ways = {"torchvision": plain, "reslearn": lambda: find(images, [way])[0].seconds}
    for i in range(asked.rounds + 1):
        for precision in precisions:
            for what, run in ways.items():
                with autocast(precision, asked.device):
                    seconds = run()
                if i:  # the first is to warm up
                    took.setdefault(f"{what}, {precision}", []).append(seconds)
    ratios = {p: [a / b for a, b in zip(took[f"torchvision, {p}"], took[f"reslearn, {p}"], strict=True)] for p in precisions}
    return {
        "batch_norm": batch_norm,
        "images": len(images),
        "ms_an_image": {what: round(1e3 * statistics.median(each), 2) for what, each in took.items()},
        "ratio": {precision: round(statistics.median(each), 3) for precision, each in ratios.items()},
    }


def trained(asked: Asked, kind: str, steps: int, batch: int, folder: Path) -> dict[str, Any]:
    """`detect train` with ResNet-50 from scratch on the whole set, judged at its end."""
    settings = [f"detector.kind={kind}", f"schedule.steps={steps}", f"evaluate.every={steps}", f"batch.size={batch}"]
    settings += [f"detector.{key}={value}" for key, value in asked.sizes.items()]
    settings += ["data.bad=drop", f"data.workers={asked.workers}"]
    settings += [f"detector.regions={asked.regions}"] if asked.regions else []
    began = time.perf_counter()
    result = reslearn.train(asked.data, NET, None, settings, 0, folder / kind, str(asked.device), quiet=True, task="detect").result
    seconds = round(time.perf_counter() - began, 1)
    row = {"kind": kind, "batch": batch, "command_seconds": seconds}
    row |= {key: result[key] for key in ("step", "epochs", "seconds", "images_per_s", "peak_memory_mb")}
    judged = {split: numbers for split, numbers in result["last"].items() if split in WHOLE}
    return row | {split: {key: each[key] for key in ("n", "AP", "AP50", "AP75")} for split, each in judged.items()}


def said(key: str, row: dict[str, Any]) -> Iterator[str]:
    """What is printed of a part."""
    if key == "agreement":
        boxes = row["boxes"]
        yield f"agreement, FPN, BN {row['batch_norm']}, fp32:"
        for layout in LAYOUTS:
            *losses, gradient = row[layout].values()
            yield f"  {layout}: losses differ by at most {max(losses):.1e}, the gradient's norm by {gradient:.1e} of it"
        yield f"  {boxes['within_0.001_px']} of {boxes['torchvision']} boxes within 0.001 px; ours are {boxes['ours']}"
    elif key == "training":
        yield f"training, {row['kind']}, BN {row['batch_norm']}, batch {row['batch']}, {row['rounds']} rounds:"
        for what, speed in row["images_per_s"].items():
            peak = f"  {row['peak_memory_mb'][what]:>7,} MB" if what in row["peak_memory_mb"] else ""
            yield f"  {what:45} {speed:9,.2f} images/s  {row['ratio'][what]:.2f}x{peak}"
        for what, found in row.get("waits_a_step", {}).items():
            yield f"  {what}: the host waits {found['all']} times a step"
    elif key == "inference":
        yield f"inference, FPN, BN {row['batch_norm']}, {row['images']} images one after the other:"
        for what, ms in row["ms_an_image"].items():
            yield f"  {what:45} {ms:9,.2f} ms an image"
        yield f"  ours is {', '.join(f'{ratio:.2f}x in {precision}' for precision, ratio in row['ratio'].items())}"
    else:
        found = "; ".join(f"{name} AP {row[name]['AP']:.1f}, AP50 {row[name]['AP50']:.1f}" for name in WHOLE if name in row)
        yield f"trained, {row['kind']}, {row['step']} steps of {row['batch']}: {found}; {row['command_seconds']} s in all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a set with boxes, VOC or COCO")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_detection"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=800, help="px of the shorter side; the longer has at most 1333/800 of it")
    parser.add_argument("--batch", type=int, nargs="*", default=[2, 8])
    parser.add_argument("--regions", type=int, help="of an image in training (FPN 512, C4 128)")
    parser.add_argument("--images", type=int, default=24, help="that inference looks at in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each case in a round")
    parser.add_argument("--workers", type=int, default=8, help="processes of the plain loop that read, and threads of ours")
    parser.add_argument("--train", type=int, default=0, help="steps to train FPN and C4 for")
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="operations; and torchvision's deterministic RoIAlign")
    given = parser.parse_args()
    end = time.perf_counter() + 60 * given.minutes
    device = pick_device(given.device)
    asked = Asked(given.data, device, given.size, given.regions, given.images, given.rounds, given.steps, given.workers)
    splits = open_boxes(given.data, bad="drop")
    split = splits.get("train") or next(iter(splits.values()))
    record: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": runtime.machine(device, pick_precision("auto", device), "eager"),
        "versions": runtime.versions() | {"torchvision": torchvision.__version__, "cuda": torch.version.cuda},
        "sizes": asked.sizes,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    failed = False

    def part(key: str, work: Callable[[], dict[str, Any]], least: float) -> None:
        """Do it, where there are so many seconds left, and keep what is known so far, whatever happens later."""
        nonlocal failed
        if end - time.perf_counter() < least:
            print(f"{key}: left out for want of time", flush=True)
            return
        try:
            row = work()
            lines = list(said(key, row))
        except Exception as error:  # one part must not cost the others
            traceback.print_exc()
            row, lines, failed = {"error": repr(error)}, [f"{key}: {error!r}"], True
        record.setdefault(key, []).append(row)
        given.out.with_name(f"{given.out.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(*lines, f"  ({end - time.perf_counter():.0f} s left)", sep="\n", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    kinds = ("live", "frozen")
    for batch_norm in kinds:
        part("agreement", lambda bn=batch_norm: agreement(asked, split, bn), 30)
    groups = [(kind, bn, batch) for kind, bn in (("fpn", "live"), ("fpn", "frozen"), ("c4", "live")) for batch in given.batch]
    later = 45 + 150 * bool(given.train)  # seconds for what follows
    for i, group in enumerate(groups):
        now = time.perf_counter()
        until = now + 0.85 * max(end - later - now, 0) / (len(groups) - i)
        part("training", lambda g=group, u=until: training(asked, split, *g, u, given.profile), 30)
    for batch_norm in kinds:
        part("inference", lambda bn=batch_norm: inference(asked, split, bn), 10)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("fpn", "c4") if given.train else ():
            part("trained", lambda k=kind: trained(asked, k, given.train, given.train_batch, Path(folder)), 60)
    print(f"written {given.out.with_name(f'{given.out.name}.json')}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
