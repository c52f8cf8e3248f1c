"""What is wrong with a data set: everything is read once, and what is found is data, to be printed, tested or mended."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from reslearn.data.doctor.diagnosis import ELONGATED, FEW, IMBALANCE, KINDS, TINY, Diagnosis, Finding, Kept, folded
from reslearn.data.doctor.look import Look, look_at_file, look_at_pixels
from reslearn.data.images.files import IMAGE_SUFFIXES, PackedImage, looks_like_an_image, suffix_for
from reslearn.data.images.folder import Entry
from reslearn.data.images.stream import Progress, ahead
from reslearn.data.sets import DataSet, find

_AT_ONCE = 8  # images that a thread takes, so that Ctrl-C waits for few
# What ends the names of images that are not read here: phones', the web's, cameras' and editors' own.
_FOREIGN = re.compile(r"\.(heic|heif|avif|jp2|jxl|svg|psd|ico|tga|exr|hdr|dng|cr2|cr3|nef|arw|orf|raf|raw)", re.IGNORECASE)
LOST = frozenset({"unreadable", "empty", "not an image", "truncated", "damaged", "too large", "name not UTF-8"})


def examine(data: str | Path, progress: Progress = lambda what, done, total: None, workers: int | None = None) -> Diagnosis:
    """Read every image of a data set (a name or path, as for `open`) once, on `workers` threads, and say what is found.

    Memory does not grow with the size of the images: of each, digests and sums are kept. Raises UserError where there is no set.
    """
    findings: list[Finding] = []
    found = find(data, lambda kind, names, message: findings.append(Finding(kind, tuple(names), message)))
    if isinstance(found, DataSet):
        name, titles = found.name, {label: label for label in found.classes}
        entries, look = _opened(found)
    else:
        name, listing = found
        entries, titles = listing.entries, dict(zip(listing.labels, listing.classes, strict=True))
        look = lambda i: look_at_file(entries[i].file)  # noqa: E731
        findings += _put_aside(listing.aside, Path(data).expanduser())
    looks, colors = look_at_all(entries, look, progress, workers or max(os.cpu_count() or 1, 2))
    gray = found.channels == 1 if isinstance(found, DataSet) else all(seen.facts.gray for seen in looks if seen.facts)
    images = _images(entries, titles)
    findings += [*of_files(entries, looks, gray), *copies(entries, looks), *_of_names(entries), *_balance(images)]
    order = list(KINDS)
    mean, std, eigenvalues, eigenvectors = statistics(colors, gray)
    height, width, aspect = spans([seen.size for seen in looks if seen.pixels])
    return Diagnosis(
        name=name,
        images=images,
        bytes=sum(seen.length for seen in looks),
        formats=dict(Counter(seen.facts.format for seen in looks if seen.facts).most_common()),
        modes=dict(Counter(seen.facts.mode for seen in looks if seen.facts).most_common()),
        height=height,
        width=width,
        aspect=aspect,
        mean=mean,
        std=std,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors,
        findings=tuple(sorted(findings, key=lambda finding: (order.index(finding.kind), finding.names))),
        kept=() if isinstance(found, DataSet) else _worth_keeping(entries, looks),
    )


def _opened(data: DataSet) -> tuple[tuple[Entry, ...], Callable[[int], Look]]:
    """The images of a set known by name, or of a packed one, as entries without files, and how to look at them."""
    entries, images = [], []
    for name, split in data.splits.items():
        entries += [Entry(Path(), split.names[i], name, data.classes[label]) for i, label in enumerate(split.labels)]
        images += [*(split.pixels if split.files is None else split.files)]  # type: ignore[misc]  # one of them is there

    def look(i: int) -> Look:
        if isinstance(images[i], PackedImage):
            return look_at_file(images[i])
        return look_at_pixels(images[i].expand(3, -1, -1).permute(1, 2, 0).numpy())._replace(length=images[i].numel())

    return tuple(entries), look


def look_at_all(
    entries: Sequence[Entry], look: Callable[[int], Look], progress: Progress, workers: int
) -> tuple[list[Look], np.ndarray]:
    """A look at each image, and what their colors add up to: float64 (13,), the number of images first (see Look.colors)."""
    looks: list[Look] = []
    total = np.zeros(13)
    facts: dict[object, object] = {}  # many images are stored alike: one object for all of them

    def some(at: int) -> list[Look]:
        return [look(i) for i in range(at, min(at + _AT_ONCE, len(entries)))]

    for part in ahead(some, range(0, len(entries), _AT_ONCE), workers):
        for seen in part:
            if seen.colors is not None and entries[len(looks)].split in ("train", "all"):
                total += [1, *seen.colors]
            looks.append(seen._replace(colors=None, facts=facts.setdefault(seen.facts, seen.facts)))
        progress("looking at images", len(looks), len(entries))
    return looks, total


def of_files(entries: Sequence[Entry], looks: Sequence[Look], gray: bool) -> Iterator[Finding]:
    """What is wrong with single images."""
    shorter = [min(seen.size) for seen in looks if seen.pixels]
    usual = float(np.median(shorter)) if shorter else 0
    for entry, seen in zip(entries, looks, strict=True):
        for kind, detail in seen.wrong:
            yield Finding(kind, (entry.name,), detail)
        if seen.facts is not None and seen.facts.gray and not gray:
            yield Finding("gray", (entry.name,), f"a {seen.facts.format} of mode {seen.facts.mode}")
        if seen.pixels:
            height, width = seen.size
            if max(seen.size) > ELONGATED * min(seen.size):
                yield Finding("elongated", (entry.name,), f"{height} x {width} pixels")
            if TINY * min(seen.size) < usual:
                yield Finding("tiny", (entry.name,), f"{height} x {width} pixels, where a shorter side of {usual:g} is usual")


def _same(looks: Sequence[Look]) -> list[list[int]]:
    """The places of images with the same pixels, two or more, in order."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, seen in enumerate(looks):
        if seen.pixels:
            groups[seen.pixels].append(i)
    return [group for group in groups.values() if len(group) > 1]


