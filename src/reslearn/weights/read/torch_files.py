"""Files of torch.save: checked byte by byte before anything is allocated, and their code is never run.

A .pth is a pickle: a program that builds objects. torch's weights_only reader runs no foreign code, yet a file of 1.5 kB can
make it allocate 32 GB. So the program is first run on stand-ins that only compare what is claimed with what the file holds.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from reslearn.weights.read.refused import Refused

MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's number before 1.6, pickled: a LONG1 and STOP
ZIP_END, ZIP64_LOCATOR, ZIP64_END = 22, 20, 56  # bytes of a zip's last records
MOST_PICKLE = 64 << 20  # bytes; a state dict of 10,000 tensors takes 1.5 MB

# What torch.save writes and torch's own restricted reader accepts; no operation here names an object outside the file but GLOBAL.
OPERATIONS = frozenset([
    "PROTO", "STOP", "MARK", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT",
    "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID", "REDUCE", "BUILD"
])  # fmt: skip
ITEM_BYTES = {"DoubleStorage": 8, "LongStorage": 8, "FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2}
ITEM_BYTES |= {"ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}


class Storage(NamedTuple):
    """A claimed row of numbers; stands in for a torch storage, and, with length -1, for its class.

    A tuple, because a pickle may set the attributes of any other object.
    """

    item_bytes: int
    length: int = -1


class Dict(dict):
    """Stands in for OrderedDict; the attributes that its pickles may set are dropped."""

    def __init__(self) -> None:  # takes no argument: it would be copied, as often as the pickle says so
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> None:
    """Stands in for torch's builder of tensors, which would enlarge the storage to whatever the sizes ask for."""
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 8:
        raise Refused("holds a tensor that is not described as torch does")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise Refused("holds a tensor whose sizes are not whole numbers")
    numbers = math.prod(size)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if numbers else offset
    if max(end, numbers) > storage.length:
        raise Refused(f"claims a tensor of {'x'.join(map(str, size))} numbers where it holds {storage.length}")


def _size(sizes: Any = ()) -> tuple[int, ...]:
    """Stands in for torch.Size."""
    if not isinstance(sizes, tuple) or len(sizes) > 8 or any(type(n) is not int for n in sizes):
        raise Refused("holds a torch.Size that is none")
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
    """What is called in place of a name in a pickle. Raises Refused for all but those of a state dict."""
    if name not in STAND_INS:
        raise Refused(
            f"refers to {name}, which could be code and is not run; save the weights alone, with "
            "torch.save(model.state_dict(), path) or as .safetensors"
        )
    return STAND_INS[name]


