"""The one kind of error that is a user's to mend: a single line that says what, where, and what to do."""

import shlex
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """Something the user gave cannot be used. Its text is one line; the command line prints it and exits with 2.

    shared: where several processes train, all of them have it, and only the first says so.
    """

    shared = False

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Diverged(UserError):
    """A training whose loss or gradient is no longer a finite number."""

    shared = True


class Lost(UserError):
    """Other processes of the same training are gone, or do not answer. What was shared with them cannot be put away in order."""


class Interrupted(Exception):
    """A signal asked for the end; what was under way has been saved.

    number: the signal's. folder: the run's. again: the command that goes on, where it is not train --resume.
    """

    def __init__(self, number: int, folder: Path | None = None, again: str | None = None) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.folder = number, folder
        self.again = again or f"reslearn train --resume {shlex.quote(str(folder or 'RUN'))}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'resnet20'?"` for the nearest of the known names, or their list where none is near.

    >>> did_you_mean("resnt20", ["resnet20", "plain20"])
    "; did you mean 'resnet20'?"
    >>> did_you_mean("x", ["resnet20", "plain20"])
    '; known: plain20, resnet20'
    """
    names = sorted({str(name) for name in known})
    near = [name for name in names if name.endswith(f".{word}")]  # a key without its section
    near = near or get_close_matches(word, names, n=3, cutoff=0.6)
    near = near or [name for name in names if word and name.startswith(word)][:3]
    if near:
        return "; did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    shown = names[:24]
    return "; known: " + ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a file's name before what is wrong in it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith((str(path), "cannot read")):
            raise
        raise UserError(f"{path} {error}") from error
