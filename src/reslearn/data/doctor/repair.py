"""What an examination keeps of a data set, written as a list or copied to a new folder."""

import csv
import io
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from reslearn.data.doctor.diagnosis import Diagnosis, Kept, folded
from reslearn.data.images import packed
from reslearn.data.images.folder import SPLIT_FOLDERS
from reslearn.data.images.stream import Progress
from reslearn.data.sets import NAMES
from reslearn.errors import UserError
from reslearn.files import write_text, writing


def check_target(target: Path) -> None:
    """Raise UserError where `mend` could not write: it never overwrites, and writes a .csv or a folder."""
    if target.exists() or target.is_symlink():
        raise UserError(f"--fix {target}: is there already: choose another name, or remove it")
    if target.suffix and target.suffix.lower() != ".csv":
        raise UserError(f"--fix {target}: a clean list ends in .csv, and a clean copy is a folder without a suffix")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UserError(f"--fix {target}: there is no folder {parent}")
    if not target.suffix and (split := next((name for name in ("train", "training") if (parent / name).is_dir()), None)):
        raise UserError(
            f"--fix {target}: {parent} is a data set (it holds {split}/), which a copy in it would spoil: write elsewhere"
        )


def check_source(data: str | Path) -> None:
    """Raise UserError where nothing could be written of a data set, because its images are no files."""
    if data in NAMES:
        raise UserError(f"--fix does not apply to {data}: it is a set known by name, which has no files")
    if packed.found(Path(data).expanduser()):
        raise UserError(
            f"--fix does not apply to {data}, which is packed: mend the images that it was made of, and pack them again"
        )


def mend(diagnosis: Diagnosis, target: Path, progress: Progress = lambda what, done, total: None) -> None:
    """Write what is worth keeping: FILE.csv is a list that `open` takes, FOLDER a copy in class folders, whole or not at all.

    Copies have their splits' folders, the class's label (not its readable name) as theirs, and a suffix that fits their format.
    Raises UserError where that cannot be. Of sets that have no files (see check_source), nothing is worth keeping.
    """
    check_target(target)
    kept = diagnosis.kept
    if not kept:
        raise UserError(f"--fix {target}: nothing to write: none of its images is worth keeping, or they are no files")
    if target.suffix:
        write_text(target, _list(kept, target.absolute().parent))
    else:
        _copy(kept, target, progress)


def _list(kept: Sequence[Kept], folder: Path) -> str:
    """The text of a list in `folder`, as folder.read_list reads it."""
    divided = kept[0].entry.split != "all"
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "label", "split"] if divided else ["file", "label"])
    for entry, _ in kept:
        if not entry.label.strip():
            raise UserError(f"{entry.file}: its class is called {entry.label!r}, which a list cannot hold: rename it")
        file = os.path.relpath(entry.file, folder)
        file = file if file == file.lstrip() else f"./{file}"  # readers drop the space around a field
        rows.writerow([file, entry.label, entry.split] if divided else [file, entry.label])
    return text.getvalue()


def _copy(kept: Sequence[Kept], target: Path, progress: Progress) -> None:
    for label in sorted({entry.label for entry, _ in kept}):
        hidden = label.startswith(".") or label == "__MACOSX"
        if "/" in label or "\0" in label or hidden or label.lower() in SPLIT_FOLDERS or len(os.fsencode(label)) > 255:
            raise UserError(
                f"--fix {target}: class {label!r} cannot be the name of a folder: write a list, --fix {target.name}.csv"
            )
    taken: set[str] = set()
    with writing(target), tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as temporary:
        fresh = Path(temporary) / target.name
        for done, (entry, suffix) in enumerate(kept, 1):
            folder = Path(entry.label) if entry.split == "all" else Path(entry.split, entry.label)
            name = _free(folder, entry.file, suffix, taken)
            (fresh / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy2(entry.file, fresh / folder / name)
            progress("copying", done, len(kept))
        check_target(target)
        fresh.rename(target)


def _free(folder: Path, file: Path, suffix: str, taken: set[str]) -> str:
    """The file's name with this suffix, or one like it that no other has on any disk; it is taken from then on."""
    stem = file.name.removesuffix(file.suffix)
    name, number = stem + suffix, 1
    while (place := folded(f"{folder}/{name}")) in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    taken.add(place)
    return name
