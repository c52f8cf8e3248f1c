"""`reslearn bench input`: decoding, random crops to 224 px and batching of photos, compared with torchvision."""

import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from reslearn import data as datasets
from reslearn.data.augment import Draws
from reslearn.data.images import decode
from reslearn.data.images.pack import PackFormat, pack
from reslearn.data.images.stream import Photos, ahead
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder
from reslearn.data.sets import Split
from reslearn.errors import UserError
from reslearn.progress import Progress, silent
from reslearn.training import runtime

SIZE, BATCH, WORKERS, SCALE = 224, 50, 2, (0.08, 1.0)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Files = list[str]


class TransformedFiles(Dataset[torch.Tensor]):
    """A map-style data set; `load` reads and augments one file."""

    def __init__(self, files: Files, load: Callable[[str], torch.Tensor]) -> None:
        self.files, self.load = files, load

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.load(self.files[i])


class PillowV1:
    """Pillow and torchvision's transforms v1."""

    def __init__(self) -> None:
        from torchvision import transforms

        steps = [transforms.RandomResizedCrop(SIZE, SCALE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def __call__(self, file: str) -> torch.Tensor:
        from PIL import Image

        with Image.open(file) as image:
            return torch.as_tensor(self.transform(image.convert("RGB")))


class IoV2:
    """torchvision.io and torchvision's transforms v2."""

    def __init__(self) -> None:
        from torchvision.transforms import v2

        steps = [v2.RandomResizedCrop(SIZE, SCALE, antialias=True), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __call__(self, file: str) -> torch.Tensor:
        from torchvision.io import ImageReadMode, decode_image

        return self.transform(decode_image(file, ImageReadMode.RGB))


def data_loader_round(load: Callable[[str], torch.Tensor], files: Files, images: int) -> None:
    """Loads `images` images, repeating the files as needed, with a DataLoader's worker processes."""
    torch.manual_seed(0)
    dataset = TransformedFiles((files * (images // len(files) + 1))[:images], load)
    loader = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, prefetch_factor=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn about forking a process with threads
        for _ in loader:
            pass


def our_round(source: Photos, images: int, normalized: bool) -> None:
    """Loads `images` images with threads, like `reslearn train`. normalized: False: uint8 batches, to be normalized on a GPU."""
    order = SampleOrder(0, len(source), BATCH)
    if not normalized:
        source.normalize = lambda pixels: pixels  # type: ignore[assignment]

    def batch(step: int) -> object:
        return source.train_batch(Draws(0, *order[step]))

    for _ in ahead(batch, range(images // BATCH), WORKERS, source.stuck):
        pass


def cpu_seconds() -> float:
    """CPU time of this process and its finished children."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def _photos(split: Split) -> Photos:
    view = Preprocessing(channels=3, size=(SIZE, SIZE), crop_ratio=0.875, mean=MEAN, std=STD)
    return Photos(split, view, flip=True, crop_scale=SCALE, direct=True)


def bench(folder: str | Path, rounds: int = 7, images: int = 1000, progress: Progress = silent) -> dict[str, Any]:
    """Measures all input pipelines in alternating rounds. Returns a JSON-compatible dict.

    folder: image files. images: per round. Each pipeline makes random crops of 8% to 100% of the area, 224 px, half of them
    flipped, in batches of 50, with two threads or processes. `ways` holds, per pipeline, images_per_cpu_s and images_per_s
    (medians over rounds) and `ratio`, the median of the paired ratios of the first pipeline's CPU time to its own.
    """
    if images < BATCH:
        raise UserError(f"--images {images}: must be at least {BATCH}")
    opened = datasets.open(folder)
    if opened.resident or opened.packed:
        raise UserError(f"bench input needs a folder or list of photos; '{folder}' is not one")
    split = next(iter(opened.splits.values()))
    files = [str(file) for file in split.files or ()]
    images -= images % BATCH
    threads = torch.get_num_threads()
    runtime.keep_freed_memory()  # as in training; inherited by the DataLoader's workers
    torch.set_num_threads(1)  # as in a DataLoader's workers
    try:
        with tempfile.TemporaryDirectory() as temporary:
            packed = pack(folder, Path(temporary) / "packed", PackFormat(256, 90), progress=progress)
            packed_split = next(iter(datasets.open(packed.folder).splits.values()))
            pipelines: dict[str, Callable[[], None]] = {
                "Pillow + torchvision v1, DataLoader": partial(data_loader_round, PillowV1(), files, images),
                "torchvision.io + v2, DataLoader": partial(data_loader_round, IoV2(), files, images),
                "reslearn": partial(our_round, _photos(split), images, True),
                "reslearn, uint8": partial(our_round, _photos(split), images, False),
                "reslearn, packed": partial(our_round, _photos(packed_split), images, True),
                "reslearn, packed, uint8": partial(our_round, _photos(packed_split), images, False),
            }
            cpu, wall = ({name: [] for name in pipelines} for _ in range(2))
            for done in range(-1, rounds):  # the first round warms up
                for name in (*pipelines,) if done % 2 else (*reversed(pipelines),):
                    cpu_started, started = cpu_seconds(), time.perf_counter()
                    pipelines[name]()
                    if done >= 0:
                        cpu[name].append(cpu_seconds() - cpu_started)
                        wall[name].append(time.perf_counter() - started)
                progress("rounds", done + 1, rounds)
            sizes = [sum(s.stat().st_size for s in map(Path, files)) / len(files), sum(packed.index["bytes"].tolist()) / len(files)]
    finally:
        torch.set_num_threads(threads)
    first = cpu[next(iter(pipelines))]
    return {
        "command": f"reslearn bench input {opened.name} --rounds {rounds} --images {images}",
        "folder": opened.name,
        "photos": len(files),
        "median_size": list(opened.sizes),
        "bytes_a_photo": [round(size) for size in sizes],
        "images_a_round": images,
        "rounds": rounds,
        "workers": WORKERS,
        "reader": "jpeg.cpp" if not decode.why_not() else f"Pillow: {decode.why_not()}",
        "cpus": os.cpu_count(),
        "machine": runtime.machine(torch.device("cpu"), "fp32", "input"),
        "versions": runtime.versions(),
        "ways": [
            {
                "what": name,
                "images_per_cpu_s": round(images / statistics.median(cpu[name]), 1),
                "images_per_s": round(images / statistics.median(wall[name]), 1),
                "ratio": round(statistics.median(a / b for a, b in zip(first, cpu[name], strict=True)), 3),
            }
            for name in pipelines
        ],
    }
