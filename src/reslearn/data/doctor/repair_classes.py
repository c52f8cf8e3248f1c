"""Writes the usable images of class folders and lists as a new list, or copies them to a new folder."""

import csv
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from reslearn.data.doctor.classes import folded
from reslearn.data.doctor.diagnosis import Diagnosis
from reslearn.data.doctor.target import check_target, new_folder
from reslearn.data.images.folder import SPLIT_FOLDERS, Entry
from reslearn.data.images.packed import is_packed
from reslearn.data.images.stream import Progress, silent
from reslearn.data.sets import NAMES
from reslearn.errors import UserError
from reslearn.files import user_path, write_text


def check_source(data: str | Path) -> None:
    """Raises UserError where nothing can be written of a data set, because its images are not files."""
    if data in NAMES:
        raise UserError(f"--fix does not apply to {data}: it is a set known by name, which has no files")
    if is_packed(user_path(data)):
        raise UserError(f"--fix does not apply to {data}, which is packed: fix the images that it was made of, and pack them again")


def repair_classes(diagnosis: Diagnosis, target: Path, progress: Progress = silent) -> None:
    """Writes the usable images: FILE.csv is a list that `open` takes, FOLDER a copy in class folders, whole or not at all.

    A copy's folders are the splits and the classes' labels (not their readable names), and each suffix fits the format.
    Raises UserError where that is impossible, and for sets that are not of files (see check_source).
    """
    target = user_path(target)
    check_target(target)
    if not diagnosis.entries:
        raise UserError(f"--fix {target}: nothing to write: none of the images is usable, or they are not files")
    if target.suffix:
        write_text(target, _list(diagnosis.entries, target.absolute().parent))
    else:
        _copy(diagnosis.entries, diagnosis.suffixes, target, progress)


def _list(entries: Sequence[Entry], folder: Path) -> str:
    """The text of a list in `folder`, as folder.read_list reads it."""
    divided = entries[0].split != "all"
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "label", "split"] if divided else ["file", "label"])
    for entry in entries:
        if not entry.label.strip():
            raise UserError(f"{entry.file}: its class is called {entry.label!r}, which a list cannot hold: rename it")
        file = os.path.relpath(entry.file, folder)
        file = file if file == file.lstrip() else f"./{file}"  # readers drop the space around a field
        rows.writerow([file, entry.label, entry.split] if divided else [file, entry.label])
    return text.getvalue()


def _copy(entries: Sequence[Entry], suffixes: Mapping[Path, str], target: Path, progress: Progress) -> None:
    for label in sorted({entry.label for entry in entries}):
        hidden = label.startswith(".") or label == "__MACOSX"
        if "/" in label or "\0" in label or hidden or label.lower() in SPLIT_FOLDERS or len(os.fsencode(label)) > 255:
            raise UserError(
                f"--fix {target}: class {label!r} cannot be the name of a folder: write a list, --fix {target.name}.csv"
            )
    taken: set[str] = set()
    with new_folder(target) as fresh:
        for done, entry in enumerate(entries, 1):
            folder = Path(entry.label) if entry.split == "all" else Path(entry.split, entry.label)
            name = _free_name(folder, entry.file, suffixes.get(entry.file, entry.file.suffix), taken)
            (fresh / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy2(entry.file, fresh / folder / name)
            progress("copying", done, len(entries))


def _free_name(folder: Path, file: Path, suffix: str, taken: set[str]) -> str:
    """The file's name with this suffix, or one like it that is free on any disk; it is taken from then on."""
    stem = file.name.removesuffix(file.suffix)
    name, number = stem + suffix, 1
    while (place := folded(f"{folder}/{name}")) in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(place)
    return name
