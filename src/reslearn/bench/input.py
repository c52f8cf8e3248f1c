"""`reslearn bench input`: photos decoded, cropped at random to 224 px and batched, beside what people use."""

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


class Theirs(Dataset[torch.Tensor]):
    """A data set as torchvision's references make it: `see` reads and augments one file."""

    def __init__(self, files: Files, see: Callable[[str], torch.Tensor]) -> None:
        self.files, self.see = files, see

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.see(self.files[i])


class PillowV1:
    """Pillow, torchvision's transforms of the first version."""

    def __init__(self) -> None:
        from torchvision import transforms

        steps = [transforms.RandomResizedCrop(SIZE, SCALE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def __call__(self, file: str) -> torch.Tensor:
        from PIL import Image

        with Image.open(file) as image:
            return torch.as_tensor(self.transform(image.convert("RGB")))


class IoV2:
    """torchvision.io, torchvision's transforms of the second version."""

    def __init__(self) -> None:
        from torchvision.transforms import v2

        steps = [v2.RandomResizedCrop(SIZE, SCALE, antialias=True), v2.RandomHorizontalFlip()]
        self.transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def __call__(self, file: str) -> torch.Tensor:
        from torchvision.io import ImageReadMode, decode_image

        return self.transform(decode_image(file, ImageReadMode.RGB))


def their_round(see: Callable[[str], torch.Tensor], files: Files, images: int) -> None:
    """One pass over the files as often as it takes, in worker processes."""
    torch.manual_seed(0)
    loader = DataLoader(
        Theirs((files * (images // len(files) + 1))[:images], see), BATCH, shuffle=True, num_workers=WORKERS, prefetch_factor=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forking beside threads
        for _ in loader:
            pass


def our_round(source: Photos, images: int, normalized: bool) -> None:
    """The same by our threads, as `reslearn train` has them. normalized: else bytes are made, which a GPU would normalize."""
    order = SampleOrder(0, len(source), BATCH)
    if not normalized:
        source.normalize = lambda pixels: pixels  # type: ignore[assignment]

    def batch(step: int) -> object:
        return source.train_batch(Draws(0, *order[step]))

    for _ in ahead(batch, range(images // BATCH), WORKERS, source.stuck):
        pass


def cpu_seconds() -> float:
    """That this process and its ended children have used."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def _photos(split: Split) -> Photos:
    view = Preprocessing(channels=3, size=(SIZE, SIZE), crop_ratio=0.875, mean=MEAN, std=STD)
    return Photos(split, view, flip=True, crop_scale=SCALE, direct=True)


def bench(folder: str | Path, rounds: int = 7, images: int = 1000, progress: Progress = silent) -> dict[str, Any]:
    """Images a CPU-second of each way, in rounds that alternate; ready for JSON.

    folder: of image files, about which `ways` says: images_per_cpu_s and images_per_s (medians over rounds), and `ratio`, the
    median of the paired ratios of CPU time to the first way's. images: of a round. Decoded are random crops of 8% to 100% of
    the area, 224 px, half of them mirrored, in batches of 50, by two threads or processes.
    """
    if images < BATCH:
        raise UserError(f"--images {images}: a round takes at least {BATCH}")
    opened = datasets.open(folder)
    if opened.resident or opened.packed:
        raise UserError(f"bench input takes a folder or list of photos; '{folder}' is none")
    split = next(iter(opened.splits.values()))
    files = [str(file) for file in split.files or ()]
    images -= images % BATCH
    threads = torch.get_num_threads()
    runtime.keep_freed_memory()  # as training does; the DataLoader's workers inherit it
    torch.set_num_threads(1)  # as in a DataLoader's workers
    try:
        with tempfile.TemporaryDirectory() as place:
            packed = pack(folder, Path(place) / "packed", PackFormat(256, 90), progress=progress)
            small = datasets.open(packed.folder)
            shard = next(iter(small.splits.values()))
            ways: dict[str, Callable[[], None]] = {
                "Pillow + torchvision v1, DataLoader": partial(their_round, PillowV1(), files, images),
                "torchvision.io + v2, DataLoader": partial(their_round, IoV2(), files, images),
                "reslearn": partial(our_round, _photos(split), images, True),
                "reslearn, uint8": partial(our_round, _photos(split), images, False),
                "reslearn, packed": partial(our_round, _photos(shard), images, True),
                "reslearn, packed, uint8": partial(our_round, _photos(shard), images, False),
            }
            cpu, wall = ({name: [] for name in ways} for _ in range(2))
            for done in range(-1, rounds):  # the first is not counted
                for name in (*ways,) if done % 2 else (*reversed(ways),):
                    used, started = cpu_seconds(), time.perf_counter()
                    ways[name]()
                    if done >= 0:
                        cpu[name].append(cpu_seconds() - used)
                        wall[name].append(time.perf_counter() - started)
                progress("rounds", done + 1, rounds)
            sizes = [sum(s.stat().st_size for s in map(Path, files)) / len(files), sum(packed.index["bytes"].tolist()) / len(files)]
    finally:
        torch.set_num_threads(threads)
    first = cpu[next(iter(ways))]
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
            for name in ways
        ],
    }