def copies(entries: Sequence[Entry], looks: Sequence[Look]) -> Iterator[Finding]:
    """Images that are there more than once, by the bytes of their files or by their pixels."""
    for group in _same(looks):
        names = tuple(entries[i].name for i in group)
        labels = sorted({entries[i].label for i in group})
        splits = sorted({entries[i].split for i in group})
        files = {looks[i].content for i in group}
        how = "the same file" if len(files) == 1 and files != {b""} else "the same pixels"
        if len(labels) > 1:
            yield Finding("contradiction", names, f"{how} in {', '.join(labels)}")
        if len(splits) > 1:
            yield Finding("leak", names, f"{how} in {', '.join(splits)}")
        if len(labels) == 1 and len(splits) == 1:
            yield Finding("duplicate", names, how)


def _of_names(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Names that some disk or list cannot hold, or cannot tell apart."""
    classes: dict[str, set[str]] = defaultdict(set)
    files: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for entry in entries:
        classes[folded(entry.label)].add(entry.label)
        folder, _, name = entry.name.rpartition("/")
        files[entry.split, folder, folded(name)].append(entry.name)
        if not _is_text(entry.name):
            yield Finding("name not UTF-8", (entry.name,), "its bytes are no text")
        elif not entry.name.isprintable() or any(part != part.strip() for part in entry.name.split("/")):
            yield Finding("odd name", (entry.name,), f"is {entry.name!r}")
    for labels in classes.values():
        if len(labels) > 1:
            yield Finding("colliding classes", tuple(sorted(labels)), "may be meant as one class")
    for names in files.values():
        if len(set(names)) > 1:
            yield Finding("colliding names", tuple(sorted(set(names))), "one file where case does not matter")


def _images(entries: Sequence[Entry], titles: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """{split: {class: number of images}}, in the order of the classes; a class without images in a split is not in it."""
    counts = Counter((entry.split, entry.label) for entry in entries)
    splits = dict.fromkeys(entry.split for entry in entries)
    return {split: {titles[label]: n for label in titles if (n := counts[split, label])} for split in splits}


def _balance(images: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """What is wrong with the numbers of images in classes."""
    learned = images.get("train") or images.get("all") or {}
    if len(learned) == 1:
        yield Finding("one class", tuple(learned), "is the only one to learn")
    if learned:
        least, most = min(learned, key=learned.__getitem__), max(learned, key=learned.__getitem__)
        if learned[most] >= IMBALANCE * learned[least]:
            detail = f"{most} has {learned[most]:,} images, {least} {learned[least]:,}"
            yield Finding("imbalance", (most, least), detail)
        if few := tuple(label for label, n in learned.items() if n < FEW):
            yield Finding("few images", few, f"{len(few):,} of {len(learned):,} classes")
    for split in ("val", "test"):
        if split in images and "train" in images and (lacks := tuple(c for c in learned if c not in images[split])):
            yield Finding("class missing", lacks, f"{split} has no image of {len(lacks):,} of {len(learned):,} classes")


def _put_aside(aside: Mapping[str, Sequence[Path]], root: Path) -> Iterator[Finding]:
    """What the layout leaves out, told by what it is."""
    for reason, files in aside.items():
        for file in files:
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
            if reason in ("outside a class folder", "without a class"):
                yield Finding(reason, (name,), "")
            elif _FOREIGN.fullmatch(file.suffix) and reason != "hidden":
                yield Finding("foreign format", (name,), f"{file.suffix} is not read")
            elif not looks_like_an_image(_begins(file)):
                yield Finding("hidden" if reason == "hidden" else "other file", (name,), "")
            elif reason == "hidden":
                yield Finding("hidden image", (name,), "")
            else:
                yield Finding("image without suffix", (name,), f"ends in none of {' '.join(sorted(IMAGE_SUFFIXES))}")


def _begins(file: Path) -> bytes:
    """The first bytes of a file, or none where they cannot be had (a pipe would block)."""
    try:
        if not file.is_file():
            return b""
        with file.open("rb") as opened:
            return opened.read(16)
    except OSError:
        return b""


def spans(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """(minimum, median, maximum) of the heights, the widths and width / height."""
    if not sizes:
        return (), (), ()
    heights, widths = np.array(sizes, float).T
    height, width, aspect = (
        tuple(round(float(f(values)), 4) for f in (np.min, np.median, np.max)) for values in (heights, widths, widths / heights)
    )
    return height, width, aspect


def statistics(
    total: np.ndarray, gray: bool
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Mean, deviation, eigenvalues and eigenvectors of RGB from the sum of all images' colors; empty where there are none."""
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
    vectors = vectors * np.where(vectors[0] < 0, -1, 1)  # a vector and its opposite are one axis
    axes = tuple(tuple(row) for row in np.round(vectors, 6).tolist())
    return rounded[0], rounded[1], tuple(np.round(values, 8).tolist()), axes


def _worth_keeping(entries: Sequence[Entry], looks: Sequence[Look]) -> tuple[Kept, ...]:
    """The images without what cannot be read, is there again, or contradicts itself; of classes that train still has."""
    lost = {i for i, seen in enumerate(looks) if any(kind in LOST for kind, _ in seen.wrong) or not seen.pixels}
    lost |= {i for i, entry in enumerate(entries) if not _is_text(entry.name)}
    for group in _same(looks):
        readable = sorted(
            (i for i in group if i not in lost), key=lambda i: ("test", "val", "train", "all").index(entries[i].split)
        )
        lost |= set(readable if len({entries[i].label for i in group}) > 1 else readable[1:])
    trained = {entry.label for i, entry in enumerate(entries) if i not in lost and entry.split in ("train", "all")}
    some = any(entry.split == "train" for entry in entries)
    return tuple(
        Kept(entry, entry.file.suffix if (facts := looks[i].facts) is None or facts.fits else suffix_for(facts.format))
        for i, entry in enumerate(entries)
        if i not in lost and not (some and entry.label not in trained)
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
