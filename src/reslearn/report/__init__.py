"""One self-contained HTML page from run folders alone: needs no network, data or accelerator."""

from reslearn.report.page import write

__all__ = ["write"]
