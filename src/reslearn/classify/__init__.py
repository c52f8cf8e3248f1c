"""Image classification: its recipes, its task, its evaluation."""

from reslearn import training  # noqa: F401  first: the two packages import each other
