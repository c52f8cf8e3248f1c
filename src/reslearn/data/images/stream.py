"""`Photos` serves batches of image files, decoded on threads (decoders release the GIL) or once into a cache."""

import hashlib
import json
import os
import shutil
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from reslearn.data.augment import Draws, Flip, color_noise, grown, training_views
from reslearn.data.images.decode import File, read_views, take
from reslearn.data.images.files import PackedImage, read
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import Split
from reslearn.errors import UserError
from reslearn.files import cache_folder, write_atomic, write_text, writing

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Reports progress: a description of the task, the number done, and the total."""
CACHE_BYTES = 4 << 30  # shrunk pixels; larger sets are decoded again in every epoch
TIMEOUT, CHECK_EVERY = 120.0, 5.0  # seconds: the limit for one file, and between two checks


def silent(task: str, done: int, total: int) -> None:
    """The Progress that reports nothing."""


def ahead(work: Callable[[int], T], steps: range, workers: int, stuck: Callable[[], str] = lambda: "") -> Generator[T, None, None]:
    """Yields work(step) for each step in order, computed ahead by `workers` threads; with 0, computed on demand.

    An exception from work(step) is raised when that step is due. stuck() is called periodically while waiting; if it returns a
    message about a hanging thread, UserError is raised. Such a thread cannot be stopped, but nothing waits for it.
    """
    if workers == 0:
        yield from map(work, steps)
        return
    tasks: SimpleQueue[tuple[Future[T], int] | None] = SimpleQueue()

    def run_tasks() -> None:
        while (task := tasks.get()) is not None:
            future, step = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(step))
                except BaseException as error:
                    future.set_exception(error)

    # Daemon threads, unlike those of concurrent.futures: a hanging one does not block the interpreter's exit.
    threads = [Thread(target=run_tasks, name=f"reslearn-data-{i}", daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    pending: deque[Future[T]] = deque()
    hanging = ""
    try:
        for step in chain(steps, [None]):  # None: all steps have been submitted
            if step is not None:
                pending.append(Future())
                tasks.put((pending[-1], step))
            while len(pending) > (workers if step is not None else 0):
                while not pending[0].done() and not hanging:
                    wait([pending[0]], timeout=CHECK_EVERY)
                    hanging = "" if pending[0].done() else stuck()
                if hanging:
                    raise UserError(hanging)
                yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        for thread in threads if not hanging else ():
            thread.join()


class Photos:
    """Batches of a split of image files.

    Training views are cropped from photos shrunk to the evaluation size (see Preprocessing.shrink) or, with `direct`, from the
    original photos, decoding only the pixels of a view. The crops are the same, but direct views of small crops are sharper, since
    they are scaled once instead of twice. Evaluation is the same either way.

    cache: files, including the split's, whose shrunk pixels are kept in the user's cache folder, so that each photo is decoded only
    once for all splits. Does not change the pixels; cannot be combined with `direct`. on_bad: "skip" leaves out files that cannot
    be decoded; "error" raises UserError. jitter (implies `direct`), grow, color: see classify.recipes.ImageData. epochs: length of
    the training, for `grow`.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        flip: Flip = False,
        crop_scale: tuple[float, float] | None = None,
        jitter: tuple[int, int] | None = None,
        grow: tuple[int, int] | None = None,
        epochs: float = 1.0,
        color: float | None = None,
        cache: Sequence[File] = (),
        direct: bool = False,
        on_bad: str = "error",
        workers: int = 2,
        device: torch.device | str = "cpu",
        progress: Progress = silent,
    ) -> None:
        assert split.files is not None and not (cache and direct)
        self.preprocessing, self.device, self.workers = preprocessing, torch.device(device), max(workers, 1)
        self.flip: Flip = flip
        self.crop_scale, self.on_bad, self.direct = crop_scale, on_bad, direct or jitter is not None
        self.jitter, self.grow, self.epochs, self.color = jitter, grow, epochs, color
        self.normalize = preprocessing.normalizer(device)
        self.bad: dict[str, str] = {}  # name -> error message
        self.holes: set[int] = set()  # unreadable photos, evaluated as black images
        self.reading: dict[int, tuple[int, float]] = {}  # thread -> (photo being read, start time)
        self.shrunk: Sequence[np.ndarray] | None = None
        if cache:
            split = self._cached(split, cache, progress)
        self.files = split.files or ()
        self.names = split.names
        self.labels = torch.from_numpy(split.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def _decode(self, path: File) -> np.ndarray:
        return self.preprocessing.shrink(read(path, self.preprocessing.channels))

    def _cached(self, split: Split, files: Sequence[File], progress: Progress) -> Split:
        assert split.files is not None
        cache = PhotoCache(files, self.preprocessing)
        with writing(cache.path):
            unreadable = cache.build(self._decode, self.workers, progress)
        index = {file: i for i, file in enumerate(files)}
        bad = {i: unreadable[index[file]] for i, file in enumerate(split.files) if index[file] in unreadable}
        if bad and self.on_bad == "error":
            first = next(iter(bad.values()))
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise UserError(f"{first}{more}; remove these files, or skip them (train: --set data.on_bad=skip, eval: --on-bad skip)")
        self.shrunk = cache
        self.bad = {split.names[i]: reason for i, reason in bad.items()}
        split = split.take(np.array([i for i in range(len(split)) if i not in bad], np.int64))
        self.rows = [cache.row(index[file]) for file in split.files or ()]
        return split

    def image(self, i: int) -> np.ndarray:
        """Photo i, shrunk: uint8 (H, W, C)."""
        if self.shrunk is not None:
            return self.shrunk[self.rows[i]]
        return self._decode(self.files[i])

    def view(self, i: int) -> Tensor:
        """The evaluation view of photo i: uint8 (C, height, width), on the CPU.

        An unreadable photo raises UserError or, with on_bad "skip", is black and added to `holes`.
        """
        try:
            return self.preprocessing.fit(self.image(i))
        except UserError as error:
            self._mark_unreadable(i, error)
            return torch.zeros(self.preprocessing.channels, *self.preprocessing.size, dtype=torch.uint8)

    def _mark_unreadable(self, i: int, error: UserError) -> None:
        if self.on_bad == "error":
            raise error
        self.holes.add(i)
        self.bad[self.names[i]] = str(error)

    def train_batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Augmented, normalized images, float32 (N, C, height, width), and labels, int64 (N,), on the device."""
        indices = draws.indices.tolist()
        size = self._train_size(int(draws.epochs[0]) if draws.began is None else draws.began)
        batch = self._batch(len(indices), size)
        bad = self._read(indices, self._training_views(draws, size), batch.numpy(), self._direct_training)
        for j, error in bad.items():
            image_draws = Draws(draws.seed, draws.epochs[j : j + 1], draws.indices[j : j + 1])
            indices[j] = self._substitute(indices[j], image_draws, error, batch[j : j + 1].numpy())
        images = self._normalized(batch)
        if self.color is not None:
            images += color_noise(draws.to(images.device), self.color)[:, :, None, None] * (255 * self.normalize.scale)
        return images, self.labels[indices]

    def _train_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of the training views of a batch that starts in this epoch."""
        if self.grow is None:
            return self.preprocessing.size
        side = grown(self.grow, epoch / self.epochs)
        return side, side

    @property
    def _direct_training(self) -> bool:
        """Whether to take views of the original photos. Unscaled crops are the same either way."""
        return self.direct or self.crop_scale is None

    def _training_views(self, draws: Draws, size: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
        options = {"covered": self.preprocessing.covered, "scale": self.crop_scale, "jitter": self.jitter, "flip": self.flip}
        return lambda sizes: training_views(sizes, draws, size, **options)

    def _substitute(self, i: int, draws: Draws, error: UserError, pixels: np.ndarray) -> int:
        """Writes a view of the next readable photo after i. Returns its index. Raises the error unless on_bad is "skip"."""
        for j in (k % len(self) for k in range(i + 1, i + len(self))):
            if self.on_bad == "error":
                raise error
            self.bad[self.names[(j - 1) % len(self)]] = str(error)
            bad = self._read([j], self._training_views(draws, pixels.shape[1:3]), pixels, self._direct_training)
            if not bad:
                return j
            error = bad[0]
        raise UserError("none of the training images can be read")

    def eval_batch(self, start: int, stop: int) -> Tensor:
        """The center crops of photos start to stop, normalized: float32 (N, C, height, width), on the device."""
        indices = list(range(start, min(stop, len(self))))
        batch = self._batch(len(indices), self.preprocessing.size)
        chunks = [chunk for chunk in np.array_split(np.arange(len(indices)), self.workers) if len(chunk)]

        def fill(n: int) -> None:
            chunk = chunks[n]
            first, pixels = int(chunk[0]), batch[chunk[0] : chunk[-1] + 1].numpy()
            bad = self._read([indices[j] for j in chunk], self.preprocessing.center_views, pixels, direct=True)
            for j, error in bad.items():
                self._mark_unreadable(indices[first + j], error)
                pixels[j] = 0

        for _ in ahead(fill, range(len(chunks)), len(chunks), self.stuck):
            pass
        return self._normalized(batch)

    def _batch(self, images: int, size: tuple[int, int]) -> Tensor:
        """An uninitialized batch, uint8 (N, *size, C), in pinned memory if the device is a GPU."""
        shape = (images, *size, self.preprocessing.channels)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _normalized(self, batch: Tensor) -> Tensor:
        """uint8 (N, height, width, C) -> float32 (N, C, height, width) on the device, channels last in memory."""
        return self.normalize(batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2))

    def _read(
        self, indices: Sequence[int], view_of: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, direct: bool
    ) -> dict[int, UserError]:
        """Writes views of photos into pixels, uint8 (N, height, width, C). Returns the errors of unreadable photos by row.

        direct: take views of the original photos, unless their shrunk pixels are cached.
        """
        thread = get_ident()

        def at(j: int) -> None:
            self.reading[thread] = indices[j], time.monotonic()

        try:
            if direct and self.shrunk is None:
                return read_views([self.files[i] for i in indices], view_of, pixels, at)
            images, bad = {}, {}
            for j, i in enumerate(indices):
                at(j)
                try:
                    images[j] = self.image(i)
                except UserError as error:
                    bad[j] = error
            sizes = [images[j].shape[:2] if j in images else (1, 1) for j in range(len(indices))]
            views = view_of(np.array(sizes, np.int64))
            for j, image in images.items():
                pixels[j] = take(image, views[j], pixels.shape[1:3])
            return bad
        finally:
            self.reading.pop(thread, None)

    def stuck(self) -> str:
        """An error message with the files whose reading timed out; "" if there are none."""
        now = time.monotonic()
        names = [str(self.files[i]) for i, since in list(self.reading.values()) if now - since > TIMEOUT]
        more = "" if len(names) < 2 else f" (and {len(names) - 1} more)"
        return f"{names[0]}{more}: read timed out after {TIMEOUT:.0f} s: is the disk mounted?" if names else ""


class PhotoCache(Sequence[np.ndarray]):
    """Shrunk pixels of files, in one memory-mapped file in the cache folder.

    The file name is a hash of every image's path, size and modification time and of the preprocessing, so changed photos are
    decoded again.
    """

    def __init__(self, files: Sequence[File], preprocessing: Preprocessing) -> None:
        stats = [
            f.stamp() if isinstance(f, PackedImage) else (str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files
        ]
        key = json.dumps([stats, preprocessing.covered, preprocessing.channels])
        folder = cache_folder() / "photos"
        self.files, self.channels = files, preprocessing.channels
        self.path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
        self.pixels = np.zeros(0, np.uint8)
        self.shapes: list[tuple[int, int]] = []
        self.offsets: list[int] = []

    def build(self, decode: Callable[[File], np.ndarray], workers: int, progress: Progress) -> dict[int, str]:
        """Decodes all files unless they are cached. Returns {index: error message} of the files that cannot be decoded."""
        index = self.path.with_suffix(".json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if not (index.exists() and self.path.exists()):
                self._write(decode, workers, index, progress)
        content = json.loads(index.read_text())
        bad = {int(i): reason for i, reason in content["bad"].items()}
        self.readable = [i for i in range(len(self.files)) if i not in bad]
        self.shapes = [tuple(shape) for shape in content["shapes"]]
        sizes = [h * w * self.channels for h, w in self.shapes]
        self.offsets = [0, *np.cumsum(sizes).tolist()]
        if self.offsets[-1]:
            self.pixels = np.memmap(self.path, np.uint8, "r")
        return bad

    def _write(self, decode: Callable[[File], np.ndarray], workers: int, index: Path, progress: Progress) -> None:
        def attempt(path: File) -> np.ndarray | str:
            try:
                return decode(path)
            except UserError as error:
                return str(error)

        shapes, bad = [], {}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                # `ahead` keeps only a few decoded photos in memory.
                for i, image in enumerate(ahead(lambda i: attempt(self.files[i]), range(len(self.files)), workers)):
                    if isinstance(image, str):
                        bad[i] = image
                    else:
                        shapes.append(image.shape[:2])
                        file.write(image.tobytes())
                    progress("shrinking photos (once)", i + 1, len(self.files))

        index.unlink(missing_ok=True)
        write_atomic(self.path, write)
        write_text(index, json.dumps({"shapes": shapes, "bad": bad}))  # written last: it marks the pixels as complete

    def row(self, i: int) -> int:
        """The row of file i among the readable files."""
        return bisect_left(self.readable, i)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        return self.pixels[self.offsets[i] : self.offsets[i + 1]].reshape(*self.shapes[i], self.channels)


def shrunk_bytes(images: int, preprocessing: Preprocessing, sizes: tuple[int, int]) -> float:
    """The estimated size of the shrunk pixels in bytes. sizes: the photos' median (height, width) in pixels."""
    height, width = preprocessing.covered
    scale = max(height / sizes[0], width / sizes[1])
    return images * sizes[0] * sizes[1] * scale**2 * preprocessing.channels


def cache_fits(images: int, preprocessing: Preprocessing, sizes: tuple[int, int]) -> bool:
    """Whether the shrunk pixels fit into CACHE_BYTES and into half of the free disk space. Arguments: see shrunk_bytes."""
    needed = shrunk_bytes(images, preprocessing, sizes)
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return needed <= CACHE_BYTES and shutil.disk_usage(existing).free > 2 * needed and os.access(existing, os.W_OK)
