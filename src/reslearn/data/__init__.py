"""Data sets, opened with `open(name_or_path)`, and the preparation of images for a network."""

from reslearn.data.download import present
from reslearn.data.sets import NAMES, DataSet, Split, open

__all__ = ["NAMES", "DataSet", "Split", "open", "present"]
