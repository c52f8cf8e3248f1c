"""Reads packed sets: many image files in a few large shards, with an index. pack.py writes them.

OUT/pack.json      classes, splits, shards, and the sha256 of every file including itself; written last
OUT/index.npy      one record per image (see INDEX), memory-mapped
OUT/names.json     the list of image names
OUT/shard-00000.bin ...    the image files, concatenated, memory-mapped
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
"""A record per image: shard, size and offset in bytes, CRC-32, class, height and width in pixels, and split."""


def is_packed(folder: Path) -> bool:
    """Whether a folder contains a packed set. Raises UserError if packing is not finished."""
    if (folder / ABOUT).is_file():
        return True
    if (folder / PLAN).is_file():
        raise UserError(f"{folder}: packing is not finished: run the same reslearn pack command again to resume")
    return False


class Pack:
    """A packed set. about: the content of pack.json; index: INDEX (N,); names: N image names.

    Raises UserError if a file is missing or has a different size, or if pack.json, the index or the names are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            version, sealed = self.about["version"], self.about == sealed_with(self.about)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as why:
            raise UserError(f"{folder / ABOUT}: damaged ({why}): pack the images again") from None
        if version != VERSION:
            raise UserError(f"{folder / ABOUT}: pack version {version}, not {VERSION}: pack the images again")
        if not sealed:
            raise UserError(f"{folder / ABOUT}: damaged (checksum mismatch): pack the images again")
        for name, size in self.about["bytes"].items():
            self._check_size(folder / name, size)
        for name in (INDEX_FILE, NAMES_FILE):
            if digest(folder / name) != self.about["sha256"][name]:
                raise UserError(f"{folder / name}: damaged (checksum mismatch): pack the images again")
        self.index: np.ndarray = np.load(folder / INDEX_FILE, mmap_mode="r")
        self.names: tuple[str, ...] = tuple(json.loads((folder / NAMES_FILE).read_text(encoding="utf-8")))

    def _check_size(self, path: Path, size: int) -> None:
        try:
            actual = path.stat().st_size
        except OSError as why:
            raise UserError(f"{path}: cannot be opened: {why.strerror}: pack the images again") from None
        if actual != size:
            raise UserError(f"{path}: damaged ({actual:,} bytes instead of {size:,}): pack the images again")

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """The shards, uint8 (bytes,), memory-mapped."""
        sizes = self.about["bytes"]  # a shard without readable images is empty, and empty files cannot be mapped
        files = {name: self.folder / name for name in self.about["shards"]}
        return [np.memmap(file, np.uint8, "r") if sizes[name] else np.zeros(0, np.uint8) for name, file in files.items()]

    def contents(self, row: int) -> np.ndarray:
        """The encoded image, uint8 (N,). Raises BadImage if its CRC is wrong."""
        record = self.index[row]
        start = int(record["offset"])
        data = self.shards[record["shard"]][start : start + int(record["bytes"])]
        if zlib.crc32(data) != record["crc"]:
            raise BadImage("damaged", f"{self.title(row)}: damaged (checksum mismatch): pack the images again")
        return data

    def title(self, row: int) -> str:
        """The shard and name of an image, for messages."""
        return f"{self.folder / self.about['shards'][self.index['shard'][row]]}: {self.names[row]}"

    def verify(self) -> list[str]:
        """Reads every shard. Returns a line for each damaged one, naming its damaged images."""
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
    """The content of pack.json with `seal`, the sha256 of the rest."""
    content = {key: value for key, value in about.items() if key != "seal"}
    return content | {"seal": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
