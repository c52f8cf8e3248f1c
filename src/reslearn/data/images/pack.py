"""Packs image files into a few large shards with an index (see packed.py), scaling each photo down once.

Shards follow the order of the images. Each shard is written under a temporary name, renamed, and then recorded in a note, so an
interruption loses at most one shard, and the same call resumes.
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
from reslearn.files import user_path, write_atomic, write_text, writing

SHARD_IMAGES = 8192
LONGEST = 65_500  # the longest side in pixels that libjpeg can write
Packed = tuple[bytes, int, int]  # a file's bytes, height and width


@dataclass(frozen=True)
class PackFormat:
    """How images are stored. Images with a shorter side above short_side px are scaled to it and saved as JPEG of this quality;
    others, and those too long for a JPEG, are stored unchanged. short_side None stores all images unchanged.
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
    """Packs a folder or list of images into the folder `out`, or resumes an interrupted call.

    Every image is decoded: a damaged one raises UserError, or is left out with on_bad="skip". Also raises UserError if `out` is
    inside the data, contains other files, or was started with other images or options.
    """
    source, out = user_path(data), user_path(out)
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{out}: is inside {data}, where it would count as a class: choose a folder outside of it")
    opened = open_set(data, on_bad=on_bad)
    if opened.resident or opened.packed:
        reason = "it is already packed" if opened.packed else "small images of one size are kept in memory"
        raise UserError(f"{data}: nothing to pack: {reason}")
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
        raise UserError(f"{out}: another process is packing into this folder: wait until it has finished") from None
    try:
        yield
    finally:
        lock.release()


def _begin(out: Path, plan: dict[str, Any], data: str) -> None:
    """Saves the plan or, when resuming, checks that it is unchanged."""
    path = out / PLAN
    if not path.exists():
        if foreign := next((path.name for path in sorted(out.iterdir()) if path.name != ".lock"), None):
            raise UserError(f"{out}: contains {foreign}: choose a new folder for the packed images")
        write_text(path, json.dumps(plan))
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: damaged: remove {out} and pack again") from None
    if saved != plan:
        changed = any(saved.get(key) != plan[key] for key in ("images", "order"))
        reason = f"the images of {data} have changed since it was started" if changed else f"it was started with {_options(saved)}"
        raise UserError(f"{out}: {reason}: choose a new folder, or remove this one")


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
            images = ahead(make, rows, workers)
            report = functools.partial(lambda first, n: progress("packing", first + n, len(files)), start)
            write_text(note, json.dumps(_write_shard(note.with_suffix(".bin"), images, report)))
        for j, offset, size, crc, height, width in json.loads(note.read_text(encoding="utf-8"))["images"]:
            i = start + j
            records.append((shard, size, offset, crc, labels[i], height, width, split_of[i]))
            kept.append(i)
        progress("packing", rows[-1] + 1, len(files))
    if unreadable := len(files) - len(kept):
        left_out["unreadable"] = left_out.get("unreadable", 0) + unreadable
    _check_classes(data, labels[kept], split_of[kept])
    index = np.array(records, INDEX)
    write_atomic(out / INDEX_FILE, lambda temporary: _save_index(temporary, index))
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
    write_text(out / ABOUT, json.dumps(sealed_with(about), indent=1))  # written last: it marks the pack as complete


def _check_classes(data: DataSet, labels: np.ndarray, split_of: np.ndarray) -> None:
    """Raises UserError if a class has lost all its images of a split."""
    for number, (name, split) in enumerate(data.splits.items()):
        lost = set(split.labels.tolist()) - set(labels[split_of == number].tolist())
        if lost:
            raise UserError(f"no image of class {data.classes[min(lost)]!r} in {name} can be read")


def _save_index(path: Path, index: np.ndarray) -> None:
    with path.open("wb") as file:  # given a path, np.save would append .npy
        np.save(file, index)


def _write_shard(path: Path, images: Iterator[Packed | UserError], progress: Callable[[int], None]) -> dict[str, Any]:
    """Writes a shard atomically. Returns its sha256 and (index in shard, offset, bytes, CRC, height, width) of each image."""
    rows: list[tuple[int, int, int, int, int, int]] = []
    sha = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for i, image in enumerate(images):
                if not isinstance(image, UserError):
                    data, height, width = image
                    rows.append((i, file.tell(), len(data), zlib.crc32(data), height, width))
                    file.write(data)
                    sha.update(data)
                progress(i + 1)

    write_atomic(path, write)
    return {"sha256": sha.hexdigest(), "images": rows}


def _packed(file: Any, channels: int, form: PackFormat) -> Packed:
    """An image as it is stored. Raises UserError if it cannot be read."""
    pixels = read(file, channels)
    height, width = pixels.shape[:2]
    side = form.short_side
    small = (height, width) if side is None else covering(height, width, side, side)
    if side is None or min(height, width) <= side or max(small) > LONGEST:
        return bytes(contents(file)), height, width
    shrunk, out = scaled(pixels, *small), io.BytesIO()
    Image.fromarray(shrunk[:, :, 0] if channels == 1 else shrunk).save(out, "JPEG", quality=form.quality, optimize=True)
    return out.getvalue(), small[0], small[1]
