"""Reads image files: pixels, sizes and facts, or a one-line error that names the file and the reason."""

import gzip
import io
import math
import os
import stat
import threading
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

# Imported by name so that Pillow finds these two without loading every plugin it has.
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from reslearn.errors import UserError

MAX_PIXELS = 100_000_000
"""The largest height x width that is decoded: 100 million pixels are 300 MB in memory."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""Suffixes of images, in lower case. They select files in a folder; how to read a file is told by its content."""

# Pillow's other formats start programs (EPS) or have decoders that few people use.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_GRAY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"})

_SUFFIXES = {"JPEG": ".jpg .jpeg .jpe .jfif", "TIFF": ".tif .tiff", "PPM": ".ppm .pgm .pbm .pnm"}


class BadImage(UserError):
    """A file that cannot be read as an image. `kind`: "unreadable" (not there, no file, not ours), "empty", "not an image",
    "too large", "truncated" or "damaged".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Facts(NamedTuple):
    """What a file holds, as it is stored.

    format: JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM. mode: Pillow's (1, L, P, RGB, RGBA, CMYK, I;16, F, ...). orientation: of EXIF,
    1 to 8, where it is still to be applied. deep: more than 8 bits a value. fits: whether the name's suffix is one of the format.
    """

    format: str
    mode: str
    orientation: int
    gray: bool
    deep: bool
    transparent: bool
    animated: bool
    fits: bool


class PackedImage(ABC):
    """An image inside a larger file; its str names both."""

    __slots__ = ()

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Its size."""

    @abstractmethod
    def contents(self) -> np.ndarray:
        """Its bytes, uint8 (N,). Raises UserError where they are not what was written."""

    @abstractmethod
    def stamp(self) -> list[str | int]:
        """Values that change when the image does."""


def contents(path: Path | PackedImage) -> bytes | np.ndarray:
    """The bytes of an image. Raises UserError as `read` does."""
    if isinstance(path, PackedImage):
        return path.contents()
    with _file(path) as file:
        try:
            return file.read()
        except OSError as why:
            raise UserError(f"{path}: cannot be read: {why.strerror}") from None


def file_bytes(path: Path | PackedImage) -> int:
    """The size of an image's file, or of its part of one. Raises OSError."""
    return path.bytes if isinstance(path, PackedImage) else path.stat().st_size


def probe(path: str | os.PathLike[str] | PackedImage) -> tuple[int, int, int]:
    """(height, width, channels) of the image that `read` would give, from the file's header alone.

    Height and width are those after the EXIF orientation; channels is 1 for gray modes, with or without transparency,
    and 3 for all others. Raises UserError, naming the file, where the header cannot be read or promises more than
    MAX_PIXELS.
    """
    with _opened(path if isinstance(path, PackedImage) else Path(path)) as image:
        height, width = image.height, image.width
        if _orientation(image) >= 5:
            height, width = width, height
        return height, width, 1 if image.mode in _GRAY_MODES else 3


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """(height, width, orientation): the size that `read` would give, and the EXIF orientation, 1 to 8, that it undoes.

    From 5 on, the file stores the image lying, with height and width exchanged. Raises UserError as `probe` does.
    """
    with _opened(Path(path)) as image:
        turn = _orientation(image)
        return (image.width, image.height, turn) if turn >= 5 else (image.height, image.width, turn)


