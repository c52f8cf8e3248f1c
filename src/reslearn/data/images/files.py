"""Reads image files: pixels, sizes and storage facts. Errors are one line with the file and the reason."""

import gzip
import io
import math
import os
import re
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

# Importing these two plugins here registers them, so that Pillow does not load all of its plugins.
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from reslearn.errors import UserError

MAX_PIXELS = 100_000_000
"""The largest height x width to decode: 100 million pixels take 300 MB of memory."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""Lowercase suffixes that select the image files of a folder. The format of a file is detected from its content."""

# Pillow's other formats run external programs (EPS) or have rarely used decoders.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_GRAY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"})

_SUFFIXES = {"JPEG": ".jpg .jpeg .jpe .jfif", "TIFF": ".tif .tiff", "PPM": ".ppm .pgm .pbm .pnm"}


class BadImage(UserError):
    """A file that cannot be read as an image. `kind`: "unreadable" (missing, not a regular file, no permission), "empty",
    "not an image", "too large", "truncated" or "damaged".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Facts(NamedTuple):
    """How an image is stored.

    format: JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM. mode: Pillow's (1, L, P, RGB, RGBA, CMYK, I;16, F, ...). orientation: EXIF's,
    1 to 8, not yet applied. deep: more than 8 bits per channel. fits: whether the file's suffix matches the format.
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
    """An image inside a larger file. Its str names both."""

    __slots__ = ()

    @property
    @abstractmethod
    def bytes(self) -> int:
        """The size of the encoded image."""

    @abstractmethod
    def contents(self) -> np.ndarray:
        """The encoded image, uint8 (N,). Raises UserError if it is damaged."""

    @abstractmethod
    def stamp(self) -> list[str | int]:
        """Values that change when the image changes."""


def contents(path: Path | PackedImage) -> bytes | np.ndarray:
    """The encoded image. Raises UserError like `read`."""
    if isinstance(path, PackedImage):
        return path.contents()
    with _file(path) as file:
        try:
            return file.read()
        except OSError as why:
            raise UserError(f"{path}: cannot be read: {why.strerror}") from None


def file_bytes(path: Path | PackedImage) -> int:
    """The size of the encoded image. Raises OSError."""
    return path.bytes if isinstance(path, PackedImage) else path.stat().st_size


def probe(path: str | os.PathLike[str] | PackedImage) -> tuple[int, int, int]:
    """(height, width, channels) of the image as `read` returns it, from the file's header alone.

    Height and width are after EXIF rotation; channels is 1 for gray modes, with or without transparency, else 3. Raises UserError
    if the header cannot be read or declares more than MAX_PIXELS.
    """
    with _opened(path if isinstance(path, PackedImage) else Path(path)) as image:
        height, width = image.height, image.width
        if _orientation(image) >= 5:
            height, width = width, height
        return height, width, 1 if image.mode in _GRAY_MODES else 3


