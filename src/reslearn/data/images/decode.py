"""Decodes views of photos into a batch of pixels, with Pillow or, for plain JPEGs, with jpeg.cpp; the pixels are the same.

A view is a network's input before normalization: a crop of the photo is scaled, and a window of the result is taken and optionally
mirrored. Random resized crops, scale jitter and the center crop of evaluation are views. A view is nine int32: top, left, height
and width of the crop; rows and columns to scale it to; y and x of the window (all in pixels); mirrored, 0 or 1.

jpeg.cpp decodes only the rows and columns that a view needs. It is used if its pixels equal Pillow's bit for bit, which is tested
when it is loaded. Pillow decodes everything else, and all images if there is no compiler or no libjpeg-turbo header.
"""

import ctypes
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from reslearn.data.images.files import MAX_PIXELS, PackedImage, contents, read
from reslearn.data.preprocess import scaled
from reslearn.errors import UserError
from reslearn.kernels import compiler
from reslearn.kernels.compiler import CannotCompile, load

SOURCE = Path(compiler.__file__).with_name("jpeg.cpp")
File = Path | PackedImage
Buffer = bytes | np.ndarray
Pixels = np.ndarray


def take(image: Pixels, view: np.ndarray, size: Sequence[int]) -> Pixels:
    """Takes a view of a decoded photo: uint8 (H, W, C) -> uint8 (*size, C)."""
    top, left, height, width, rows, columns, y, x, mirrored = (int(number) for number in view)
    crop = scaled(image[top : top + height, left : left + width], rows, columns)
    window = crop[y : y + size[0], x : x + size[1]]
    return window[:, ::-1] if mirrored else window


def read_views(
    files: Sequence[File], view_of: Callable[[np.ndarray], np.ndarray], pixels: Pixels, at: Callable[[int], None] = lambda i: None
) -> dict[int, UserError]:
    """Writes one view of each file into pixels, uint8 (N, height, width, C). Returns the errors of unreadable files by index.

    view_of: maps the photos' (height, width), int64 (N, 2), to views, int32 (N, 9). at(i) is called before file i is read.
    Raises RuntimeError with the file's name for errors other than UserError.
    """
    channels = pixels.shape[3]
    sizes = np.ones((len(files), 2), np.int64)
    data: list[Buffer | None] = [None] * len(files)
    whole: dict[int, Pixels] = {}
    bad: dict[int, UserError] = {}

    def attempt(work: Callable[[int], None], indices: Iterable[int]) -> None:
        for i in indices:
            at(i)
            try:
                work(i)
            except UserError as error:
                bad[i], data[i] = error, None
            except Exception as error:
                raise RuntimeError(f"{files[i]}: cannot be read: {type(error).__name__}: {error}") from error

    def fetch(i: int) -> None:
        data[i] = contents(files[i])

    def decode(i: int) -> None:
        data[i] = None
        whole[i] = read(files[i], channels)
        sizes[i] = whole[i].shape[:2]

    jpeg = fast() if channels == 3 else None
    if jpeg is None:
        attempt(decode, range(len(files)))
    else:
        attempt(fetch, range(len(files)))
        attempt(decode, [i for i in jpeg.sizes(data, sizes) if i not in bad])
    views = np.ascontiguousarray(view_of(sizes), np.int32)
    if jpeg is not None:
        refused = jpeg.views(data, views, pixels)
        attempt(decode, [i for i in refused if data[i] is not None])  # Pillow reports damage
    for i, image in whole.items():
        pixels[i] = take(image, views[i], pixels.shape[1:3])
    return bad


class Jpeg:
    """The Python interface of jpeg.cpp."""

    def __init__(self) -> None:
        library = load(SOURCE, ["-ffp-contract=off"], ["jpeg"])
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.sizes.argtypes, library.sizes.restype = [number, *[pointer] * 4], None
        library.views.argtypes, library.views.restype = [number, *[pointer] * 3, number, number, *[pointer] * 2], None
        self._library = library

    def sizes(self, data: Sequence[Buffer | None], sizes: np.ndarray) -> list[int]:
        """Writes the (height, width) of supported JPEGs into sizes, int64 (N, 2). Returns the indices of the other files."""
        pointers, lengths = _pointers(data)
        read, refused = np.zeros((len(data), 2), np.int32), np.zeros(len(data), np.uint8)
        self._library.sizes(len(data), *(array.ctypes.data for array in (pointers, lengths, read, refused)))
        accepted = (refused == 0) & (read.prod(1, dtype=np.int64) <= MAX_PIXELS)
        sizes[accepted] = read[accepted]
        return np.flatnonzero(~accepted).tolist()

    def views(self, data: Sequence[Buffer | None], views: np.ndarray, pixels: Pixels) -> list[int]:
        """Writes views, int32 (N, 9), into pixels, uint8 (N, height, width, 3). Returns the indices of the files it cannot read."""
        pointers, lengths = _pointers(data)
        refused = (lengths == 0).astype(np.uint8)
        _, height, width, _ = pixels.shape
        inputs = (array.ctypes.data for array in (pointers, lengths, views))
        self._library.views(len(data), *inputs, height, width, pixels.ctypes.data, refused.ctypes.data)
        return np.flatnonzero(refused).tolist()


def _pointers(data: Sequence[Buffer | None]) -> tuple[np.ndarray, np.ndarray]:
    """The addresses, uint64 (N,), and lengths in bytes, int64 (N,), of the buffers."""
    empty = np.zeros(0, np.uint8)
    arrays = [empty if buffer is None else np.frombuffer(buffer, np.uint8) for buffer in data]
    return np.array([a.ctypes.data for a in arrays], np.uint64), np.array([a.size for a in arrays], np.int64)


@functools.cache
def fast() -> Jpeg | None:
    """jpeg.cpp, or None if it cannot be used (see why_not)."""
    return None if why_not() else Jpeg()


@functools.cache
def why_not() -> str:
    """The reason why jpeg.cpp cannot be used; "" if it can."""
    try:
        jpeg = Jpeg()
    except CannotCompile as why:
        return str(why)
    except AttributeError as error:
        return f"it cannot be loaded ({error})"
    for data in _samples():
        if not _matches_pillow(jpeg, data):
            return "this machine's libjpeg decodes to different pixels than Pillow"
    return ""


def _samples() -> list[bytes]:
    """JPEGs with all common kinds of color storage."""
    y, x = np.mgrid[:75, :90]
    photo = np.stack([(x * y) % 256, (3 * x + y) % 256, 255 - x - y], 2).astype(np.uint8)
    samples = []
    for mode, options in (
        ("RGB", {"subsampling": "4:2:0"}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"subsampling": "4:4:4", "progressive": True}),
        ("RGB", {"subsampling": "4:2:0", "progressive": True}),
        ("L", {}),
    ):
        out = io.BytesIO()
        Image.fromarray(photo).convert(mode).save(out, "JPEG", quality=85, **options)
        samples.append(out.getvalue())
    return samples


def _matches_pillow(jpeg: Jpeg, data: bytes) -> bool:
    """Whether jpeg.cpp decodes a crop to the same pixels as Pillow."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        whole = np.array(image.convert("RGB"))
    view = np.array([[19, 23, 41, 52, 30, 47, 2, 3, 1]], np.int32)
    pixels = np.zeros((1, 25, 40, 3), np.uint8)
    return not jpeg.views([data], view, pixels) and np.array_equal(pixels[0], take(whole, view[0], (25, 40)))