def read(path: str | os.PathLike[str] | PackedImage, channels: int) -> np.ndarray:
    """The image as uint8 (height, width, channels), upright; `channels` is 1 (luminance, ITU-R 601) or 3 (RGB).

    The format is told by the content (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM). Of an animation, the first frame is taken.
    Transparent pixels are laid over white. 16-bit and 32-bit integer gray is divided by 257 and rounded (12-bit TIFF by
    4095/255), and 32-bit values outside 0..65535 are refused; floats are multiplied by 255, and refused outside 0..1.
    Of 16-bit color, Pillow keeps the upper byte. CMYK is converted without a color profile. Of PNG, an orientation
    that is written after the pixels is ignored, so that `probe` and `read` agree.
    Raises UserError, naming the file, where it is missing, not an image, damaged, or larger than MAX_PIXELS.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    with _opened(path if isinstance(path, PackedImage) else Path(path)) as image:
        return _pixels(image, channels)


def inspect(path: str | os.PathLike[str] | PackedImage) -> tuple[Facts, np.ndarray]:
    """What a file holds, and its pixels as `read` gives them in three channels. Raises BadImage."""
    path = path if isinstance(path, PackedImage) else Path(path)
    with _opened(path) as image:
        form = "JPEG" if image.format == "MPO" else str(image.format)  # photos of phones: a JPEG with further ones behind it
        deep = image.mode.startswith(("I", "F")) or bool(image.tile and ";16" in str(image.tile[0].args))
        animated = form != "JPEG" and bool(getattr(image, "is_animated", False))
        fits = isinstance(path, PackedImage) or path.suffix.lower() in _suffixes(form)  # what is packed has no name of its own
        turn, gray, clear = _orientation(image), image.mode in _GRAY_MODES, image.has_transparency_data
        return Facts(form, image.mode, turn, gray, deep, clear, animated, fits), _pixels(image, 3)


def suffix_for(form: str) -> str:
    """What names of a format usually end with: ".jpg" for JPEG."""
    return _suffixes(form)[0]


def _suffixes(form: str) -> list[str]:
    return _SUFFIXES.get(form, f".{form.lower()}").split()


def _pixels(image: ImageFile.ImageFile, channels: int) -> np.ndarray:
    """The upright pixels of an opened image, as `read` describes them."""
    turn = _orientation(image)
    # Pillow widens gray of 2 and 4 bits to 8, but not the gray that means transparent.
    scale = {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args), 1) if image.format == "PNG" and image.tile else 1
    image.load()
    if scale > 1 and "transparency" in image.info:
        image.info["transparency"] *= scale
    flat: Image.Image = image
    if image.mode.startswith("I") or image.mode == "F":
        flat = Image.fromarray(_scaled(image))
    elif image.has_transparency_data:
        flat = Image.new("RGBA", image.size, "white")
        flat.alpha_composite(image.convert("RGBA"))
    elif image.mode == "LAB":  # which Pillow cannot turn into gray directly
        flat = image.convert("RGB")
    pixels = np.array(flat.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)
    # EXIF 2.3, tag Orientation: 5 to 8 exchange rows and columns, then come the mirrors.
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _scaled(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits -> uint8 (H, W). Raises ValueError where the values have no agreed scale."""
    values = np.array(image)
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():  # false for NaN as well
            raise ValueError("its floating-point pixels are not all within 0..1, so their scale is unknown")
        return np.rint(values * 255).astype(np.uint8)
    if image.mode == "I" and values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("its integer pixels are not all within 0..65535, so their scale is unknown")
    values = values.astype(np.uint32)
    tags = getattr(image, "tag_v2", {})  # of TIFF only: 258 is BitsPerSample, 262 PhotometricInterpretation
    if image.mode != "I" and tags.get(258, (16,))[0] == 12:
        gray = (values * 255 + 2047) // 4095
    else:
        gray = (values + 128) // 257
    if image.mode != "I" and tags.get(262) == 0:
        gray = 255 - gray
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray[values == clear] = 255
    return gray.astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8; 1 where there is none, or none that makes sense."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        # The base class's method: PNG's own would decode the whole file to look for EXIF after the pixels.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF raises nearly anything, and the pixels are good without it
        return 1
    return int(value) if value in range(1, 9) else 1


@contextmanager
def _opened(path: Path | PackedImage) -> Iterator[ImageFile.ImageFile]:
    """The image with its header read and its size checked. Whatever goes wrong inside comes out as a UserError."""
    with _file(path) as file, _QUIET:
        begins = file.read(16)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height} pixels"
                    raise BadImage("too large", f"{path}: {size} are more than the {MAX_PIXELS:,} allowed: make it smaller")
                if 0 in image.size:
                    raise BadImage("damaged", f"{path}: not an image: it has no pixels")
                yield image
        except (UserError, MemoryError):
            raise
        except Image.DecompressionBombError as why:
            message = f"{path}: more pixels than the {MAX_PIXELS:,} allowed: make it smaller ({why})"
            raise BadImage("too large", message) from None
        except UnidentifiedImageError:
            known = ", ".join(_FORMATS)
            kind = "damaged" if looks_like_an_image(begins) else "not an image"
            raise BadImage(kind, f"{path}: not an image that can be read ({known}): it begins with {begins!r}") from None
        except Exception as why:  # Pillow's decoders raise nearly anything on damaged bytes
            kind = "truncated" if "truncated" in str(why).lower() else "damaged"
            raise BadImage(kind, f"{path}: cannot be decoded, damaged or cut short: {why or type(why).__name__}") from None


