"""Writes a set of image files into a few large files with an index (see packed.py), each photo scaled down once.

Shards follow the order of the images, so the content of each is known before it is written. A shard is written under another name,
then renamed, then noted: a stop at any moment loses one shard at most, and the same call resumes.
"""

import functools
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from reslearn.data.images.files import contents, read
from reslearn.data.images.packed import ABOUT, INDEX, INDEX_FILE, NAMES_FILE, PLAN, VERSION, Pack, digest, sealed_with
from reslearn.data.images.stream import Progress, ahead, silent
from reslearn.data.preprocess import covering, scaled
from reslearn.data.sets import DataSet
from reslearn.data.sets import open as open_set
from reslearn.errors import UserError
from reslearn.files import fsync_file, fsync_folder, user_path, write_atomic, write_text, writing

SHARD_IMAGES = 8192
LONGEST = 65_500  # pixels of a JPEG's side that libjpeg writes
Packed = tuple[bytes, int, int]  # a file's bytes, height and width


@dataclass(frozen=True)
class PackFormat:
    """How images are stored: those whose shorter side is above short_side px as JPEG of that size and quality, others unchanged
    (as are those that would be too long for a JPEG). short_side None: all unchanged.
    """

    short_side: int | None = 256
    quality: int = 90


def pack(
    data: str | Path,
    out: Path,
    form: PackFormat = PackFormat(),
    *,
    workers: int = 2,
    on_bad: Literal["error", "skip"] = "error",
    progress: Progress = silent,
) -> Pack:
    """Packs a folder or list of images into the folder `out`, or resumes.

    Every image is decoded once: a damaged one raises UserError, or is left out with on_bad="skip". Raises UserError also where
    `out` holds something else, or was begun from other images or in another form.
    """
    source, out = user_path(data), user_path(out)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out}: lies among the images of {data}, where it would pass for a class: choose a folder beside it")
    opened = open_set(data, on_bad=on_bad)
    if opened.resident or opened.packed:
        kind = "packed already" if opened.packed else "small images of one size, which stay in memory when they are used"
        raise UserError(f"{data}: holds {kind}: there is nothing to pack")
    plan = {"version": VERSION, "images": opened.fingerprint(), "order": opened.arrangement(), "shard_images": SHARD_IMAGES}
    plan |= {"form": asdict(form), "on_bad": on_bad}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _begin(out, plan, str(data))
        if not (out / ABOUT).exists():
            _write(opened, out, form, on_bad, workers, progress)
        for note in out.glob("shard-*.json"):
            note.unlink()
        return Pack(out)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{out}: another process is packing there: wait for it") from None
    try:
        yield
    finally:
        lock.release()


