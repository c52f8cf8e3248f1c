"""Lists the images of class folders, or of a .csv or .jsonl list, with their split and class."""

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from reslearn.data.images import imagenet
from reslearn.data.images.files import IMAGE_SUFFIXES
from reslearn.errors import UserError, did_you_mean
from reslearn.files import read_text

SPLITS = ("train", "val", "test")
# Common names of split folders; all other folders are classes.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_COLUMNS = ("file", "label", "split")
LeftOut = defaultdict[str, list[Path]]
Problem = Callable[[str, Sequence[str], str], None]
"""Handles a recoverable problem: (kind, names concerned, message). The doctor collects them; `refuse` raises UserError."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Entry(NamedTuple):
    """A labeled image. name: its path in the folder or list, for messages."""

    file: Path
    name: str
    split: str
    label: str


@dataclass(frozen=True)
class Listing:
    """The contents of a folder or list.

    entries: ordered by split and name. labels: sorted names of the class folders, or those in the list. classes: the labels, with
    readable names instead of ImageNet's wnids. left_out_files: by reason.
    """

    entries: tuple[Entry, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    left_out_files: dict[str, tuple[Path, ...]]

    @property
    def left_out(self) -> dict[str, int]:
        """Number of files left out, by reason."""
        return {reason: len(files) for reason, files in self.left_out_files.items()}


def refuse(kind: str, names: Sequence[str], message: str) -> None:
    """The default Problem: raises UserError."""
    raise UserError(message)


def scan(root: Path, problem: Problem = refuse) -> Listing:
    """Lists the images of `root/{train,val,test}/CLASS/...`, or of `root/CLASS/...` with the single split "all".

    Subfolders of a class folder belong to the class; links to folders are followed, but no folder is read twice for a class.
    ImageNet's own layouts are supported (see imagenet.py). Leaves out "hidden" names, files that are "not images" by their suffix,
    images "outside a class folder" and ImageNet's test images "without a class". Raises UserError if the layout is ambiguous;
    reports the kinds "empty class", "without classes" and "class not in train" to `problem`.
    """
    root = imagenet.inside(root)
    left_out: LeftOut = defaultdict(list)
    folders, loose = _list_folder(root, left_out)
    split_folders = {folder: SPLIT_FOLDERS[folder.name.lower()] for folder in folders if folder.name.lower() in SPLIT_FOLDERS}
    if split_folders:
        folders = [folder for folder in folders if not imagenet.is_devkit(folder)]
    if split_folders and len(split_folders) < len(folders):
        beside = (
            f"{next(iter(split_folders)).name}/ beside {next(folder.name for folder in folders if folder not in split_folders)}/"
        )
        raise UserError(f"{root}: contains {beside}: use only class folders, or only train/, val/ and test/")
    for split, count in Counter(split_folders.values()).items():
        if count > 1:
            names = " and ".join(f"{folder.name}/" for folder in split_folders if split_folders[folder] == split)
            raise UserError(f"{root}: contains {names}, which are both the {split} split: keep one of them")
    left_out["outside a class folder"] += loose if split_folders else []
    if not split_folders and root.name.lower() in SPLIT_FOLDERS and _flat(folders, loose, defaultdict(list)):
        split_folders = {root: SPLIT_FOLDERS[root.name.lower()]}  # root is a single split of ImageNet
    train = next((folder for folder, split in split_folders.items() if split == "train"), None)
    train_classes = [folder.name for folder in _list_folder(train, defaultdict(list))[0]] if train else []
    entries = []
    for base, split in (split_folders or {root: "all"}).items():
        classes, loose = _list_folder(base, left_out) if base != root else (folders, loose)
        if split_folders and not (split == "train" or "images" in train_classes) and (flat := _flat(classes, loose, left_out)):
            labels = imagenet.labels_of(flat, base, root, split, train_classes)
            if labels is not None:
                entries += [Entry(file, file.relative_to(root).as_posix(), split, label) for file, label in labels.items()]
                continue
            if imagenet.is_unlabeled(split, train_classes):
                left_out["without a class"] += flat
                continue
            classes, loose = [], flat
        if not classes:
            contents = f"no class folders, only images ({len(loose)})" if loose else "no images or class folders"
            message = (
                f"{base}: contains {contents}: put the images of each class into a separate folder, "
                f"such as {base / 'cat' / '1.jpg'} and {base / 'dog' / '2.jpg'}, or use a .csv list"
            )
            message += imagenet.list_advice(loose, split)
            (problem if split_folders else refuse)("without classes", [base.relative_to(root).as_posix()], message)
            continue
        left_out["outside a class folder"] += loose
        for folder in classes:
            files = list(_images_below(folder, {_identity(root), _identity(base)}, left_out))
            if not files:
                message = f"{folder}: contains no images: add images of this class, or remove the folder"
                problem("empty class", [folder.relative_to(root).as_posix()], message)
            entries += [Entry(file, file.relative_to(root).as_posix(), split, folder.name) for file in files]
    if not entries:
        raise UserError(f"{root}: contains no images with a class")
    return _listing(root, entries, left_out, problem)


def _flat(folders: list[Path], loose: list[Path], left_out: LeftOut) -> list[Path]:
    """The images of a split without class folders: directly in it or, as in Tiny ImageNet, in its only folder, `images`."""
    if loose or [folder.name for folder in folders] != ["images"]:
        return [] if folders else loose
    inner_left_out: LeftOut = defaultdict(list)
    inner, images = _list_folder(folders[0], inner_left_out)
    if inner:
        return []
    for reason, files in inner_left_out.items():
        left_out[reason] += files
    return images


def _list_folder(folder: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """(folders, image files) in `folder`, sorted by name. Adds hidden names and other files to `left_out`."""
    folders, images = [], []
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                left_out["hidden"].append(path)
            elif path.is_dir() if entry.is_symlink() else entry.is_dir():
                folders.append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(path)
            else:
                left_out["not images"].append(path)
    except OSError as why:
        raise UserError(f"{folder}: cannot be listed: {why.strerror}") from None
    return folders, images


def _images_below(top: Path, seen: set[tuple[int, int]], left_out: LeftOut) -> Iterator[Path]:
    """Yields the image files below `top`, recursively. Skips folders in `seen`, and adds the visited ones to it."""
    pending = [top]
    while pending:
        folder = pending.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        folders, images = _list_folder(folder, left_out)
        inner = next((inner for inner in folders if inner.name.lower() in SPLIT_FOLDERS), None)
        if inner is not None:
            raise UserError(f"{inner}: split folder inside a class folder: open {folder}, or move it to {inner.name}/{top.name}/")
        yield from images
        pending += reversed(folders)


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as why:
        raise UserError(f"{folder}: cannot be opened: {why.strerror}") from None
    return status.st_dev, status.st_ino


def read_list(path: Path, problem: Problem = refuse) -> Listing:
    """Reads a list of images: .csv with the header file,label[,split], or .jsonl with one object of these keys per line.

    Files are relative to the list's folder; split is train, val or test, on every line or on none (then it is "all"). The text
    is UTF-8, with or without a byte-order mark; spaces around fields are stripped. Raises UserError with line and key; reports the
    kinds "missing file", "listed twice" and "class not in train" to `problem`.
    """
    text = read_text(path)
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _jsonl_rows(path, text)
    entries: list[Entry] = []
    lines: dict[str, int] = {}  # normalized path -> line
    keys: frozenset[str] = frozenset()
    missing: dict[str, str] = {}  # name -> error message
    for line, row in rows:
        _check_row(f"{path} line {line}", row, keys or row.keys())
        keys = keys or frozenset(row)
        name = row["file"]
        file = path.parent / name
        if (first := lines.setdefault(os.path.normpath(file), line)) != line:
            problem("listed twice", [name], f"{path} line {line}: {name} is already listed on line {first}: remove one")
        if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for invalid names)
            missing[name] = f"{path} line {line}: file {file} does not exist"
        else:
            entries.append(Entry(file, name, row.get("split", "all"), row["label"]))
    if missing:
        more = f" (and {len(missing) - 1} more missing)" if len(missing) > 1 else ""
        problem("missing file", list(missing), next(iter(missing.values())) + more)
    if not entries:
        raise UserError(f"{path}: lists no images: add one per line, as file,label")
    return _listing(path, entries, defaultdict(list), problem)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, {column: field}) of each .csv line except the header and blank lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if not row:
                continue
            if not header:
                header = fields
                _check_keys(f"{path} line {reader.line_num}", header)
            elif len(fields) != len(header):
                raise UserError(f"{path} line {reader.line_num}: {len(fields)} fields instead of the {len(header)} in the header")
            else:
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as why:
        raise UserError(f"{path} line {reader.line_num}: not CSV: {why}") from None


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, object) of each .jsonl line except blank lines. Converts integer labels to text."""
    for line, source in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may contain U+2028
        if not source.strip():
            continue
        where = f"{path} line {line}"
        try:
            row = json.loads(source)
        except (ValueError, RecursionError) as why:
            raise UserError(f"{where}: not JSON: {why}") from None
        if not isinstance(row, dict):
            raise UserError(f'{where}: not an object such as {{"file": "a.jpg", "label": "cat"}}')
        _check_keys(where, list(row))
        if type(row["label"]) is int:
            row["label"] = str(row["label"])
        for key, value in row.items():
            if not isinstance(value, str):
                raise UserError(f"{where}: {key} must be a string, not {json.dumps(value)[:40]}")
        yield line, {key: value.strip() for key, value in row.items()}