def looks_like_an_image(begins: bytes) -> bool:
    """Whether a file that begins with these bytes (16 are enough) says that it is of a format that is read here."""
    webp = begins[:4] == b"RIFF" and begins[8:12] == b"WEBP"
    return webp or begins.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))


def _file(path: Path | PackedImage) -> BinaryIO:
    """The file, open; UserError where it is missing, empty, not a file (a pipe would block) or not ours to read."""
    if isinstance(path, PackedImage):
        return io.BytesIO(path.contents().tobytes())
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("unreadable", f"{path}: not an image: it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("unreadable", f"{path}: not an image: it is a device or a pipe")
        if status.st_size == 0:
            raise BadImage("empty", f"{path}: not an image: it is empty (0 bytes)")
        return path.open("rb")
    except UserError:
        raise
    except FileNotFoundError:
        raise BadImage("unreadable", f"{path}: there is no such file") from None
    except OSError as why:
        raise BadImage("unreadable", f"{path}: cannot be opened: {why.strerror}") from None
    except ValueError as why:  # a name that no file can have, such as one with a zero byte
        raise BadImage("unreadable", f"{str(path)!r}: cannot be opened: {why}") from None


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The uint8 array in an idx file (the format of MNIST and Fashion-MNIST), plain or gzip, in the shape it has there.

    Magic number, element type, dimensions and byte count are checked before memory is taken. Raises UserError, naming
    the file and what is wrong.
    """
    path = Path(path)
    with _file(path) as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        # Deflate packs at most 1032 bytes into one, so a header cannot make us take more memory than that.
        most = path.stat().st_size * (1032 if packed else 1)
        try:
            with gzip.open(plain) if packed else plain as file:
                magic = file.read(4)
                if len(magic) < 4 or magic[:2] != b"\0\0":
                    raise UserError(f"{path}: not an idx file: it begins with {magic!r}")
                kind, dimensions = magic[2:]
                if kind != 8:
                    raise UserError(f"{path}: idx elements of type 0x{kind:02x}; only unsigned bytes (0x08) are read")
                sizes = file.read(4 * dimensions)
                if not 1 <= dimensions <= 4 or len(sizes) < 4 * dimensions:
                    raise UserError(f"{path}: an idx header with {dimensions} dimensions that is wrong or cut short")
                shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
                count = math.prod(shape)
                data = file.read(count + 1) if count <= most else b""
                if len(data) != count:
                    raise UserError(f"{path}: {'more' if len(data) > count else 'less'} than the {count:,} bytes of its header")
        except (OSError, EOFError, zlib.error) as why:
            raise UserError(f"{path}: damaged or cut short: {why}") from None
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def read_cifar(path: str | os.PathLike[str], size: int, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(labels, pixels) of a file in CIFAR's binary format: int64 (N, len(classes)), uint8 (N, 3, 32, 32).

    A record is one byte for each label, then 32x32 red, green and blue. `size` is the exact size of the file in bytes,
    and label j must be below `classes[j]`. Raises UserError, naming the file and the record.
    """
    path = Path(path)
    with _file(path) as file:
        actual = path.stat().st_size
        if actual != size:
            raise UserError(f"{path}: {actual:,} bytes instead of {size:,}: cut short, or not the binary version of CIFAR")
        records = np.fromfile(file, np.uint8, size).reshape(-1, len(classes) + 3072)
    labels = records[:, : len(classes)].astype(np.int64)
    wrong = np.argwhere(labels >= np.asarray(classes))
    if len(wrong):
        record, column = wrong[0]
        raise UserError(f"{path}: record {record} has label {labels[record, column]}, but there are {classes[column]} classes")
    return labels, np.ascontiguousarray(records[:, len(classes) :]).reshape(-1, 3, 32, 32)


class _Quiet:
    """A context without Pillow's warnings (what matters in them is an error here).

    `warnings.catch_warnings` saves and restores one list for the whole process, so threads that enter and leave in any
    order would restore the wrong one. Here the first to enter saves, and the last to leave restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._saved.__exit__(None, None, None)


_QUIET = _Quiet()