def upright_size(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """(height, width, orientation): the size after EXIF rotation, as `read` returns it, and the EXIF orientation, 1 to 8.

    Orientations 5 to 8 swap height and width. Raises UserError like `probe`.
    """
    with _opened(Path(path)) as image:
        orientation = _orientation(image)
        return (image.width, image.height, orientation) if orientation >= 5 else (image.height, image.width, orientation)


def read(path: str | os.PathLike[str] | PackedImage, channels: int) -> np.ndarray:
    """Returns the image upright, uint8 (height, width, channels). `channels` is 1 (luminance, ITU-R 601) or 3 (RGB).

    The format (JPEG, PNG, WebP, BMP, GIF, TIFF, PPM) is detected from the content. Animations yield their first frame.
    Transparent pixels are composited over white. 16-bit and 32-bit integer gray is divided by 257 and rounded (12-bit TIFF by
    4095/255); 32-bit values must be in 0..65535. Floats must be in 0..1 and are multiplied by 255. Of 16-bit color, Pillow
    keeps the upper byte. CMYK is converted without a color profile. A PNG orientation stored after the pixels is ignored, so
    that `probe` and `read` agree.
    Raises UserError if the file is missing, not an image, damaged, or larger than MAX_PIXELS.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    with _opened(path if isinstance(path, PackedImage) else Path(path)) as image:
        return _pixels(image, channels)


def inspect(path: str | os.PathLike[str] | PackedImage) -> tuple[Facts, np.ndarray]:
    """Returns how an image is stored, and its pixels as `read` returns them with 3 channels. Raises BadImage."""
    path = path if isinstance(path, PackedImage) else Path(path)
    with _opened(path) as image:
        form = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG from a phone with further JPEGs appended
        deep = image.mode.startswith(("I", "F")) or bool(image.tile and ";16" in str(image.tile[0].args))
        animated = form != "JPEG" and bool(getattr(image, "is_animated", False))
        fits = isinstance(path, PackedImage) or path.suffix.lower() in _suffixes(form)  # packed images have no suffix
        orientation, gray, transparent = _orientation(image), image.mode in _GRAY_MODES, image.has_transparency_data
        return Facts(form, image.mode, orientation, gray, deep, transparent, animated, fits), _pixels(image, 3)


def suffix_for(form: str) -> str:
    """The usual suffix of a format: ".jpg" for JPEG."""
    return _suffixes(form)[0]


def _suffixes(form: str) -> list[str]:
    return _SUFFIXES.get(form, f".{form.lower()}").split()


def _pixels(image: ImageFile.ImageFile, channels: int) -> np.ndarray:
    """The pixels of an opened image, as `read` describes them."""
    orientation = _orientation(image)
    # Pillow expands 2-bit and 4-bit gray to 8 bits, but not the gray value that marks transparency.
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
    elif image.mode == "LAB":  # Pillow cannot convert LAB to gray directly
        flat = image.convert("RGB")
    pixels = np.array(flat.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)
    return np.ascontiguousarray(upright(pixels, orientation))


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation, 1 to 8, of an image or mask (H, W, ...). Returns a view."""
    if orientation >= 5:  # EXIF 2.3, tag Orientation: 5 to 8 swap rows and columns before mirroring
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


def _scaled(image: Image.Image) -> np.ndarray:
    """Converts gray of more than 8 bits to uint8 (H, W). Raises ValueError if the scale of the values is unknown."""
    values = np.array(image)
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():  # also rejects NaN
            raise ValueError("unknown scale: floating-point pixels are not all within 0..1")
        return np.rint(values * 255).astype(np.uint8)
    if image.mode == "I" and values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("unknown scale: integer pixels are not all within 0..65535")
    values = values.astype(np.uint32)
    tags = getattr(image, "tag_v2", {})  # TIFF tags: 258 is BitsPerSample, 262 PhotometricInterpretation
    if image.mode != "I" and tags.get(258, (16,))[0] == 12:
        gray = (values * 255 + 2047) // 4095
    else:
        gray = (values + 128) // 257
    if image.mode != "I" and tags.get(262) == 0:
        gray = 255 - gray
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return gray.astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation still to be applied, 1 to 8; 1 if missing or invalid."""
    if image.format == "TIFF":  # Pillow rotates TIFFs itself
        return 1
    try:
        # The base class's method, since PNG's would decode the whole file to look for EXIF after the pixels.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF can raise anything, and the pixels are valid without it
        return 1
    return int(value) if value in range(1, 9) else 1


@contextmanager
def _opened(path: Path | PackedImage) -> Iterator[ImageFile.ImageFile]:
    """Opens an image and checks its size. Exceptions raised in the block become UserError."""
    with _file(path) as file, _QUIET:
        head = file.read(16)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height} pixels"
                    raise BadImage("too large", f"{path}: {size} exceed the limit of {MAX_PIXELS:,}: resize the image")
                if 0 in image.size:
                    raise BadImage("damaged", f"{path}: not an image: no pixels")
                yield image
        except (UserError, MemoryError):
            raise
        except Image.DecompressionBombError as why:
            pixels = re.search(r"\((\d+) pixels\)", str(why))
            size = f"{int(pixels[1]):,} pixels" if pixels else "its pixels"
            raise BadImage("too large", f"{path}: {size} exceed the limit of {MAX_PIXELS:,}: resize the image") from None
        except UnidentifiedImageError:
            supported = ", ".join(_FORMATS)
            kind = "damaged" if looks_like_an_image(head) else "not an image"
            raise BadImage(kind, f"{path}: not an image in a supported format ({supported}): it starts with {head!r}") from None
        except Exception as why:  # Pillow's decoders can raise anything on damaged data
            kind = "truncated" if "truncated" in str(why).lower() else "damaged"
            raise BadImage(kind, f"{path}: cannot be decoded (damaged or truncated): {why or type(why).__name__}") from None


def looks_like_an_image(head: bytes) -> bool:
    """Whether the first bytes of a file (16 are enough) are the signature of a supported format."""
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return webp or head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))


def _file(path: Path | PackedImage) -> BinaryIO:
    """Opens a file. Raises UserError if it is missing, empty, unreadable, or not a regular file (a pipe would block)."""
    if isinstance(path, PackedImage):
        return io.BytesIO(path.contents().tobytes())
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("unreadable", f"{path}: not an image: it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("unreadable", f"{path}: not an image: it is a device or a pipe")
        if status.st_size == 0:
            raise BadImage("empty", f"{path}: not an image: empty file (0 bytes)")
        return path.open("rb")
    except UserError:
        raise
    except FileNotFoundError:
        raise BadImage("unreadable", f"{path}: there is no such file") from None
    except OSError as why:
        raise BadImage("unreadable", f"{path}: cannot be opened: {why.strerror}") from None
    except ValueError as why:  # an invalid name, such as one with a null byte
        raise BadImage("unreadable", f"{str(path)!r}: cannot be opened: {why}") from None


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the uint8 array of an idx file (the format of MNIST and Fashion-MNIST), plain or gzip.

    Validates the header before allocating memory. Raises UserError.
    """
    path = Path(path)
    with _file(path) as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        # Deflate compresses at most 1032:1, which bounds the size that a damaged header can declare.
        limit = path.stat().st_size * (1032 if compressed else 1)
        try:
            with gzip.open(raw) if compressed else raw as file:
                magic = file.read(4)
                if len(magic) < 4 or magic[:2] != b"\0\0":
                    raise UserError(f"{path}: not an idx file: it starts with {magic!r}")
                dtype, dimensions = magic[2:]
                if dtype != 8:
                    raise UserError(f"{path}: idx elements of type 0x{dtype:02x}; only unsigned bytes (0x08) are supported")
                sizes = file.read(4 * dimensions)
                if not 1 <= dimensions <= 4 or len(sizes) < 4 * dimensions:
                    raise UserError(f"{path}: invalid or truncated idx header ({dimensions} dimensions)")
                shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
                count = math.prod(shape)
                data = file.read(count + 1) if count <= limit else b""
                if len(data) != count:
                    relation = "more" if len(data) > count else "less"
                    raise UserError(f"{path}: {relation} data than the {count:,} bytes declared in its header")
        except (OSError, EOFError, zlib.error) as why:
            raise UserError(f"{path}: damaged or truncated: {why}") from None
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def read_cifar(path: str | os.PathLike[str], size: int, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (labels, pixels) of a file in CIFAR's binary format: int64 (N, len(classes)), uint8 (N, 3, 32, 32).

    A record is one byte per label, then 32x32 red, green and blue. `size` is the expected file size in bytes. Label j must be
    below `classes[j]`. Raises UserError.
    """
    path = Path(path)
    with _file(path) as file:
        actual = path.stat().st_size
        if actual != size:
            raise UserError(f"{path}: {actual:,} bytes instead of {size:,}: truncated, or not the binary version of CIFAR")
        records = np.fromfile(file, np.uint8, size).reshape(-1, len(classes) + 3072)
    labels = records[:, : len(classes)].astype(np.int64)
    invalid = np.argwhere(labels >= np.asarray(classes))
    if len(invalid):
        record, column = invalid[0]
        raise UserError(f"{path}: record {record} has label {labels[record, column]}, but there are {classes[column]} classes")
    return labels, np.ascontiguousarray(records[:, len(classes) :]).reshape(-1, 3, 32, 32)


class _Quiet:
    """A thread-safe context that suppresses Pillow's warnings (relevant ones are errors here).

    `warnings.catch_warnings` saves and restores process-wide filters, so overlapping threads could restore the wrong ones. Here
    the first thread to enter saves them, and the last one to leave restores them.
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