class Rehearsal(pickle.Unpickler):
    """Runs a pickle on stand-ins. rooms: storage key -> bytes the file has for it; None: `room` bytes for all together."""

    def __init__(self, program: bytes, rooms: dict[str, int] | None, room: int) -> None:
        super().__init__(io.BytesIO(program))
        self.rooms, self.room, self.seen = rooms, room, {}

    def find_class(self, module: str, name: str) -> Any:
        return stand_in(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, item, key, _, length, *_ = pid
        if kind != "storage" or not isinstance(item, Storage) or type(length) is not int or length < 0 or type(key) is not str:
            raise Refused("holds a storage that is not described as torch does")
        if key not in self.seen:
            claimed = length * item.item_bytes
            room = self.room if self.rooms is None else self.rooms.get(key, 0)
            if claimed > room:
                raise Refused(f"claims {claimed:,} bytes of weights in '{key}' where it has {room:,}")
            self.room -= claimed
            self.seen[key] = Storage(item.item_bytes, length)
        return self.seen[key]


def rehearse(program: bytes, rooms: dict[str, int] | None, room: int) -> None:
    """Raise Refused unless a pickle builds tensors, numbers, texts, lists and dicts only, all within the file's size."""
    for operation, argument, _ in pickletools.genops(program):
        if operation.name == "GLOBAL":
            stand_in(str(argument).replace(" ", "."))
        if operation.name not in OPERATIONS:
            raise Refused(f"uses {operation.name}, which no state dict needs")
        if operation.name == "LONG_BINPUT" and (argument or 0) > len(program):  # the reader would make a table of this length
            raise Refused("numbers its objects beyond its own length")
    Rehearsal(program, rooms, room).load()


def check_directory(path: Path, size: int) -> None:
    """A zip's directory must end where the file's last record begins, as torch.save has it.

    Else one file could show Python's reader, which looks there, another archive than torch's, which goes by the offset written.
    """
    with path.open("rb") as file:
        file.seek(max(size - ZIP_END - ZIP64_LOCATOR - ZIP64_END, 0))
        tail = file.read()
    end = tail[-ZIP_END:]
    if len(end) < ZIP_END or end[:4] != b"PK\5\6":
        raise Refused("is not a whole PyTorch file: it does not end where it should")
    length, offset, comment = struct.unpack("<IIH", end[12:])
    after = 0
    if tail[-ZIP_END - ZIP64_LOCATOR :][:4] == b"PK\6\7":
        after = ZIP64_LOCATOR + ZIP64_END
        if tail[:4] != b"PK\6\6" or struct.unpack("<Q", tail[-ZIP_END - ZIP64_LOCATOR :][8:16])[0] != size - ZIP_END - after:
            raise Refused("is not a whole PyTorch file: its last records do not follow each other")
        length, offset = struct.unpack("<QQ", tail[40:56])
    if comment or offset + length + after + ZIP_END != size:
        raise Refused("is not a whole PyTorch file: its directory is not where it should be")


def check_zip(path: Path) -> None:
    """torch.save's file since 1.6: a zip of data.pkl and data/0, data/1, ... Raises Refused."""
    size = path.stat().st_size
    check_directory(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(e.compress_type or e.file_size != e.compress_size or e.flag_bits & 1 for e in entries):
            raise Refused("has compressed or encrypted parts, which torch.save does not write")
        if sum(e.file_size for e in entries) > size or len({e.filename for e in entries}) != len(entries):
            raise Refused("lists parts that overlap or occur twice")
        programs = [e for e in entries if e.filename.endswith("/data.pkl") and e.filename.count("/") == 1]
        if len(programs) != 1:
            raise Refused("is a zip archive, but not one that torch.save wrote")
        root = programs[0].filename.removesuffix("data.pkl")
        if any(e.filename.startswith((f"{root}code/", f"{root}constants.pkl")) for e in entries):
            raise Refused(
                "is a TorchScript archive, which holds code; save the weights alone, with torch.save(model.state_dict(), path)"
            )
        if programs[0].file_size > MOST_PICKLE:
            raise Refused(f"has a data.pkl of {programs[0].file_size:,} bytes: more than any state dict needs")
        if damaged := archive.testzip():
            raise Refused(f"is damaged: '{damaged}' does not match its checksum")
        rooms = {e.filename.removeprefix(f"{root}data/"): e.file_size for e in entries if e.filename.startswith(f"{root}data/")}
        rehearse(archive.read(programs[0]), rooms, size)


def one_pickle(file: BinaryIO) -> bytes:
    """The bytes of the next pickle of a file."""
    start = file.tell()
    # A text may claim any length, and a file's read would allocate it: BytesIO's gives what there is.
    program = io.BytesIO(file.read(MOST_PICKLE))
    for _ in pickletools.genops(program):
        pass
    file.seek(start + program.tell())
    return program.getvalue()[: program.tell()]


def check_legacy(path: Path) -> None:
    """torch.save's file before 1.6: pickles of a number, a version, the system, the object and the keys; then the storages."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(5):
            rehearse(one_pickle(file), None, size)


def load(path: Path, check: Callable[[Path], None], mmap: bool) -> Any:
    """torch.load after a check. Raises Refused for whatever is wrong."""
    try:
        check(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (Refused, OSError):
        raise
    except MemoryError as error:
        raise Refused("needs more memory than there is") from error
    except Exception as error:  # pickle and torch answer a damaged file with many kinds
        raise Refused(f"is not a whole PyTorch file ({type(error).__name__}: {str(error)[:120]})") from error


def load_zip(path: Path) -> Any:
    """A file of torch.save since 1.6, mapped and not read into memory. Raises Refused."""
    return load(path, check_zip, mmap=True)


def load_legacy(path: Path) -> Any:
    """A file of torch.save before 1.6. Raises Refused."""
    return load(path, check_legacy, mmap=False)


def refuse_pickle(path: Path) -> Any:
    """Any other pickle. Raises Refused."""
    raise Refused(
        "is a plain pickle, which could be code and is not run; save the weights with torch.save(model.state_dict(), path)"
    )
