"""HTML reports: one self-contained page from run folders alone, without network access, data or an accelerator."""

from reslearn.report.page import write

__all__ = ["write"]
