"""Photos: decoded by worker threads (Pillow lets go of the interpreter), or once into a cache of shrunk pixels."""

import hashlib
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from reslearn.data.augment import AREA, ASPECT, LEFT, SIDE, TOP, Draws, Flip, colour_noise, grown, jittered_crop, resized_crop
from reslearn.data.images import read
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import Split
from reslearn.errors import UserError
from reslearn.files import cache_folder, fsync_file, write_text, writing

T = TypeVar("T")
Progress = Callable[[str, int, int], None]  # what, how many are done, of how many
CACHE_BYTES = 4 << 30  # more than this of shrunk pixels is decoded anew each time


def ahead(work: Callable[[int], T], steps: range, workers: int) -> Generator[T, None, None]:
    """work(step) for each step in order, computed by `workers` threads ahead of time; 0 computes it when asked."""
    if workers == 0:
        yield from map(work, steps)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reslearn-data")
    waiting: list[Future[T]] = []
    try:
        for step in steps:
            waiting.append(pool.submit(work, step))
            if len(waiting) > workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Photos:
    """Batches of a split of image files, each shrunk to what the network needs before any crop is taken.

    cache: these files, the split's among them, are kept as shrunk pixels in the user's cache folder, so that each photo is
    decoded once, whatever the split; the pixels are the same either way. on_bad: "skip" leaves files that cannot be decoded
    out of the split, "error" raises UserError naming them. jitter, grow, colour: see recipes.recipe.Data; epochs: of the whole
    training, over which views grow.
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
        colour: float | None = None,
        cache: Sequence[Path] = (),
        on_bad: str = "error",
        workers: int = 2,
        device: torch.device | str = "cpu",
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        assert split.files is not None
        self.preprocessing, self.device, self.workers = preprocessing, device, max(workers, 1)
        self.flip: Flip = flip
        self.crop_scale, self.on_bad = crop_scale, on_bad
        self.jitter, self.grow, self.epochs, self.colour = jitter, grow, epochs, colour
        self.normalise = preprocessing.normaliser(device)
        self.bad: dict[str, str] = {}  # name -> why it could not be read
        self.holes: set[int] = set()
        self.shrunk: Sequence[np.ndarray] | None = None
        if cache:
            split = self._cached(split, cache, progress)
        self.files = split.files or ()
        self.names = split.names
        self.labels = torch.from_numpy(split.labels).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def _decode(self, path: Path) -> np.ndarray:
        return self.preprocessing.shrink(read(path, self.preprocessing.channels))

    def _cached(self, split: Split, files: Sequence[Path], progress: Progress) -> Split:
        assert split.files is not None
        cache = Shrunk(files, self.preprocessing)
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
            if self.on_bad == "error":
                raise
            self.holes.add(i)
            self.bad[self.names[i]] = str(error)
            return torch.zeros(self.preprocessing.channels, *self.preprocessing.size, dtype=torch.uint8)

    def train_batch(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Cropped, flipped and normalised, float32 (N, C, height, width), and labels, int64 (N,), on the device."""
        u = {k: draws.uniform(k).tolist() for k in (TOP, LEFT, AREA, ASPECT, SIDE)}
        mirrored, size = draws.mirrored(self.flip).tolist(), self._train_size(int(draws.epochs[0]))
        seen = [self._train_view(i, {k: u[k][j] for k in u}, mirrored[j], size) for j, i in enumerate(draws.indices.tolist())]
        views, places = zip(*seen, strict=True)
        images = self.normalise(torch.stack(views).to(self.device))
        if self.colour is not None:
            images += colour_noise(draws.to(images.device), self.colour)[:, :, None, None] * (255 * self.normalise.scale)
        return images, self.labels[list(places)]

    def _train_size(self, epoch: int) -> tuple[int, int]:
        """(height, width) of the training views of a batch that begins in an epoch."""
        if self.grow is None:
            return self.preprocessing.size
        side = grown(self.grow, epoch / self.epochs)
        return side, side

    def _train_view(self, i: int, u: dict[int, float], mirrored: bool, size: tuple[int, int]) -> tuple[Tensor, int]:
        """A view of photo i and i; or of the next one that can be read, and which that is."""
        for place in (j % len(self) for j in range(i, i + len(self))):
            try:
                if self.jitter is not None:  # of the whole photo: no smaller one holds every size
                    image = read(self.files[place], self.preprocessing.channels)
                    return jittered_crop(image, u, size, self.jitter, mirrored), place
                return resized_crop(self.image(place), u, size, scale=self.crop_scale, mirrored=mirrored), place
            except UserError as error:
                if self.on_bad == "error":
                    raise
                self.bad[self.names[place]] = str(error)
        raise UserError("none of the training images can be read")

    def eval_batch(self, start: int, stop: int) -> Tensor:
        """The centre of photos start to stop, normalised: float32 (N, C, height, width), on the device."""
        with ThreadPoolExecutor(self.workers) as pool:
            views = list(pool.map(self.view, range(start, min(stop, len(self)))))
        return self.normalise(torch.stack(views).to(self.device))


class Shrunk(Sequence[np.ndarray]):
    """Shrunk pixels of files in one raw file of the cache folder, read through a memory map.

    The key is the hash of every file's path, size and time and of the shrinking, so a changed photo is never served stale.
    """

    def __init__(self, files: Sequence[Path], preprocessing: Preprocessing) -> None:
        stats = [(str(f.resolve()), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
        key = json.dumps([stats, preprocessing.covered, preprocessing.channels])
        folder = cache_folder() / "photos"
        self.files, self.channels = files, preprocessing.channels
        self.path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
        self.pixels = np.zeros(0, np.uint8)
        self.shapes: list[tuple[int, int]] = []
        self.offsets: list[int] = []

    def build(self, decode: Callable[[Path], np.ndarray], workers: int, progress: Progress) -> dict[int, str]:
        """Decode what the cache does not hold yet. Returns the files that cannot be decoded, by position, with the reason."""
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

    def _write(self, decode: Callable[[Path], np.ndarray], workers: int, index: Path, progress: Progress) -> None:
        def attempt(path: Path) -> np.ndarray | str:
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
        """Where file i stands among those that can be read."""
        return bisect_left(self.readable, i)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        return self.pixels[self.offsets[i] : self.offsets[i + 1]].reshape(*self.shapes[i], self.channels)


def cache_fits(images: int, preprocessing: Preprocessing, sizes: tuple[int, int]) -> bool:
    """Whether the shrunk pixels are small enough to keep, and the disk has room for twice as many.

    sizes: median (height, width) of the photos in pixels.
    """
    height, width = preprocessing.covered
    scale = max(height / sizes[0], width / sizes[1])
    need = images * sizes[0] * sizes[1] * scale**2 * preprocessing.channels
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return need <= CACHE_BYTES and shutil.disk_usage(existing).free > 2 * need and os.access(existing, os.W_OK)
