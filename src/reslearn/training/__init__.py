"""Training: from a recipe to a run folder, interrupted and resumed bit for bit."""

from reslearn.training.run import Run, resume, train
from reslearn.training.runtime import Interrupted

__all__ = ["Interrupted", "Run", "resume", "train"]
