"""`Photos` serves batches of image files, decoded by worker threads (decoders release the GIL) or once into a cache."""

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
from reslearn.files import cache_folder, fsync_file, write_text, writing

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Reports progress: what is done, how many are done, of how many."""
CACHE_BYTES = 4 << 30  # of shrunk pixels; larger sets are decoded again in every epoch
TIMEOUT, CHECK_EVERY = 120.0, 5.0  # seconds: for one file; between two checks of what is being read


def silent(what: str, done: int, total: int) -> None:
    """Reports no progress."""


def ahead(work: Callable[[int], T], steps: range, workers: int, stuck: Callable[[], str] = lambda: "") -> Generator[T, None, None]:
    """Yields work(step) for each step in order, computed ahead by `workers` threads; 0 computes each when it is asked for.

    What work raises is raised here when its step's turn comes. stuck() is called now and then while waiting for a step: a message
    about a thread that hangs is raised as UserError. Such a thread cannot be stopped, but nothing waits for it.
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

    # Daemons, unlike those of concurrent.futures: the interpreter's end does not wait for a hanging one.
    threads = [Thread(target=run_tasks, name=f"reslearn-data-{i}", daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    waiting: deque[Future[T]] = deque()
    hanging = ""
    try:
        for step in chain(steps, [None]):  # None: all have been handed out
            if step is not None:
                waiting.append(Future())
                tasks.put((waiting[-1], step))
            while len(waiting) > (workers if step is not None else 0):
                while not waiting[0].done() and not hanging:
                    wait([waiting[0]], timeout=CHECK_EVERY)
                    hanging = "" if waiting[0].done() else stuck()
                if hanging:
                    raise UserError(hanging)
                yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        for thread in threads if not hanging else ():
            thread.join()


class Photos:
    """Batches of a split of image files.

    Training views are cropped from photos shrunk to what evaluation needs (see Preprocessing.shrink); or, with direct, from the
    original photos, decoding only what a view shows. The crops are the same, but where few pixels of a photo are shown, a direct
    view is sharper: it is scaled once, not twice. Evaluation sees the same either way.

    cache: files, the split's among them, whose shrunk pixels are kept in the user's cache folder, so that each photo is decoded
    once, whatever the split. The pixels are the same as without; cannot be combined with direct. on_bad: "skip"
    leaves files that cannot be decoded out of the split, "error" raises UserError naming them. jitter (which is direct), grow,
    color: see classify.recipes.ImageData; epochs: of the whole training, over which views grow.
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
        self.bad: dict[str, str] = {}  # name -> why it could not be read
        self.holes: set[int] = set()
        self.reading: dict[int, tuple[int, float]] = {}  # thread -> the photo it is at, and since when
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
        place = {file: i for i, file in enumerate(files)}
        bad = {i: unreadable[place[file]] for i, file in enumerate(split.files) if place[file] in unreadable}
        if bad and self.on_bad == "error":
            first = next(iter(bad.values()))
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise UserError(f"{first}{more}; remove such files, or leave them out with data.on_bad=skip")
        self.shrunk = cache
        self.bad = {split.names[i]: reason for i, reason in bad.items()}
        split = split.take(np.array([i for i in range(len(split)) if i not in bad], np.int64))
        self.rows = [cache.row(place[file]) for file in split.files or ()]
        return split

    def image(self, i: int) -> np.ndarray:
        """Photo i, shrunk: uint8 (H, W, C)."""
        if self.shrunk is not None:
            return self.shrunk[self.rows[i]]
        return self._decode(self.files[i])

    def view(self, i: int) -> Tensor:
        """What the network sees of photo i in evaluation: uint8 (C, height, width), on the CPU.

        A photo that cannot be read is UserError, or, with on_bad "skip", black and from then on one of `holes`.
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
        """Cropped, flipped and normalized, float32 (N, C, height, width), and labels, int64 (N,), on the device."""
        places = draws.indices.tolist()
        size = self._train_size(int(draws.epochs[0]) if draws.began is None else draws.began)
        batch = self._batch(len(places), size)
        bad = self._read(places, self._training_views(draws, size), batch.numpy(), self._direct_training)
        for j, error in bad.items():
            one = Draws(draws.seed, draws.epochs[j : j + 1], draws.indices[j : j + 1])
            places[j] = self._substitute(places[j], one, error, batch[j : j + 1].numpy())
        images = self._normalized(batch)
        if self.color is not None:
            images += color_noise(draws.to(images.device), self.color)[:, :, None, None] * (255 * self.normalize.scale)
        return images, self.labels[places]

    def _train_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of the training views of a batch that begins in an epoch."""
        if self.grow is None:
            return self.preprocessing.size
        side = grown(self.grow, epoch / self.epochs)
        return side, side

    @property
    def _direct_training(self) -> bool:
        """Whether views are taken of the original photos; those of the network's own size are the same either way."""
        return self.direct or self.crop_scale is None

    def _training_views(self, draws: Draws, size: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
        options = {"covered": self.preprocessing.covered, "scale": self.crop_scale, "jitter": self.jitter, "flip": self.flip}
        return lambda sizes: training_views(sizes, draws, size, **options)

    def _substitute(self, i: int, draws: Draws, error: UserError, pixels: np.ndarray) -> int:
        """Writes a view of the next readable photo after i. Returns its index. Raises the error unless on_bad is "skip"."""
        for place in (j % len(self) for j in range(i + 1, i + len(self))):
            if self.on_bad == "error":
                raise error
            self.bad[self.names[(place - 1) % len(self)]] = str(error)
            bad = self._read([place], self._training_views(draws, pixels.shape[1:3]), pixels, self._direct_training)
            if not bad:
                return place
            error = bad[0]
        raise UserError("none of the training images can be read")

    def eval_batch(self, start: int, stop: int) -> Tensor:
        """The center of photos start to stop, normalized: float32 (N, C, height, width), on the device."""
        places = list(range(start, min(stop, len(self))))
        batch = self._batch(len(places), self.preprocessing.size)
        parts = [part for part in np.array_split(np.arange(len(places)), self.workers) if len(part)]

        def fill(number: int) -> None:
            part = parts[number]
            first, pixels = int(part[0]), batch[part[0] : part[-1] + 1].numpy()
            bad = self._read([places[j] for j in part], self.preprocessing.center_views, pixels, direct=True)
            for j, error in bad.items():
                self._mark_unreadable(places[first + j], error)
                pixels[j] = 0

        for _ in ahead(fill, range(len(parts)), len(parts), self.stuck):
            pass
        return self._normalized(batch)

    def _batch(self, images: int, size: tuple[int, int]) -> Tensor:
        """An empty batch, uint8 (N, *size, C), in pinned memory where it goes to a GPU."""
        shape = (images, *size, self.preprocessing.channels)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _normalized(self, batch: Tensor) -> Tensor:
        """uint8 (N, height, width, C) -> float32 (N, C, height, width) on the device, channels last in memory."""
        return self.normalize(batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2))

    def _read(
        self, places: Sequence[int], view_of: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, direct: bool
    ) -> dict[int, UserError]:
        """Writes views of photos into pixels, uint8 (N, height, width, C). Returns the errors of those that cannot be read, by row.

        direct: views of the original photos, unless their shrunk pixels are cached.
        """
        thread = get_ident()

        def at(j: int) -> None:
            self.reading[thread] = places[j], time.monotonic()

        try:
            if direct and self.shrunk is None:
                return read_views([self.files[i] for i in places], view_of, pixels, at)
            images, bad = {}, {}
            for j, i in enumerate(places):
                at(j)
                try:
                    images[j] = self.image(i)
                except UserError as error:
                    bad[j] = error
            sizes = [images[j].shape[:2] if j in images else (1, 1) for j in range(len(places))]
            views = view_of(np.array(sizes, np.int64))
            for j, image in images.items():
                pixels[j] = take(image, views[j], pixels.shape[1:3])
            return bad
        finally:
            self.reading.pop(thread, None)

    def stuck(self) -> str:
        """The files whose reading timed out, as an error message; "" where there are none."""
        now = time.monotonic()
        names = [str(self.files[i]) for i, since in list(self.reading.values()) if now - since > TIMEOUT]
        more = "" if len(names) < 2 else f" (and {len(names) - 1} more)"
        return f"{names[0]}{more}: read timed out after {TIMEOUT:.0f} s: is the disk mounted?" if names else ""


class PhotoCache(Sequence[np.ndarray]):
    """Shrunk pixels of files in one raw file of the cache folder, read through a memory map.

    The key is the hash of every file's path, size and time and of the shrinking, so a changed photo is never served stale.
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
        """Decodes what is not cached yet. Returns the files that cannot be decoded, by index, with the reason."""
        index = self.path.with_suffix(".json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if not (index.exists() and self.path.exists()):
                self._write(decode, workers, index, progress)
        known = json.loads(index.read_text())
        bad = {int(i): reason for i, reason in known["bad"].items()}
        self.readable = [i for i in range(len(self.files)) if i not in bad]
        self.shapes = [tuple(shape) for shape in known["shapes"]]
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

        partial = self.path.with_suffix(".partial")
        shapes, bad = [], {}
        try:
            with partial.open("wb") as out:
                # `ahead` keeps only a few decoded photos in memory, whatever their number.
                decoded = ahead(lambda i: attempt(self.files[i]), range(len(self.files)), workers)
                for i, image in enumerate(decoded):
                    if isinstance(image, str):
                        bad[i] = image
                    else:
                        shapes.append(image.shape[:2])
                        out.write(image.tobytes())
                    progress("shrinking photos, once", i + 1, len(self.files))
            index.unlink(missing_ok=True)
            fsync_file(partial)
            partial.rename(self.path)
            write_text(index, json.dumps({"shapes": shapes, "bad": bad}))  # last: an index means that the pixels are whole
        finally:
            partial.unlink(missing_ok=True)

    def row(self, i: int) -> int:
        """The row of file i among those that can be read."""
        return bisect_left(self.readable, i)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        return self.pixels[self.offsets[i] : self.offsets[i + 1]].reshape(*self.shapes[i], self.channels)


def shrunk_bytes(images: int, preprocessing: Preprocessing, sizes: tuple[int, int]) -> float:
    """The bytes that the shrunk pixels of so many photos take. sizes: their median (height, width) in pixels."""
    height, width = preprocessing.covered
    scale = max(height / sizes[0], width / sizes[1])
    return images * sizes[0] * sizes[1] * scale**2 * preprocessing.channels


def cache_fits(images: int, preprocessing: Preprocessing, sizes: tuple[int, int]) -> bool:
    """Whether the shrunk pixels are small enough to keep, and the disk has room for twice as many; as for shrunk_bytes."""
    need = shrunk_bytes(images, preprocessing, sizes)
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return need <= CACHE_BYTES and shutil.disk_usage(existing).free > 2 * need and os.access(existing, os.W_OK)
