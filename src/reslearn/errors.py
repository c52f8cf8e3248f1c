"""The one kind of error that is a user's to mend: a single line that says what, where, and what to do."""

import shlex
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
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
    >>> did_you_mean("detector.min_sze", ["detector.min_size", "detector.max_size"])
    "; did you mean 'detector.min_size'?"
    """
    names = sorted({str(name) for name in known})
    section, _, last = word.rpartition(".")
    own = [name for name in names if section and name.rpartition(".")[0] == section]
    near = [f"{section}.{name}" for name in _nearest(last, [name.rpartition(".")[2] for name in own])]
    if not near and (own or not section):  # a key without its section, or in another's
        near = [name for name in names if name.endswith(f".{last}")]
    near = near or _nearest(word, names)
    if not near and not section:
        ends = _nearest(word, list({name.rpartition(".")[2] for name in names}))
        near = [name for name in names if name.rpartition(".")[2] in ends]
    near = near or [name for name in names if word and name.startswith(word)][:3]
    if near:
        return "; did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    shown = names[:24]
    return "; known: " + ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _nearest(word: str, names: Sequence[str]) -> list[str]:
    """At most three names, the likest first, and none that is much less like the word than the likest."""
    found = get_close_matches(word, names, n=3, cutoff=0.6)
    likeness = [SequenceMatcher(None, name, word).ratio() for name in found]
    return [name for name, like in zip(found, likeness, strict=True) if like > likeness[0] - 0.1]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a file's name before what is wrong in it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith((str(path), "cannot read")):
            raise
        raise UserError(f"{path} {error}") from error
