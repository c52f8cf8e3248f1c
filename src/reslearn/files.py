"""Files that are whole or not there at all."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reslearn.errors import UserError


def cache_folder() -> Path:
    """Where downloads and shrunk photos are kept: $XDG_CACHE_HOME/reslearn, or ~/.cache/reslearn."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the specification declares relative ones void
    return (given if given.is_absolute() else Path.home() / ".cache") / "reslearn"


def fsync_folder(folder: Path) -> None:
    """Make a rename in a folder durable. Windows has no such call, and needs none."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(what: Path, megabytes: float | None = None) -> Iterator[None]:
    """Turn what goes wrong while `what` is written (full or read-only disk) into one clear line."""
    try:
        yield
    except Exception as error:
        # safetensors wraps the operating system's error in its own and keeps only the text.
        code = error.errno if isinstance(error, OSError) else None
        text = str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text or "No space left" in text:
            need = f" ({megabytes:.1f} MB are needed)" if megabytes else ""
            raise UserError(f"the disk is full: cannot write {what}{need}; free some space and try again") from error
        if code in (errno.EROFS, errno.EACCES, errno.EPERM) or "os error 30" in text or "os error 13" in text:
            raise UserError(f"cannot write {what}: no permission, or the disk is read-only") from error
        if isinstance(error, OSError):
            raise UserError(f"cannot write {what}: {error.strerror or error}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: Path, write: Callable[[Path], object], megabytes: float | None = None) -> None:
    """Have write(temporary) make a file, then put it in place; on failure nothing is left and the old file stays."""
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path, megabytes):
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else can read
            fsync_file(temporary)
            temporary.rename(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, in UTF-8, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. Raises UserError, naming the file and line."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as why:
        raise UserError(f"{path}: cannot be read: {getattr(why, 'strerror', None) or why}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        line = data.count(10, 0, why.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8 text ({why.reason}): save the file as UTF-8") from None


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, with ~ expanded. Raises UserError where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as why:
        raise UserError(f"{path}: cannot be opened: {why}") from None
