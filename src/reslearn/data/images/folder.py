"""Lists the image files of a folder of class folders, or of a .csv or .jsonl list, with their split and class."""

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
# Common names of these folders; others are classes.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_COLUMNS = ("file", "label", "split")
LeftOut = defaultdict[str, list[Path]]
Problem = Callable[[str, Sequence[str], str], None]
"""Handles a problem that the doctor can go on from: (kind, names of what it is about, message). `refuse` raises UserError."""
Item = TypeVar("Item")
Result = TypeVar("Result")


class Entry(NamedTuple):
    """One labeled image: its file, its name in messages (the path in the folder or list), its split and class."""

    file: Path
    name: str
    split: str
    label: str


@dataclass(frozen=True)
class Listing:
    """What a folder or a list holds: entries by split and name, sorted labels, readable class names, and what was left out.

    `labels` are the names of the folders, or those in the list. `classes` are the same, with readable names for ImageNet's wnids.
    """

    entries: tuple[Entry, ...]
    labels: tuple[str, ...]
    classes: tuple[str, ...]
    aside: dict[str, tuple[Path, ...]]

    @property
    def left_out(self) -> dict[str, int]:
        """How many were left out, by reason."""
        return {reason: len(files) for reason, files in self.aside.items()}


def refuse(kind: str, names: Sequence[str], message: str) -> None:
    """The default Problem: raises UserError."""
    raise UserError(message)


def scan(root: Path, problem: Problem = refuse) -> Listing:
    """The images of `root/{train,val,test}/CLASS/...`, or of `root/CLASS/...`, whose only split is "all".

    Folders below a class folder belong to the class; links to folders are followed, and no folder is read twice for a
    class. ImageNet's own layouts are read as well (see imagenet.py). Left out and counted are "hidden" names, files that are
    "not images" by their suffix, images "outside a class folder" and ImageNet's test images "without a class". Raises UserError
    for a layout that could be meant in two ways; an "empty class", images "without classes" and a "class not in train" go to
    `problem`.
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
        raise UserError(f"{root}: holds {beside}: let every folder be a class, or each one of train/, val/, test/")
    for split, count in Counter(split_folders.values()).items():
        if count > 1:
            names = " and ".join(f"{folder.name}/" for folder in split_folders if split_folders[folder] == split)
            raise UserError(f"{root}: holds {names}, which both mean {split}: keep one of them")
    left_out["outside a class folder"] += loose if split_folders else []
    if not split_folders and root.name.lower() in SPLIT_FOLDERS and _flat(folders, loose, defaultdict(list)):
        split_folders = {root: SPLIT_FOLDERS[root.name.lower()]}  # one split of ImageNet alone
    train = next((part for part, split in split_folders.items() if split == "train"), None)
    known = [folder.name for folder in _list_folder(train, defaultdict(list))[0]] if train else []
    entries = []
    for part, split in (split_folders or {root: "all"}).items():
        classes, loose = _list_folder(part, left_out) if part != root else (folders, loose)
        if split_folders and not (split == "train" or "images" in known) and (flat := _flat(classes, loose, left_out)):
            labels = imagenet.labels_of(flat, part, root, split, known)
            if labels is not None:
                entries += [Entry(file, file.relative_to(root).as_posix(), split, label) for file, label in labels.items()]
                continue
            if imagenet.is_unlabeled(split, known):
                left_out["without a class"] += flat
                continue
            classes, loose = [], flat
        if not classes:
            what = f"no class folders, only images ({len(loose)})" if loose else "no images or class folders"
            message = (
                f"{part}: contains {what}: put the images of each class into a folder of its own, "
                f"as {part / 'cat' / '1.jpg'} and {part / 'dog' / '2.jpg'}, or give a .csv list"
            )
            message += imagenet.what_is_needed(loose, split)
            (problem if split_folders else refuse)("without classes", [part.relative_to(root).as_posix()], message)
            continue
        left_out["outside a class folder"] += loose
        for folder in classes:
            files = list(_images_below(folder, {_identity(root), _identity(part)}, left_out))
            if not files:
                message = f"{folder}: holds no images: every class needs at least one, so fill or remove this folder"
                problem("empty class", [folder.relative_to(root).as_posix()], message)
            entries += [Entry(file, file.relative_to(root).as_posix(), split, folder.name) for file in files]
    if not entries:
        raise UserError(f"{root}: holds no images that have a class")
    return _listing(root, entries, left_out, problem)


def _flat(folders: list[Path], loose: list[Path], left_out: LeftOut) -> list[Path]:
    """The images of a split that has no class folders: in it, or, as in Tiny ImageNet, in its only folder, `images`."""
    if loose or [folder.name for folder in folders] != ["images"]:
        return [] if folders else loose
    aside: LeftOut = defaultdict(list)
    inner, images = _list_folder(folders[0], aside)
    if inner:
        return []
    for reason, files in aside.items():
        left_out[reason] += files
    return images


def _list_folder(folder: Path, left_out: LeftOut) -> tuple[list[Path], list[Path]]:
    """(folders, image files) directly in `folder`, sorted by name; hidden names and other files are left out."""
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
    """The image files at any depth below `top`; folders in `seen`, which grows, are not entered (again)."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        folders, images = _list_folder(folder, left_out)
        inner = next((inner for inner in folders if inner.name.lower() in SPLIT_FOLDERS), None)
        if inner is not None:
            raise UserError(f"{inner}: a split below a class folder: open {folder}, or turn it round, as {inner.name}/{top.name}/")
        yield from images
        waiting += reversed(folders)


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as why:
        raise UserError(f"{folder}: cannot be entered: {why.strerror}") from None
    return status.st_dev, status.st_ino


