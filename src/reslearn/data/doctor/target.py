"""Where --fix may write, and a new folder that appears whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reslearn.errors import UserError
from reslearn.files import writing


def check_target(target: Path) -> None:
    """Raises UserError where --fix cannot write: it never overwrites, and writes a .csv or a folder."""
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


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `target` at the end; after an error, nothing is left."""
    with writing(target), tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as temporary:
        folder = Path(temporary) / target.name
        yield folder
        check_target(target)
        folder.rename(target)
