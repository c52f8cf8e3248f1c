"""The machine a run is on."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from reslearn.training import runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
def step():
    for _ in range(4):
        kept = [torch.ones(1 << 20) for _ in range(4)]
        del kept
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")
def test_freed_memory_is_used_again_without_touching_fresh_pages() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=120)
        return int(done.stdout)

    assert faults("keep") * 20 < faults("as it is")