def read_list(path: Path, problem: Problem = refuse) -> Listing:
    """The images that a list names: .csv with the header file,label[,split], or .jsonl, an object of these keys a line.

    Files are relative to the list's folder; split is train, val or test, on every line or on none (then it is "all").
    UTF-8, with or without a byte-order mark; space around a field is dropped. Raises UserError with line and key; a "missing
    file", one "listed twice" and a "class not in train" go to `problem`.
    """
    text = read_text(path)
    rows = _csv_rows(path, text) if path.suffix.lower() == ".csv" else _jsonl_rows(path, text)
    entries: list[Entry] = []
    lines: dict[str, int] = {}  # normalized path -> line
    keys: frozenset[str] = frozenset()
    missing: dict[str, str] = {}  # name -> what to say
    for line, row in rows:
        _check_row(f"{path} line {line}", row, keys or row.keys())
        keys = keys or frozenset(row)
        name = row["file"]
        file = path.parent / name
        if (before := lines.setdefault(os.path.normpath(file), line)) != line:
            problem("listed twice", [name], f"{path} line {line}: {name} is on line {before} already: remove one")
        if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for names that no file can have)
            missing[name] = f"{path} line {line}: there is no file {file}"
        else:
            entries.append(Entry(file, name, row.get("split", "all"), row["label"]))
    if missing:
        more = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        problem("missing file", list(missing), next(iter(missing.values())) + more)
    if not entries:
        raise UserError(f"{path}: names no images: give one a line, as file,label")
    return _listing(path, entries, defaultdict(list), problem)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, fields by column) of each line of a .csv but the header and blank ones."""
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
                raise UserError(f"{path} line {reader.line_num}: {len(fields)} fields, but the header has {len(header)}")
            else:
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as why:
        raise UserError(f"{path} line {reader.line_num}: not CSV: {why}") from None


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, object) of each line of a .jsonl but blank ones; whole numbers as labels become their digits."""
    for line, source in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not source.strip():
            continue
        where = f"{path} line {line}"
        try:
            row = json.loads(source)
        except (ValueError, RecursionError) as why:
            raise UserError(f"{where}: not JSON: {why}") from None
        if not isinstance(row, dict):
            raise UserError(f'{where}: not an object: write {{"file": "a.jpg", "label": "cat"}}')
        _check_keys(where, list(row))
        if type(row["label"]) is int:
            row["label"] = str(row["label"])
        for key, value in row.items():
            if not isinstance(value, str):
                raise UserError(f"{where}: {key} must be text, not {json.dumps(value)[:40]}")
        yield line, {key: value.strip() for key, value in row.items()}


def _check_keys(where: str, keys: list[str]) -> None:
    for key in keys:
        if key not in _COLUMNS:
            raise UserError(f"{where}: unknown column {key!r}{did_you_mean(key, _COLUMNS)}")
        if keys.count(key) > 1:
            raise UserError(f"{where}: column {key!r} is there twice: remove one")
    for key in ("file", "label"):
        if key not in keys:
            raise UserError(f"{where}: no column {key!r}: the columns are file,label and, if you like, split")


def _check_row(where: str, row: Mapping[str, str], keys: Iterable[str]) -> None:
    if set(row) != set(keys):
        raise UserError(f"{where}: split must be on every line or on none")
    for key, value in row.items():
        if not value:
            raise UserError(f"{where}: {key} is empty")
    if row.get("split", "train") not in SPLITS:
        raise UserError(f"{where}: split is {row['split']!r}, not train, val or test{did_you_mean(row['split'], SPLITS)}")


def _listing(where: Path, entries: Iterable[Entry], left_out: LeftOut, problem: Problem) -> Listing:
    """Entries in the order of splits and names, and their classes; where there is a train, it must have all of them."""
    entries = tuple(sorted(entries, key=lambda entry: (("all", *SPLITS).index(entry.split), entry.name)))
    labels = sorted({entry.label for entry in entries})
    trained = {entry.label for entry in entries if entry.split == "train"}
    if trained:
        for label, split in dict.fromkeys((entry.label, entry.split) for entry in entries if entry.label not in trained):
            known = did_you_mean(label, trained)
            message = f"{where}: class {label!r} is in {split}, but train has no image of it{known}"
            problem("class not in train", [label], message)
    aside = {reason: tuple(files) for reason, files in left_out.items() if files}
    return Listing(entries, tuple(labels), imagenet.readable(labels, where), aside)


def for_each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result | UserError]:
    """`function(item)` for every item, on threads, in order; a UserError that it raises takes the result's place."""

    def run(some: Sequence[Item]) -> list[Result | UserError]:
        results: list[Result | UserError] = []
        for item in some:
            try:
                results.append(function(item))
            except UserError as why:
                results.append(why)
        return results

    # Many items a task: a task for each of a million images would cost more than the images.
    tasks = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ThreadPoolExecutor(max_workers=16) as pool:
        return [result for results in pool.map(run, tasks) for result in results]
