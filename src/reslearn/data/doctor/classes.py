"""Examines class folders, lists, packed sets and sets known by name: every image is read once, every class counted."""

import os
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

# The suffixes of images that are not read here: phones', the web's, cameras' and editors' own.
_FOREIGN = re.compile(r"\.(heic|heif|avif|jp2|jxl|svg|psd|ico|tga|exr|hdr|dng|cr2|cr3|nef|arw|orf|raf|raw)", re.IGNORECASE)


def examine_classes(data: str | Path, progress: Progress = silent, workers: int | None = None) -> Diagnosis:
    """Reads every image of a data set (a name or path, as for `open`) once, on `workers` threads, and says what is wrong.

    Memory does not grow with the size of the images: of each, digests and sums are kept. Raises UserError where there is no set.
    """
    findings: list[Finding] = []
    opened = find(data, lambda kind, names, message: findings.append(Finding(kind, tuple(names), message)))
    if isinstance(opened, DataSet):
        name, titles = opened.name, {label: label for label in opened.classes}
        entries, inspect = _of_data_set(opened)
    else:
        name, listing = opened
        entries, titles = listing.entries, dict(zip(listing.labels, listing.classes, strict=True))
        inspect = lambda i: inspect_file(entries[i].file)  # noqa: E731
        findings += _left_out(listing.aside, user_path(data))
    inspections, colors = inspect_all(entries, inspect, progress, workers or max(os.cpu_count() or 1, 2))
    gray = opened.channels == 1 if isinstance(opened, DataSet) else all(item.facts.gray for item in inspections if item.facts)
    per_class = _per_class(entries, titles)
    findings += [*image_findings(entries, inspections, gray), *_names(entries), *_balance(per_class)]
    return Diagnosis(
        name=name,
        classes=tuple(dict.fromkeys(label for counts in per_class.values() for label in counts)),
        images={split: sum(counts.values()) for split, counts in per_class.items()},
        per_class=per_class,
        pixels=image_statistics(inspections, colors, gray),
        findings=in_order(findings),
        suffixes={} if isinstance(opened, DataSet) else better_suffixes(entries, inspections),
        entries=() if isinstance(opened, DataSet) else _to_keep(entries, inspections),
    )


def _of_data_set(data: DataSet) -> tuple[tuple[Entry, ...], Callable[[int], Inspection]]:
    """The images of a set known by name, or of a packed one, as entries without files, and how to inspect them."""
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


def _names(entries: Sequence[Entry]) -> Iterator[Finding]:
    """Names that some disk or list cannot hold, or cannot tell apart."""
    classes: dict[str, set[str]] = defaultdict(set)
    files: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for entry in entries:
        classes[folded(entry.label)].add(entry.label)
        folder, _, name = entry.name.rpartition("/")
        files[entry.split, folder, folded(name)].add(entry.name)
        if not is_text(entry.name):
            yield Finding("name not UTF-8", (entry.name,), "its bytes are no text")
        elif not entry.name.isprintable() or any(part != part.strip() for part in entry.name.split("/")):
            yield Finding("odd name", (entry.name,), f"is {entry.name!r}")
    for labels in classes.values():
        if len(labels) > 1:
            yield Finding("colliding classes", tuple(sorted(labels)), "may be meant as one class")
    for names in files.values():
        if len(names) > 1:
            yield Finding("colliding names", tuple(sorted(names)), "one file where case does not matter")


def folded(name: str) -> str:
    """The same for names that differ only by case, space around them or the form of their accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def _per_class(entries: Sequence[Entry], titles: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """{split: {class: number of images}}, in the order of the classes; a class without images in a split is not in it."""
    counts = Counter((entry.split, entry.label) for entry in entries)
    splits = dict.fromkeys(entry.split for entry in entries)
    return {split: {titles[label]: n for label in titles if (n := counts[split, label])} for split in splits}


def _balance(per_class: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """What is wrong with the numbers of images in classes."""
    learned = per_class.get("train") or per_class.get("all") or {}
    if len(learned) == 1:
        yield Finding("one class", tuple(learned), "is the only one to learn")
    if learned:
        least, most = min(learned, key=learned.__getitem__), max(learned, key=learned.__getitem__)
        if learned[most] >= IMBALANCE * learned[least]:
            yield Finding("imbalance", (most, least), f"{most} has {learned[most]:,} images, {least} {learned[least]:,}")
        if few := tuple(label for label, n in learned.items() if n < FEW):
            yield Finding("few images", few, f"{len(few):,} of {len(learned):,} classes")
    for split in ("val", "test"):
        if split in per_class and "train" in per_class and (missing := tuple(c for c in learned if c not in per_class[split])):
            yield Finding("class missing", missing, f"{split} has no image of {len(missing):,} of {len(learned):,} classes")


def _left_out(aside: Mapping[str, Sequence[Path]], root: Path) -> Iterator[Finding]:
    """The files that the layout leaves out, each by what it is."""
    for reason, files in aside.items():
        for file in files:
            name = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
            if reason in ("outside a class folder", "without a class"):
                yield Finding(reason, (name,), "")
            elif _FOREIGN.fullmatch(file.suffix) and reason != "hidden":
                yield Finding("foreign format", (name,), f"{file.suffix} is not read")
            elif not looks_like_an_image(_first_bytes(file)):
                yield Finding("hidden" if reason == "hidden" else "other file", (name,), "")
            elif reason == "hidden":
                yield Finding("hidden image", (name,), "")
            else:
                yield Finding("image without suffix", (name,), f"ends in none of {' '.join(sorted(IMAGE_SUFFIXES))}")


def _first_bytes(file: Path) -> bytes:
    """The first 16 bytes of a file, or none where they cannot be had (a pipe would block)."""
    try:
        if not file.is_file():
            return b""
        with file.open("rb") as opened:
            return opened.read(16)
    except OSError:
        return b""


def _to_keep(entries: Sequence[Entry], inspections: Sequence[Inspection]) -> tuple[Entry, ...]:
    """The usable images of classes that still have training images."""
    kept = [entries[i] for i in usable(entries, inspections)]
    trained = {entry.label for entry in kept if entry.split in ("train", "all")}
    divided = any(entry.split == "train" for entry in entries)
    return tuple(entry for entry in kept if entry.label in trained or not divided)
