"""Inspects one image: whether it is whole, how it is stored, and digests to compare it with others."""

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


class Inspection(NamedTuple):
    """What one image is.

    issues: (kind, detail) of each thing to report. size: (height, width), upright; (0, 0) where it cannot be decoded. file_size:
    in bytes. content, pixels: digests of the file's bytes and of the decoded pixels; empty where there are none. colors:
    float64 (12,), the mean of RGB on [0, 1] and of its products RR, RG, ..., BB; None where it cannot be decoded.
    """

    issues: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int] = (0, 0)
    file_size: int = 0
    content: bytes = b""
    pixels: bytes = b""
    facts: Facts | None = None
    colors: np.ndarray | None = None


def inspect_file(file: Path | PackedImage) -> Inspection:
    """Inspects an image file, or a packed image. Bad ones raise nothing: what is wrong is in `issues`."""
    try:
        height, width, _ = probe(file)
        with _LARGE_ONE if height * width > LARGE else nullcontext():
            size, content = _digest(file)
            facts, pixels = inspect(file)
            inspection = inspect_pixels(pixels)
    except BadImage as why:
        return Inspection(((why.kind, str(why).removeprefix(f"{file}: ")),))
    except MemoryError:
        return Inspection((("too large", "there is not enough memory to decode it"),))
    except OSError as why:
        return Inspection((("unreadable", f"cannot be read: {why.strerror}"),))
    issues = [*inspection.issues, *_storage_issues(file, facts)]
    if facts.format == "JPEG" and _ends_in_gray(pixels):
        issues.append(("truncated", "was cut short and closed: its lower part is the gray of a JPEG that has no more data"))
    return inspection._replace(issues=tuple(issues), file_size=size, content=content, facts=facts)


def inspect_pixels(pixels: np.ndarray) -> Inspection:
    """Inspects decoded pixels, uint8 (H, W, 3)."""
    height, width, _ = pixels.shape
    digest = hashlib.blake2b(f"{height} x {width}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    first = pixels[0, 0]
    blank = bool((pixels[::16, ::16] == first).all() and (pixels == first).all())
    issues = (("blank", f"every pixel is {tuple(first.tolist())}"),) if blank else ()
    return Inspection(issues, (height, width), pixels.nbytes, b"", digest.digest(), None, _colors(pixels))


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


def _storage_issues(file: Path | PackedImage, facts: Facts) -> list[tuple[str, str]]:
    """What to report about how an image is stored."""
    issues = []
    if not facts.fits and isinstance(file, Path):
        issues.append(("wrong suffix", f"a {facts.format} that is called {os.path.splitext(file.name)[1] or file.name}"))  # noqa: PTH122
    if facts.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        issues.append(("color space", facts.mode))
    if facts.mode in ("P", "PA") and facts.format != "GIF":  # of which every one has a palette
        issues.append(("palette", f"a {facts.format} of mode {facts.mode}"))
    if facts.deep:
        issues.append(("deep", f"a {facts.format} of mode {facts.mode}"))
    if facts.transparent:
        issues.append(("transparent", f"a {facts.format} of mode {facts.mode}"))
    if facts.orientation != 1:
        issues.append(("rotated", f"EXIF orientation {facts.orientation}"))
    if facts.animated:
        issues.append(("animated", f"a {facts.format} of several images"))
    return issues


def _ends_in_gray(pixels: np.ndarray) -> bool:
    """Whether a JPEG ends in the gray that decoders fill in for missing data, and does not begin with it."""
    below, above = pixels[-_GRAY_ROWS:], pixels[:_GRAY_ROWS]
    return bool((below == 128).all() and not (above == 128).all())


def _colors(pixels: np.ndarray) -> np.ndarray:
    """float64 (12,): see Inspection.colors."""
    step = math.ceil(math.sqrt(pixels.shape[0] * pixels.shape[1] / SAMPLE)) or 1
    sample = pixels[::step, ::step].reshape(-1, 3) / 255
    return np.concatenate([sample.mean(0), (sample.T @ sample).ravel() / len(sample)])
