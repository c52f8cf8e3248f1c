"""One look at an image: whether it is whole, what it is stored as, and what it can be compared by with others."""

import hashlib
import math
import os
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reslearn.data.images.files import BadImage, Facts, PackedImage, inspect, probe

LARGE = 1 << 24
"""Pixels: of larger images only one is decoded at a time, so that threads cannot fill the memory with them."""

SAMPLE = 1 << 16
"""Pixels of an image, evenly spaced, that its colors are taken from."""

_LARGE_ONE = threading.Lock()
_GRAY_ROWS = 8  # the smallest block of a JPEG


class Look(NamedTuple):
    """What one image is.

    wrong: (kind, detail) of each thing to report. size: (height, width), upright; (0, 0) where it cannot be decoded. length: of
    the file in bytes. content, pixels: digests of the file's bytes and of the decoded pixels; empty where there are none. colors:
    float64 (12,), the mean of RGB on [0, 1] and of its products RR, RG, ..., BB; None where it cannot be decoded.
    """

    wrong: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int] = (0, 0)
    length: int = 0
    content: bytes = b""
    pixels: bytes = b""
    facts: Facts | None = None
    colors: np.ndarray | None = None


def look_at_file(file: Path | PackedImage) -> Look:
    """A look at an image file, or a packed image. Raises nothing for bad ones: what is wrong is in the answer."""
    try:
        height, width, _ = probe(file)
        with _LARGE_ONE if height * width > LARGE else nullcontext():
            size, content = _digest(file)
            facts, pixels = inspect(file)
            seen = look_at_pixels(pixels)
    except BadImage as why:
        return Look(((why.kind, str(why).removeprefix(f"{file}: ")),))
    except MemoryError:
        return Look((("too large", "there is not enough memory to decode it"),))
    except OSError as why:
        return Look((("unreadable", f"cannot be read: {why.strerror}"),))
    wrong = [*seen.wrong, *_stored(file, facts)]
    if facts.format == "JPEG" and _ends_in_gray(pixels):
        wrong.append(("truncated", "was cut short and closed: its lower part is the gray of a JPEG that has no more data"))
    return seen._replace(wrong=tuple(wrong), length=size, content=content, facts=facts)


def look_at_pixels(pixels: np.ndarray) -> Look:
    """A look at decoded pixels, uint8 (H, W, 3)."""
    height, width, _ = pixels.shape
    digest = hashlib.blake2b(f"{height} x {width}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    first = pixels[0, 0]
    blank = bool((pixels[::16, ::16] == first).all() and (pixels == first).all())
    wrong = (("blank", f"every pixel is {tuple(first.tolist())}"),) if blank else ()
    return Look(wrong, (height, width), pixels.nbytes, b"", digest.digest(), None, _colors(pixels))


def _digest(file: Path | PackedImage) -> tuple[int, bytes]:
    """A file's size in bytes and the digest of its content."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    if isinstance(file, PackedImage):
        digest.update(bytes(file.contents()))
        return file.bytes, digest.digest()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
            size += len(part)
    return size, digest.digest()


def _stored(file: Path | PackedImage, facts: Facts) -> list[tuple[str, str]]:
    """What the way an image is stored gives to report."""
    found = []
    if not facts.fits and isinstance(file, Path):
        found.append(("wrong suffix", f"a {facts.format} that is called {os.path.splitext(file.name)[1] or file.name}"))  # noqa: PTH122
    if facts.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        found.append(("color space", facts.mode))
    if facts.mode in ("P", "PA") and facts.format != "GIF":  # of which every one has a palette
        found.append(("palette", f"a {facts.format} of mode {facts.mode}"))
    if facts.deep:
        found.append(("deep", f"a {facts.format} of mode {facts.mode}"))
    if facts.transparent:
        found.append(("transparent", f"a {facts.format} of mode {facts.mode}"))
    if facts.orientation != 1:
        found.append(("rotated", f"EXIF orientation {facts.orientation}"))
    if facts.animated:
        found.append(("animated", f"a {facts.format} of several images"))
    return found


def _ends_in_gray(pixels: np.ndarray) -> bool:
    """Whether a JPEG has the gray that decoders give for missing data along its lower edge, and not along its upper one."""
    below, above = pixels[-_GRAY_ROWS:], pixels[:_GRAY_ROWS]
    return bool((below == 128).all() and not (above == 128).all())


def _colors(pixels: np.ndarray) -> np.ndarray:
    step = math.ceil(math.sqrt(pixels.shape[0] * pixels.shape[1] / SAMPLE)) or 1
    sample = pixels[::step, ::step].reshape(-1, 3) / 255
    return np.concatenate([sample.mean(0), (sample.T @ sample).ravel() / len(sample)])
