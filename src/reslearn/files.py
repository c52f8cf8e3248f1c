"""Atomic file writes, text files and user paths."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reslearn.errors import UserError


def cache_folder() -> Path:
    """The folder for downloads and shrunk photos: $XDG_CACHE_HOME/reslearn, or ~/.cache/reslearn."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG specification says to ignore relative paths
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "reslearn"


def fsync_folder(folder: Path) -> None:
    """Makes a rename in a folder durable. Windows has no such call and does not need it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Makes a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path, megabytes: float | None = None) -> Iterator[None]:
    """Converts OS errors while writing `path`, such as a full or read-only disk, to UserError. megabytes: space needed."""
    try:
        yield
    except Exception as error:
        # safetensors wraps OS errors in its own class and keeps only the text.
        code = error.errno if isinstance(error, OSError) else None
        text = str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text or "No space left" in text:
            needed = f" ({megabytes:.1f} MB are needed)" if megabytes else ""
            raise UserError(f"the disk is full: cannot write {path}{needed}; free some space and try again") from error
        if code in (errno.EROFS, errno.EACCES, errno.EPERM) or "os error 30" in text or "os error 13" in text:
            raise UserError(f"cannot write {path}: no permission, or the disk is read-only") from error
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: Path, write: Callable[[Path], object], megabytes: float | None = None) -> None:
    """Calls write(temporary) and renames the temporary file to `path`. On failure, removes it and keeps the old file."""
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path, megabytes):
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())  # safetensors creates files that only the owner can read
            fsync_file(temporary)
            temporary.rename(path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without its byte-order mark. Raises UserError with file and line."""
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
    """Expands ~ in a user's path. Raises UserError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as why:
        raise UserError(f"{path}: cannot be opened: {why}") from None
