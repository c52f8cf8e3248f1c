"""Progress callbacks."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a title, the number of items done, and their total number."""


def silent(title: str, done: int, total: int) -> None:
    """Ignores progress."""
