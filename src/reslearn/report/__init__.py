"""One self-contained HTML page from run folders alone: nothing here needs a network, the data or a device."""

from reslearn.report.classifier import write
from reslearn.report.runs import most_confused

__all__ = ["most_confused", "write"]