def _begin(out: Path, plan: dict[str, Any], data: str) -> None:
    """Writes down what is packed and how; or, when resuming, checks that it is the same."""
    noted = out / PLAN
    if not noted.exists():
        if strange := next((path.name for path in sorted(out.iterdir()) if path.name != ".lock"), None):
            raise UserError(f"{out}: holds {strange}: choose a new folder for the packed images")
        write_text(noted, json.dumps(plan))
        return
    try:
        before = json.loads(noted.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{noted}: damaged: remove {out} and pack again") from None
    if before != plan:
        images = any(before.get(key) != plan[key] for key in ("images", "order"))
        what = f"the images of {data} are not those it was begun with" if images else f"it was begun with {_options(before)}"
        raise UserError(f"{out}: {what}: choose a new folder, or remove this one")


def _options(plan: dict[str, Any]) -> str:
    form = plan.get("form", {})
    side = form.get("short_side")
    size = "--as-is" if side is None else f"--short-side {side} --quality {form.get('quality')}"
    return f"{size} --on-bad {plan.get('on_bad')}"


def _write(data: DataSet, out: Path, form: PackFormat, on_bad: str, workers: int, progress: Progress) -> None:
    splits = list(data.splits)
    files = [file for split in data.splits.values() for file in split.files or ()]
    names = [name for split in data.splits.values() for name in split.names]
    labels = np.concatenate([split.labels for split in data.splits.values()])
    split_of = np.repeat(np.arange(len(splits)), [len(split) for split in data.splits.values()])
    left_out = dict(data.left_out)

    def make(i: int) -> Packed | UserError:
        try:
            return _packed(files[i], data.channels, form)
        except UserError as error:
            if on_bad == "error":
                raise
            return error

    starts = range(0, len(files), SHARD_IMAGES)
    records, kept = [], []
    for shard, start in enumerate(starts):
        rows = range(start, min(start + SHARD_IMAGES, len(files)))
        note = out / f"shard-{shard:05}.json"
        if not note.exists():
            done = ahead(make, rows, workers)
            report = functools.partial(lambda at, n: progress("packing", at + n, len(files)), start)
            write_text(note, json.dumps(_shard(note.with_suffix(".bin"), done, report)))
        noted = json.loads(note.read_text(encoding="utf-8"))
        for place, offset, size, crc, height, width in noted["images"]:
            i = start + place
            records.append((shard, size, offset, crc, labels[i], height, width, split_of[i]))
            kept.append(i)
        progress("packing", rows[-1] + 1, len(files))
    if lost := len(files) - len(kept):
        left_out["unreadable"] = left_out.get("unreadable", 0) + lost
    _complete(data, labels[kept], split_of[kept])
    index = np.array(records, INDEX)
    write_atomic(out / INDEX_FILE, lambda temporary: _save(temporary, index))
    write_text(out / NAMES_FILE, json.dumps([names[i] for i in kept]))
    shards = [f"shard-{shard:05}.bin" for shard in range(len(starts))]
    notes = [json.loads((out / f"shard-{shard:05}.json").read_text(encoding="utf-8")) for shard in range(len(starts))]
    sums = {name: digest(out / name) for name in (INDEX_FILE, NAMES_FILE)}
    about = {
        "version": VERSION,
        "name": data.name,
        "classes": list(data.classes),
        "channels": data.channels,
        "splits": splits,
        "left_out": left_out,
        "form": asdict(form),
        "shards": shards,
        "bytes": {name: (out / name).stat().st_size for name in (*sums, *shards)},
        "sha256": sums | {name: note["sha256"] for name, note in zip(shards, notes, strict=True)},
    }
    write_text(out / ABOUT, json.dumps(sealed_with(about), indent=1))  # last: with it, all is whole


def _complete(data: DataSet, labels: np.ndarray, split_of: np.ndarray) -> None:
    """Raise UserError where a class has lost all its images of a split."""
    for number, (name, split) in enumerate(data.splits.items()):
        lost = set(split.labels.tolist()) - set(labels[split_of == number].tolist())
        if lost:
            raise UserError(f"no image of class {data.classes[min(lost)]!r} in {name} can be read")


def _save(path: Path, index: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, index)


def _shard(path: Path, images: Iterator[Packed | UserError], progress: Callable[[int], None]) -> dict[str, Any]:
    """Write images into a shard, whole or not at all. Returns its sha256, and of each: place, offset, bytes, CRC, height, width."""
    rows, offset, sha = [], 0, hashlib.sha256()
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                for place, image in enumerate(images):
                    if not isinstance(image, UserError):
                        data, height, width = image
                        file.write(data)
                        sha.update(data)
                        rows.append((place, offset, len(data), zlib.crc32(data), height, width))
                        offset += len(data)
                    progress(place + 1)
            fsync_file(partial)
            partial.rename(path)
            fsync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    return {"sha256": sha.hexdigest(), "images": rows}


def _packed(file: Any, channels: int, form: PackFormat) -> Packed:
    """An image as it is packed. Raises UserError where it cannot be read."""
    pixels = read(file, channels)
    height, width = pixels.shape[:2]
    side = form.short_side
    small = (height, width) if side is None else covering(height, width, side, side)
    if side is None or min(height, width) <= side or max(small) > LONGEST:
        return bytes(contents(file)), height, width
    shrunk, out = scaled(pixels, *small), io.BytesIO()
    Image.fromarray(shrunk[:, :, 0] if channels == 1 else shrunk).save(out, "JPEG", quality=form.quality, optimize=True)
    return out.getvalue(), small[0], small[1]
