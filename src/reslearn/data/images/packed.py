"""Reads packed sets: the bytes of many images in a few large files, with an index; pack.py writes them.

OUT/pack.json      classes, splits, shards, the sha256 of every other file and its own; written last
OUT/index.npy      one record per image (see INDEX), memory-mapped
OUT/names.json     the images' names, a list
OUT/shard-00000.bin ...    the images' files, end to end, memory-mapped
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from reslearn.data.images.files import BadImage, PackedImage
from reslearn.errors import UserError

ABOUT, INDEX_FILE, NAMES_FILE, PLAN = "pack.json", "index.npy", "names.json", "plan.json"
VERSION = 2
INDEX = np.dtype(
    [("shard", "<u4"), ("bytes", "<u4"), ("offset", "<u8"), ("crc", "<u4"), ("label", "<u4")]
    + [("height", "<u4"), ("width", "<u4"), ("split", "<u4")]
)
"""Of each image: its shard and where its bytes lie there, their CRC-32, class and split, and its height and width in pixels."""


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed set. Raises UserError where it is not finished."""
    if (folder / ABOUT).is_file():
        return True
    if (folder / PLAN).is_file():
        raise UserError(f"{folder}: a packed set that is not finished: run the same reslearn pack command again to resume")
    return False


class Pack:
    """A packed set. about: what pack.json holds; index: INDEX (N,); names: of the N images.

    Raises UserError where a file is missing or not of the size it was, and where pack.json, the index or the names have changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            version, sealed = self.about["version"], self.about == sealed_with(self.about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as why:
            raise UserError(f"{folder / ABOUT}: damaged ({why}): pack the images again") from None
        if version != VERSION:
            raise UserError(f"{folder / ABOUT}: a pack of version {version}, not {VERSION}: pack the images again")
        if not sealed:
            raise UserError(f"{folder / ABOUT}: damaged: its content is not what was written; pack the images again")
        for name, size in self.about["bytes"].items():
            self._check_size(folder / name, size)
        for name in (INDEX_FILE, NAMES_FILE):
            if digest(folder / name) != self.about["sha256"][name]:
                raise UserError(f"{folder / name}: damaged: its bytes are not those that were written; pack the images again")
        self.index: np.ndarray = np.load(folder / INDEX_FILE, mmap_mode="r")
        self.names: tuple[str, ...] = tuple(json.loads((folder / NAMES_FILE).read_text(encoding="utf-8")))

    def _check_size(self, path: Path, size: int) -> None:
        try:
            there = path.stat().st_size
        except OSError as why:
            raise UserError(f"{path}: cannot be opened: {why.strerror}: pack the images again") from None
        if there != size:
            raise UserError(f"{path}: damaged: {there:,} bytes instead of {size:,}; pack the images again")

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """The bytes of each shard, uint8, memory-mapped."""
        sizes = self.about["bytes"]  # a shard whose images were all left out is empty, which cannot be mapped
        files = {name: self.folder / name for name in self.about["shards"]}
        return [np.memmap(file, np.uint8, "r") if sizes[name] else np.zeros(0, np.uint8) for name, file in files.items()]

    def contents(self, row: int) -> np.ndarray:
        """The bytes of an image, uint8 (N,), checked."""
        record = self.index[row]
        start = int(record["offset"])
        data = self.shards[record["shard"]][start : start + int(record["bytes"])]
        if zlib.crc32(data) != record["crc"]:
            raise BadImage(
                "damaged", f"{self.title(row)}: damaged: its bytes are not those that were written; pack the images again"
            )
        return data

    def title(self, row: int) -> str:
        """The shard and the name of an image, for messages."""
        return f"{self.folder / self.about['shards'][self.index['shard'][row]]}: {self.names[row]}"

    def verify(self) -> list[str]:
        """Reads every shard from end to end. Returns a line for each damaged one, with its damaged images."""
        damaged = []
        for number, name in enumerate(self.about["shards"]):
            if digest(self.folder / name) == self.about["sha256"][name]:
                continue
            rows = np.flatnonzero(self.index["shard"] == number).tolist()
            images = []
            for row in rows:
                try:
                    self.contents(row)
                except UserError:
                    images.append(self.names[row])
            damaged.append(f"{self.folder / name}: {', '.join(images) or 'between its images'}")
        return damaged


@dataclass(frozen=True, slots=True)
class Record(PackedImage):
    """One image of a packed set."""

    pack: Pack
    row: int

    @property
    def bytes(self) -> int:
        return int(self.pack.index["bytes"][self.row])

    def contents(self) -> np.ndarray:
        return self.pack.contents(self.row)

    def stamp(self) -> list[str | int]:
        return [str(self.pack.folder.resolve()), self.row, int(self.pack.index["crc"][self.row]), self.bytes]

    def __str__(self) -> str:
        return self.pack.title(self.row)


def sealed_with(about: dict[str, Any]) -> dict[str, Any]:
    """The content of pack.json with its own sha256, `seal`."""
    content = {key: value for key, value in about.items() if key != "seal"}
    return content | {"seal": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def digest(path: Path) -> str:
    """A file's sha256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
