"""Read other programs' weights: `reslearn import`. A format is a module here and, for named tensors, a row of files.FORMATS."""

from reslearn.weights.read.imports import import_weights

__all__ = ["import_weights"]
