"""Writes the usable images of class folders and lists to a new list or folder."""

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
    """Raises UserError if the images of a data set are not files, so that they cannot be listed or copied."""
    if data in NAMES:
        raise UserError(f"--fix does not apply to {data}: a named data set has no image files")
    if is_packed(user_path(data)):
        raise UserError(f"--fix does not apply to {data}, a packed set: fix the original images and pack them again")


def repair_classes(diagnosis: Diagnosis, target: Path, progress: Progress = silent) -> None:
    """Writes the usable images atomically: to a list that `open` reads if `target` ends in .csv, else to a folder of class folders.

    The folders are named by split and label (not by readable class names); wrong suffixes are corrected. Raises UserError if
    `target` cannot be written or the images are not files (see check_source).
    """
    target = user_path(target)
    check_target(target)
    if not diagnosis.entries:
        raise UserError(f"--fix {target}: nothing to write: no image is usable, or the images are not files")
    if target.suffix:
        write_text(target, _list_text(diagnosis.entries, target.absolute().parent))
    else:
        _copy(diagnosis.entries, diagnosis.suffixes, target, progress)


def _list_text(entries: Sequence[Entry], folder: Path) -> str:
    """The text of a .csv list in `folder`, in the format of folder.read_list."""
    divided = entries[0].split != "all"
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "label", "split"] if divided else ["file", "label"])
    for entry in entries:
        if not entry.label.strip():
            raise UserError(f"{entry.file}: class name {entry.label!r} is blank, which a list cannot contain: rename the class")
        file = os.path.relpath(entry.file, folder)
        file = file if file == file.lstrip() else f"./{file}"  # readers strip leading spaces of a field
        rows.writerow([file, entry.label, entry.split] if divided else [file, entry.label])
    return text.getvalue()


def _copy(entries: Sequence[Entry], suffixes: Mapping[Path, str], target: Path, progress: Progress) -> None:
    for label in sorted({entry.label for entry in entries}):
        hidden = label.startswith(".") or label == "__MACOSX"
        if "/" in label or "\0" in label or hidden or label.lower() in SPLIT_FOLDERS or len(os.fsencode(label)) > 255:
            raise UserError(f"--fix {target}: {label!r} cannot be a folder name: write a list instead, --fix {target.name}.csv")
    taken: set[str] = set()
    with new_folder(target) as fresh:
        for done, entry in enumerate(entries, 1):
            folder = Path(entry.label) if entry.split == "all" else Path(entry.split, entry.label)
            name = _free_name(folder, entry.file, suffixes.get(entry.file, entry.file.suffix), taken)
            (fresh / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy2(entry.file, fresh / folder / name)
            progress("copying", done, len(entries))


def _free_name(folder: Path, file: Path, suffix: str, taken: set[str]) -> str:
    """The file's name with this suffix, numbered if it collides in `taken` on a case-insensitive disk. Adds it to `taken`."""
    stem = file.name.removesuffix(file.suffix)
    name, number = stem + suffix, 1
    while (key := folded(f"{folder}/{name}")) in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(key)
    return name
