"""Memory of the process."""

import ctypes

import pytest

from command_line import run_python

FAULTS = """
import resource, sys, torch
from reslearn.training import runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
def step():
    for _ in range(4):
        torch.ones(1 << 24)
for _ in range(8):  # the heap settles within a few steps
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _libc() -> tuple[int, ...]:
    """The version of the GNU C library; () for others."""
    try:
        version = ctypes.CDLL(None).gnu_get_libc_version
    except (OSError, AttributeError, TypeError):
        return ()
    version.restype = ctypes.c_char_p
    return tuple(int(part) for part in version().decode().split(".")[:2])


# Older versions cannot keep allocations of this size.
@pytest.mark.skipif(_libc() < (2, 35), reason="not a recent GNU C library")
def test_freed_memory_is_reused_without_page_faults() -> None:
    def faults(how: str) -> int:
        return int(run_python("-c", FAULTS, how).out)

    assert faults("keep") * 20 < faults("as it is")
