"""Inspects one image: integrity, storage format, and digests to find duplicates."""

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
"""Pixels. Larger images are decoded one at a time, so that parallel threads cannot exhaust the memory."""

SAMPLE = 1 << 16
"""Number of evenly spaced pixels used for an image's color statistics."""

_LARGE_IMAGE = threading.Lock()
_GRAY_ROWS = 8  # the height of a JPEG block


class Inspection(NamedTuple):
    """The inspection of one image.

    issues: (kind, detail) pairs. size: (height, width), upright; (0, 0) if it cannot be decoded. file_size: bytes. content,
    pixels: digests of the file and of the decoded pixels; empty if unavailable. colors: float64 (12,), the mean of RGB on [0, 1]
    and of the products RR, RG, ..., BB; None if it cannot be decoded.
    """

    issues: tuple[tuple[str, str], ...] = ()
    size: tuple[int, int] = (0, 0)
    file_size: int = 0
    content: bytes = b""
    pixels: bytes = b""
    facts: Facts | None = None
    colors: np.ndarray | None = None


def inspect_file(file: Path | PackedImage) -> Inspection:
    """Inspects an image file or a packed image. Reports errors in `issues` instead of raising them."""
    try:
        height, width, _ = probe(file)
        with _LARGE_IMAGE if height * width > LARGE else nullcontext():
            size, content = _digest(file)
            facts, pixels = inspect(file)
            inspection = inspect_pixels(pixels)
    except BadImage as why:
        return Inspection(((why.kind, str(why).removeprefix(f"{file}: ")),))
    except MemoryError:
        return Inspection((("too large", "not enough memory to decode it"),))
    except OSError as why:
        return Inspection((("unreadable", f"cannot be read: {why.strerror}"),))
    issues = [*inspection.issues, *_storage_issues(file, facts)]
    if facts.format == "JPEG" and _ends_in_gray(pixels):
        issues.append(("truncated", "ends in the gray that decoders fill in for missing JPEG data"))
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
    """(size in bytes, digest of the content) of a file."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    if isinstance(file, PackedImage):
        digest.update(bytes(file.contents()))
        return file.bytes, digest.digest()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.digest()


def _storage_issues(file: Path | PackedImage, facts: Facts) -> list[tuple[str, str]]:
    """The (kind, detail) pairs about an image's storage format."""
    issues = []
    if not facts.fits and isinstance(file, Path):
        issues.append(("wrong suffix", f"{facts.format} named {os.path.splitext(file.name)[1] or file.name}"))  # noqa: PTH122
    if facts.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        issues.append(("color space", facts.mode))
    if facts.mode in ("P", "PA") and facts.format != "GIF":  # every GIF has a palette
        issues.append(("palette", f"{facts.format}, mode {facts.mode}"))
    if facts.deep:
        issues.append(("deep", f"{facts.format}, mode {facts.mode}"))
    if facts.transparent:
        issues.append(("transparent", f"{facts.format}, mode {facts.mode}"))
    if facts.orientation != 1:
        issues.append(("rotated", f"EXIF orientation {facts.orientation}"))
    if facts.animated:
        issues.append(("animated", f"{facts.format} with several frames"))
    return issues


def _ends_in_gray(pixels: np.ndarray) -> bool:
    """Whether a JPEG ends, but does not begin, with the gray that decoders fill in for missing data."""
    return bool((pixels[-_GRAY_ROWS:] == 128).all() and not (pixels[:_GRAY_ROWS] == 128).all())


def _colors(pixels: np.ndarray) -> np.ndarray:
    """float64 (12,): see Inspection.colors."""
    step = math.ceil(math.sqrt(pixels.shape[0] * pixels.shape[1] / SAMPLE)) or 1
    sample = pixels[::step, ::step].reshape(-1, 3) / 255
    return np.concatenate([sample.mean(0), (sample.T @ sample).ravel() / len(sample)])
