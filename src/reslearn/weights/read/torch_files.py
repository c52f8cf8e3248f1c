"""Reader for torch.save's files that never runs their code and checks all sizes before allocating memory.

A .pth is a pickle: a program that builds objects. torch.load with weights_only runs no foreign code, but a file of 1.5 kB can
make it allocate 32 GB. So the pickle is first run with stand-ins that only compare the claimed sizes with those of the file.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from reslearn.weights.read.refused import Refused

MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # pickled magic number of torch.save before 1.6: LONG1 and STOP
ZIP_END, ZIP64_LOCATOR, ZIP64_END = 22, 20, 56  # bytes of a zip's last records
MAX_PICKLE = 64 << 20  # bytes; a state dict of 10,000 tensors takes 1.5 MB

# Operations that torch.save writes and torch's restricted reader accepts. Only GLOBAL can refer to objects outside the file.
OPERATIONS = frozenset([
    "PROTO", "STOP", "MARK", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT",
    "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID", "REDUCE", "BUILD"
])  # fmt: skip
ITEM_BYTES = {"DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2}
ITEM_BYTES |= {"ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}


class Storage(NamedTuple):
    """Stand-in for a torch storage of a claimed length, or, with length -1, for a storage class.

    A tuple, because a pickle can set the attributes of other objects.
    """

    item_bytes: int
    length: int = -1


class Dict(dict):
    """Stand-in for OrderedDict that ignores attributes set by the pickle."""

    def __init__(self) -> None:  # no argument, which a pickle could have copied over and over
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> None:
    """Stand-in for torch's tensor constructor, which would enlarge the storage to fit any sizes."""
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 8:
        raise Refused("contains a tensor in an unknown format")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Refused("contains a tensor whose sizes are not integers")
    numel = math.prod(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if numel else offset
    if max(end, numel) > storage.length:
        raise Refused(f"claims a tensor of {'x'.join(map(str, size))} values, but its storage has {storage.length}")


def _size(sizes: Any = ()) -> tuple[int, ...]:
    """Stand-in for torch.Size."""
    if not isinstance(sizes, tuple) or len(sizes) > 8 or any(type(n) is not int for n in sizes):
        raise Refused("contains an invalid torch.Size")
    return sizes


STAND_INS: dict[str, Any] = {
    "collections.OrderedDict": Dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": _size,
    **{f"torch.{name}": Storage(size) for name, size in ITEM_BYTES.items()},
}


def stand_in(name: str) -> Any:
    """The stand-in for a name in a pickle. Raises Refused for names that no state dict needs."""
    if name not in STAND_INS:
        raise Refused(
            f"refers to {name}, which could run code; save only the weights, with torch.save(model.state_dict(), path) or as "
            ".safetensors"
        )
    return STAND_INS[name]


class Rehearsal(pickle.Unpickler):
    """Runs a pickle with stand-ins. sizes: storage key -> bytes in the file; None: `available` bytes for all storages."""

    def __init__(self, program: bytes, sizes: dict[str, int] | None, available: int) -> None:
        super().__init__(io.BytesIO(program))
        self.sizes, self.available, self.storages = sizes, available, {}

    def find_class(self, module: str, name: str) -> Any:
        return stand_in(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, item, key, _, length, *_ = pid
        if kind != "storage" or not isinstance(item, Storage) or type(length) is not int or length < 0 or type(key) is not str:
            raise Refused("contains a storage in an unknown format")
        if key not in self.storages:
            claimed = length * item.item_bytes
            available = self.available if self.sizes is None else self.sizes.get(key, 0)
            if claimed > available:
                raise Refused(f"claims {claimed:,} bytes of weights in '{key}', but has {available:,}")
            self.available -= claimed
            self.storages[key] = Storage(item.item_bytes, length)
        return self.storages[key]


def rehearse(program: bytes, sizes: dict[str, int] | None, available: int) -> None:
    """Raises Refused unless a pickle only builds tensors, numbers, strings, lists and dicts that fit into the file's size."""
    for operation, argument, _ in pickletools.genops(program):
        if operation.name == "GLOBAL":
            stand_in(str(argument).replace(" ", "."))
        if operation.name not in OPERATIONS:
            raise Refused(f"uses the pickle operation {operation.name}, which no state dict needs")
        if operation.name == "LONG_BINPUT" and (argument or 0) > len(program):  # the reader would allocate a table of this length
            raise Refused("has memo indices beyond its own length")
    Rehearsal(program, sizes, available).load()


def check_directory(path: Path, size: int) -> None:
    """Checks that a zip's directory ends where the last record starts, as torch.save writes it.

    Otherwise Python's reader, which looks there, and torch's, which uses the stored offset, could read different archives.
    """
    with path.open("rb") as file:
        file.seek(max(size - ZIP_END - ZIP64_LOCATOR - ZIP64_END, 0))
        tail = file.read()
    end = tail[-ZIP_END:]
    if len(end) < ZIP_END or end[:4] != b"PK\5\6":
        raise Refused("is not a complete PyTorch file: it has no end record")
    length, offset, comment = struct.unpack("<IIH", end[12:])
    after = 0
    if tail[-ZIP_END - ZIP64_LOCATOR :][:4] == b"PK\6\7":
        after = ZIP64_LOCATOR + ZIP64_END
        if tail[:4] != b"PK\6\6" or struct.unpack("<Q", tail[-ZIP_END - ZIP64_LOCATOR :][8:16])[0] != size - ZIP_END - after:
            raise Refused("is not a complete PyTorch file: its last records are not consecutive")
        length, offset = struct.unpack("<QQ", tail[40:56])
    if comment or offset + length + after + ZIP_END != size:
        raise Refused("is not a complete PyTorch file: its directory is not at the end")


def check_zip(path: Path) -> None:
    """Checks a file of torch.save since 1.6: a zip of data.pkl and data/0, data/1, ... Raises Refused."""
    size = path.stat().st_size
    check_directory(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(e.compress_type or e.file_size != e.compress_size or e.flag_bits & 1 for e in entries):
            raise Refused("has compressed or encrypted entries, which torch.save does not write")
        if sum(e.file_size for e in entries) > size or len({e.filename for e in entries}) != len(entries):
            raise Refused("has overlapping or duplicate entries")
        programs = [e for e in entries if e.filename.endswith("/data.pkl") and e.filename.count("/") == 1]
        if len(programs) != 1:
            raise Refused("is a zip archive, but not from torch.save")
        root = programs[0].filename.removesuffix("data.pkl")
        if any(e.filename.startswith((f"{root}code/", f"{root}constants.pkl")) for e in entries):
            raise Refused(
                "is a TorchScript archive, which contains code; save only the weights, with torch.save(model.state_dict(), path)"
            )
        if programs[0].file_size > MAX_PICKLE:
            raise Refused(f"has a data.pkl of {programs[0].file_size:,} bytes; the maximum is {MAX_PICKLE:,}")
        if damaged := archive.testzip():
            raise Refused(f"is damaged: '{damaged}' does not match its checksum")
        sizes = {e.filename.removeprefix(f"{root}data/"): e.file_size for e in entries if e.filename.startswith(f"{root}data/")}
        rehearse(archive.read(programs[0]), sizes, size)


def one_pickle(file: BinaryIO) -> bytes:
    """Reads the next pickle of a file."""
    start = file.tell()
    # A string can claim any length. Reading it from a file would allocate that much; reading from BytesIO does not.
    program = io.BytesIO(file.read(MAX_PICKLE))
    for _ in pickletools.genops(program):
        pass
    file.seek(start + program.tell())
    return program.getvalue()[: program.tell()]


def check_legacy(path: Path) -> None:
    """Checks a file of torch.save before 1.6: pickles of a magic number, version, system, object and keys; then the storages."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(5):
            rehearse(one_pickle(file), None, size)


def load(path: Path, *, check: Callable[[Path], None], mmap: bool) -> Any:
    """Checks a file and calls torch.load. Raises Refused for any problem."""
    try:
        check(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (Refused, OSError):
        raise
    except MemoryError as error:
        raise Refused("needs more memory than is available") from error
    except Exception as error:  # pickle and torch raise many kinds for damaged files
        raise Refused(f"is not a complete PyTorch file ({type(error).__name__}: {str(error)[:120]})") from error


load_zip = partial(load, check=check_zip, mmap=True)
load_legacy = partial(load, check=check_legacy, mmap=False)


def refuse_pickle(path: Path) -> Any:
    """Raises Refused for any other pickle."""
    raise Refused("is a plain pickle, which could run code; save the weights with torch.save(model.state_dict(), path)")
