"""Training: from a recipe to a run folder, interrupted and resumed bit for bit."""

from reslearn.training.run import Run, resume, train

__all__ = ["Run", "resume", "train"]