def _check_keys(where: str, keys: list[str]) -> None:
    for key in keys:
        if key not in _COLUMNS:
            raise UserError(f"{where}: unknown column {key!r}{did_you_mean(key, _COLUMNS)}")
        if keys.count(key) > 1:
            raise UserError(f"{where}: duplicate column {key!r}: remove one")
    for key in ("file", "label"):
        if key not in keys:
            raise UserError(f"{where}: no column {key!r}: the columns are file,label and optionally split")


def _check_row(where: str, row: Mapping[str, str], keys: Iterable[str]) -> None:
    if set(row) != set(keys):
        raise UserError(f"{where}: split must be set on every line or on none")
    for key, value in row.items():
        if not value:
            raise UserError(f"{where}: {key} is empty")
    if row.get("split", "train") not in SPLITS:
        raise UserError(f"{where}: split must be train, val or test, not {row['split']!r}{did_you_mean(row['split'], SPLITS)}")


def _listing(where: Path, entries: Iterable[Entry], left_out: LeftOut, problem: Problem) -> Listing:
    """Sorts the entries by split and name. Reports classes that train lacks to `problem`."""
    entries = tuple(sorted(entries, key=lambda entry: (("all", *SPLITS).index(entry.split), entry.name)))
    labels = sorted({entry.label for entry in entries})
    train_labels = {entry.label for entry in entries if entry.split == "train"}
    if train_labels:
        for label, split in dict.fromkeys((entry.label, entry.split) for entry in entries if entry.label not in train_labels):
            message = f"{where}: class {label!r} is in {split}, but has no images in train{did_you_mean(label, train_labels)}"
            problem("class not in train", [label], message)
    left_out_files = {reason: tuple(files) for reason, files in left_out.items() if files}
    return Listing(entries, tuple(labels), imagenet.readable(labels, where), left_out_files)


def for_each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result | UserError]:
    """Returns `function(item)`, or the UserError that it raised, for every item in order. Runs on threads."""

    def run(batch: Sequence[Item]) -> list[Result | UserError]:
        results: list[Result | UserError] = []
        for item in batch:
            try:
                results.append(function(item))
            except UserError as why:
                results.append(why)
        return results

    # 256 items per task keep the task overhead small for millions of images.
    tasks = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return [result for results in pool.map(run, tasks) for result in results]
