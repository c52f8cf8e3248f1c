"""Checks where --fix may write, and creates its folder atomically."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reslearn.errors import UserError
from reslearn.files import writing


def check_target(target: Path) -> None:
    """Raises UserError unless `target` is a new .csv list or a new folder outside any data set."""
    if target.exists() or target.is_symlink():
        raise UserError(f"--fix {target}: already exists: choose another name, or remove it")
    if target.suffix and target.suffix.lower() != ".csv":
        raise UserError(f"--fix {target}: must be a .csv list, or a folder without a suffix")
    parent = target.absolute().parent
    if not parent.is_dir():
        raise UserError(f"--fix {target}: folder {parent} does not exist")
    if not target.suffix and (split := next((name for name in ("train", "training") if (parent / name).is_dir()), None)):
        raise UserError(f"--fix {target}: {parent} is a data set (it contains {split}/): choose a folder outside of it")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `target` on success and removed on error."""
    with writing(target), tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as temporary:
        folder = Path(temporary) / target.name
        yield folder
        check_target(target)
        folder.rename(target)
