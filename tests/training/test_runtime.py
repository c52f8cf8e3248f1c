"""The machine a run is on."""

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
for _ in range(8):  # at first the C library leaves holes between what it aligns; they close within a few steps
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _libc() -> tuple[int, ...]:
    """The version of the GNU C library; () where it is another."""
    try:
        version = ctypes.CDLL(None).gnu_get_libc_version
    except (OSError, AttributeError, TypeError):
        return ()
    version.restype = ctypes.c_char_p
    return tuple(int(part) for part in version().decode().split(".")[:2])


# Older ones never keep as much as this test takes at once, which by default comes from the system each time.
@pytest.mark.skipif(_libc() < (2, 35), reason="not a recent GNU C library")
def test_freed_memory_is_used_again_without_touching_fresh_pages() -> None:
    def faults(how: str) -> int:
        return int(run_python("-c", FAULTS, how).out)

    assert faults("keep") * 20 < faults("as it is")
