"""Examines class folders, lists, packed sets and named data sets."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from reslearn.data.doctor.diagnosis import Diagnosis
from reslearn.data.doctor.images import better_suffixes, image_findings, image_statistics, inspect_all, is_text, usable
from reslearn.data.doctor.inspection import Inspection, inspect_file, inspect_pixels
from reslearn.data.findings import FEW, IMBALANCE, Finding, in_order
from reslearn.data.images.files import IMAGE_SUFFIXES, PackedImage, looks_like_an_image
from reslearn.data.images.folder import Entry
from reslearn.data.images.stream import Progress, silent
from reslearn.data.sets import DataSet, find
from reslearn.files import user_path

# Suffixes of unsupported image formats.
_FOREIGN = re.compile(r"\.(heic|heif|avif|jp2|jxl|svg|psd|ico|tga|exr|hdr|dng|cr2|cr3|nef|arw|orf|raf|raw)", re.IGNORECASE)


def examine_classes(data: str | Path, progress: Progress = silent, workers: int | None = None) -> Diagnosis:
    """Reads every image of a data set (a name or path, as for `open`) once, on `workers` threads, and reports problems.

    Keeps only digests and sums of each image, so memory does not grow with image size. Raises UserError if there is no data set.
    """
    findings: list[Finding] = []
    opened = find(data, lambda kind, names, message: findings.append(Finding(kind, tuple(names), message)))
    if isinstance(opened, DataSet):
        name, titles = opened.name, {label: label for label in opened.classes}
        entries, inspect = _entries_of(opened)
    else:
        name, listing = opened
        entries, titles = listing.entries, dict(zip(listing.labels, listing.classes, strict=True))
        inspect = lambda i: inspect_file(entries[i].file)  # noqa: E731
        findings += _left_out(listing.left_out_files, user_path(data))
    inspections, colors = inspect_all(entries, inspect, progress, workers)
    gray = opened.channels == 1 if isinstance(opened, DataSet) else all(item.facts.gray for item in inspections if item.facts)
    per_class = _per_class(entries, titles)
    findings += [*image_findings(entries, inspections, gray), *_name_findings(entries), *_balance_findings(per_class)]
    return Diagnosis(
        name=name,
        classes=tuple(dict.fromkeys(label for counts in per_class.values() for label in counts)),
        images={split: sum(counts.values()) for split, counts in per_class.items()},
        per_class=per_class,
        pixels=image_statistics(inspections, colors, gray),
        findings=in_order(findings),
        suffixes={} if isinstance(opened, DataSet) else better_suffixes(entries, inspections),
        entries=() if isinstance(opened, DataSet) else _usable_entries(entries, inspections),
    )


def _entries_of(data: DataSet) -> tuple[tuple[Entry, ...], Callable[[int], Inspection]]:
    """The images of a named or packed set as entries without files, and the function that inspects one by index."""
    entries, images = [], []
    for name, split in data.splits.items():
        entries += [Entry(Path(), split.names[i], name, data.classes[label]) for i, label in enumerate(split.labels)]
        if split.files is not None:
            images += split.files
        else:
            assert split.pixels is not None
            images += split.pixels

    def inspect(i: int) -> Inspection:
        if isinstance(images[i], PackedImage):
            return inspect_file(images[i])
        return inspect_pixels(images[i].expand(3, -1, -1).permute(1, 2, 0).numpy())._replace(file_size=images[i].numel())

    return tuple(entries), inspect


def _name_findings(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Yields findings about names that some file system or list cannot store or distinguish."""
    classes: dict[str, set[str]] = defaultdict(set)
    files: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for entry in entries:
        classes[folded(entry.label)].add(entry.label)
        folder, _, name = entry.name.rpartition("/")
        files[entry.split, folder, folded(name)].add(entry.name)
        if not is_text(entry.name):
            yield Finding("name not UTF-8", (entry.name,), "not valid UTF-8")
        elif not entry.name.isprintable():
            yield Finding("odd name", (entry.name,), "unprintable character")
        elif any(piece != piece.strip() for piece in entry.name.split("/")):
            yield Finding("odd name", (entry.name,), "leading or trailing space")
    for labels in classes.values():
        if len(labels) > 1:
            yield Finding("colliding classes", tuple(sorted(labels)), "perhaps one class")
    for names in files.values():
        if len(names) > 1:
            yield Finding("colliding names", tuple(sorted(names)), "the same file on a case-insensitive disk")


def folded(name: str) -> str:
    """A name without differences in case, surrounding space and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def _per_class(entries: Sequence[Entry], titles: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """{split: {class: number of images}}, in class order, without classes that have no images in the split."""
    counts = Counter((entry.split, entry.label) for entry in entries)
    splits = dict.fromkeys(entry.split for entry in entries)
    return {split: {titles[label]: n for label in titles if (n := counts[split, label])} for split in splits}


def _balance_findings(per_class: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Yields findings about the numbers of images per class."""
    train = per_class.get("train") or per_class.get("all") or {}
    if len(train) == 1:
        yield Finding("one class", tuple(train), "the only training class")
    if train:
        rarest, largest = min(train, key=train.__getitem__), max(train, key=train.__getitem__)
        if train[largest] >= IMBALANCE * train[rarest]:
            yield Finding("imbalance", (largest, rarest), f"{largest} has {train[largest]:,} images, {rarest} {train[rarest]:,}")
        if few := tuple(label for label, n in train.items() if n < FEW):
            yield Finding("few images", few, f"{len(few):,} of {len(train):,} classes")
    for split in ("val", "test"):
        if split in per_class and "train" in per_class and (missing := tuple(c for c in train if c not in per_class[split])):
            yield Finding("class missing", missing, f"{split} has no images of {len(missing):,} of {len(train):,} classes")


def _left_out(left_out_files: Mapping[str, Sequence[Path]], root: Path) -> Iterator[Finding]:
    """Yields a finding for each left-out file."""
    for reason, files in left_out_files.items():
        for file in files:
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
            if reason in ("outside a class folder", "without a class"):
                yield Finding(reason, (name,), "")
            elif _FOREIGN.fullmatch(file.suffix) and reason != "hidden":
                yield Finding("foreign format", (name,), f"{file.suffix} is not supported")
            elif not looks_like_an_image(_first_bytes(file)):
                yield Finding("hidden" if reason == "hidden" else "other file", (name,), "")
            elif reason == "hidden":
                yield Finding("hidden image", (name,), "")
            else:
                yield Finding("image without suffix", (name,), f"supported suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}")


def _first_bytes(file: Path) -> bytes:
    """The first 16 bytes of a file; b"" if it cannot be read or is not a regular file (a pipe would block)."""
    try:
        if not file.is_file():
            return b""
        with file.open("rb") as opened:
            return opened.read(16)
    except OSError:
        return b""


def _usable_entries(entries: Sequence[Entry], inspections: Sequence[Inspection]) -> tuple[Entry, ...]:
    """The usable images of classes that still have training images."""
    kept = [entries[i] for i in usable(entries, inspections)]
    train_labels = {entry.label for entry in kept if entry.split in ("train", "all")}
    divided = any(entry.split == "train" for entry in entries)
    return tuple(entry for entry in kept if entry.label in train_labels or not divided)
