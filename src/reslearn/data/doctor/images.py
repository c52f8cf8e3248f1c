"""Inspects all images of a set on threads, and derives findings, duplicates and statistics."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from reslearn.data.doctor.diagnosis import ImageStatistics, Span
from reslearn.data.doctor.inspection import Inspection
from reslearn.data.findings import ELONGATED, TINY, Finding
from reslearn.data.images.files import suffix_for
from reslearn.data.images.folder import Entry
from reslearn.data.images.stream import Progress, ahead

_CHUNK = 8  # images per task: small, so that Ctrl-C does not wait long
UNUSABLE = frozenset({"unreadable", "empty", "not an image", "truncated", "damaged", "too large", "name not UTF-8"})
KEEP_ORDER = ("test", "val", "train", "all")  # of duplicates in several splits, the first is kept


def inspect_all(
    entries: Sequence[Entry], inspect: Callable[[int], Inspection], progress: Progress, workers: int | None
) -> tuple[list[Inspection], np.ndarray]:
    """Inspects each image once, on `workers` threads (default: one per CPU). Returns the inspections and float64 (13,): the number
    of training images and the sums of their Inspection.colors."""
    inspections: list[Inspection] = []
    total = np.zeros(13)
    facts: dict[object, object] = {}  # shares equal Facts objects to save memory

    def chunk(start: int) -> list[Inspection]:
        return [inspect(i) for i in range(start, min(start + _CHUNK, len(entries)))]

    for results in ahead(chunk, range(0, len(entries), _CHUNK), workers or max(os.cpu_count() or 1, 2)):
        for item in results:
            if item.colors is not None and entries[len(inspections)].split in ("train", "all"):
                total += [1, *item.colors]
            inspections.append(item._replace(colors=None, facts=facts.setdefault(item.facts, item.facts)))
        progress("inspecting images", len(inspections), len(entries))
    return inspections, total


def image_findings(entries: Sequence[Entry], inspections: Sequence[Inspection], gray: bool) -> Iterator[Finding]:
    """Yields the findings about single images and about duplicates."""
    shorter = [min(item.size) for item in inspections if item.pixels]
    median = float(np.median(shorter)) if shorter else 0
    for entry, item in zip(entries, inspections, strict=True):
        for kind, detail in item.issues:
            yield Finding(kind, (entry.name,), detail)
        if item.facts is not None and item.facts.gray and not gray:
            yield Finding("gray", (entry.name,), f"{item.facts.format}, mode {item.facts.mode}")
        if item.pixels:
            height, width = item.size
            if max(item.size) > ELONGATED * min(item.size):
                yield Finding("elongated", (entry.name,), f"{height} x {width} pixels")
            if TINY * min(item.size) < median:
                yield Finding("tiny", (entry.name,), f"{height} x {width} pixels (median shorter side {median:g})")
    for group in _duplicates(inspections):
        names = tuple(dict.fromkeys(entries[i].name for i in group))
        labels = sorted({entries[i].label for i in group})
        splits = sorted({entries[i].split for i in group})
        contents = {inspections[i].content for i in group}
        match = "the same file" if len(contents) == 1 and contents != {b""} else "the same pixels"
        if len(labels) > 1:
            yield Finding("contradiction", names, f"{match} in {', '.join(labels)}")
        if len(splits) > 1:
            yield Finding("leak", names, f"{match} in {', '.join(splits)}")
        if len(labels) == 1 and len(splits) == 1:
            yield Finding("duplicate", names, match)


def _duplicates(inspections: Sequence[Inspection]) -> list[list[int]]:
    """Groups of two or more images with the same pixels, as indices."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, item in enumerate(inspections):
        if item.pixels:
            groups[item.pixels].append(i)
    return [group for group in groups.values() if len(group) > 1]


def usable(entries: Sequence[Entry], inspections: Sequence[Inspection]) -> list[int]:
    """The indices of readable images with valid names: one of each group of duplicates, or none if their classes differ."""
    dropped = {i for i, item in enumerate(inspections) if not item.pixels or any(kind in UNUSABLE for kind, _ in item.issues)}
    dropped |= {i for i, entry in enumerate(entries) if not is_text(entry.name)}
    for group in _duplicates(inspections):
        readable = sorted((i for i in group if i not in dropped), key=lambda i: KEEP_ORDER.index(entries[i].split))
        dropped |= set(readable if len({entries[i].label for i in group}) > 1 else readable[1:])
    return [i for i in range(len(entries)) if i not in dropped]


def is_text(name: str) -> bool:
    """Whether a name can be encoded as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def better_suffixes(entries: Sequence[Entry], inspections: Sequence[Inspection]) -> dict[Path, str]:
    """The correct suffix of each file whose suffix does not match its format."""
    pairs = zip(entries, inspections, strict=True)
    return {entry.file: suffix_for(item.facts.format) for entry, item in pairs if item.facts is not None and not item.facts.fits}


def image_statistics(inspections: Sequence[Inspection], total: np.ndarray, gray: bool) -> ImageStatistics:
    """The statistics of all readable images. total: the color sums from inspect_all."""
    facts = [item.facts for item in inspections if item.facts]
    height, width = np.array([item.size for item in inspections if item.pixels], float).reshape(-1, 2).T
    mean, std, eigenvalues, eigenvectors = _color_statistics(total, gray)
    return ImageStatistics(
        bytes=sum(item.file_size for item in inspections),
        formats=dict(Counter(item.format for item in facts).most_common()),
        modes=dict(Counter(item.mode for item in facts).most_common()),
        height=span(height),
        width=span(width),
        aspect=span(width / height),
        mean=mean,
        std=std,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
    )


def span(values: np.ndarray) -> Span:
    """Minimum, median and maximum; empty if there are no values."""
    return tuple(round(float(f(values)), 4) for f in (np.min, np.median, np.max)) if len(values) else ()


def _color_statistics(total: np.ndarray, gray: bool) -> tuple[Span, Span, Span, tuple[Span, ...]]:
    """Mean, standard deviation, eigenvalues and eigenvectors of RGB from the color sums; empty without images."""
    if not total[0]:
        return (), (), (), ()
    mean, products = total[1:4] / total[0], total[4:].reshape(3, 3) / total[0]
    covariance = products - np.outer(mean, mean)
    std = np.sqrt(covariance.diagonal().clip(min=0))
    rounded = [tuple(np.round(values, 6).tolist()) for values in (mean, std)]
    if gray:
        return rounded[0][:1], rounded[1][:1], (), ()
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    vectors = vectors * np.where(vectors[0] < 0, -1, 1)  # the sign of an eigenvector is arbitrary: make red positive
    axes = tuple(tuple(row) for row in np.round(vectors, 6).tolist())
    return rounded[0], rounded[1], tuple(np.round(values, 8).tolist()), axes
