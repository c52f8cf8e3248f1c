"""Images: one door, `open(name_or_path)`, and what is made of them on the way to a network."""

from reslearn.data.download import present
from reslearn.data.sets import NAMES, DataSet, Split, open

__all__ = ["NAMES", "DataSet", "Split", "open", "present"]
