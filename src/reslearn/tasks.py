"""All tasks by name: those of this package, and those that other packages register.

A package registers a task in its pyproject.toml:

    [project.entry-points."reslearn.tasks"]
    segment = "my_package.task:SEGMENT"
"""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from reslearn.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from reslearn.training.task import Task

TASKS = {
    "classify": "reslearn.classify.task:CLASSIFY",
    "detect": "reslearn.detect.task:DETECT",
    "localize": "reslearn.localize.task:LOCALIZE",
}


@cache
def _known() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group="reslearn.tasks")} | TASKS


def names() -> list[str]:
    """The names of all tasks."""
    return list(_known())


def get(name: str) -> "Task[Any, Any, Any]":
    """Returns a task. Raises UserError for an unknown name, and for a task that cannot be imported."""
    if name not in _known():
        raise UserError(f"no task '{name}'{did_you_mean(name, names())}")
    module, _, attribute = _known()[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"task '{name}' ({_known()[name]}) cannot be imported: {error}") from error
