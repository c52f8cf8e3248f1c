"""Errors that users can fix: one line that says what is wrong, where, and what to do."""

import shlex
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import Any


class Notice(UserWarning):
    """Something to know about a result; the command line prints it as one line."""


class UserError(ValueError):
    """Invalid user input. The message is one line; the command line prints it and exits with code 2.

    shared: whether all ranks raise it, so that only the first one prints it.
    """

    shared = False

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Diverged(UserError):
    """The loss or gradient is not finite."""

    shared = True


class Lost(UserError):
    """Other ranks have exited or do not respond, so resources shared with them cannot be released cleanly."""


class Interrupted(Exception):
    """A signal stopped the process; its state has been saved.

    number: the signal's. folder: the run's. again: the command that resumes, by default `reslearn train --resume FOLDER`.
    """

    def __init__(self, number: int, folder: Path | None = None, again: str | None = None) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.folder = number, folder
        self.again = again or f"reslearn train --resume {shlex.quote(str(folder or 'RUN'))}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'resnet20'?"` with the closest known names, or the list of all if none is close.

    >>> did_you_mean("resnt20", ["resnet20", "plain20"])
    "; did you mean 'resnet20'?"
    >>> did_you_mean("x", ["resnet20", "plain20"])
    '; known: plain20, resnet20'
    >>> did_you_mean("detector.min_sze", ["detector.min_size", "detector.max_size"])
    "; did you mean 'detector.min_size'?"
    """
    names = sorted({str(name) for name in known})
    section, _, last = word.rpartition(".")
    siblings = [name for name in names if section and name.rpartition(".")[0] == section]
    close = [f"{section}.{name}" for name in _closest(last, [name.rpartition(".")[2] for name in siblings])]
    if not close and (siblings or not section):  # the key without its section, or in the wrong one
        close = [name for name in names if name.endswith(f".{last}")]
    close = close or _closest(word, names)
    if not close and not section:
        keys = _closest(word, list({name.rpartition(".")[2] for name in names}))
        close = [name for name in names if name.rpartition(".")[2] in keys]
    close = close or [name for name in names if word and name.startswith(word)][:3]
    if close:
        return "; did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    return "; known: " + ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")


def _closest(word: str, names: Sequence[str]) -> list[str]:
    """Up to three names, most similar first, without those much less similar than the first."""
    matches = get_close_matches(word, names, n=3, cutoff=0.6)
    ratios = [SequenceMatcher(None, name, word).ratio() for name in matches]
    return [name for name, ratio in zip(matches, ratios, strict=True) if ratio > ratios[0] - 0.1]


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Prepends the file's name to a UserError."""
    try:
        yield
    except UserError as error:
        if str(error).startswith((str(path), "cannot read")):
            raise
        raise UserError(f"{path} {error}") from error


PYDANTIC = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
    "finite_number": "must be finite",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "model_type": "must be a table",
    "string_type": "must be text",
    "too_long": "must have {max_length} or fewer values",
    "too_short": "must have {min_length} or more values",
    "tuple_type": "must be a list",
}


def explain(problem: Mapping[str, Any]) -> str:
    """The message of a pydantic error (an item of ValidationError.errors()) in the words of this program."""
    template = PYDANTIC.get(problem["type"])
    return template.format(**problem.get("ctx", {})) if template else problem["msg"].removeprefix("Value error, ")
