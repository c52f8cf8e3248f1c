"""Import of other libraries' weights: `reslearn import`. Each format is a module; those of state dicts are in files.FORMATS."""

from reslearn.weights.read.imports import import_weights

__all__ = ["import_weights"]
