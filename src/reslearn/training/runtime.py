"""The machine a run is on: seeds, signals, versions, memory."""

import ctypes
import os
import platform
import resource
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from reslearn import __version__
from reslearn.data.sampling import integer
from reslearn.errors import Interrupted, UserError
from reslearn.training import ranks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
deterministic_options: Any = torch.utils.deterministic


def check_versions() -> None:
    """Raise UserError where the installed torchvision was built for another torch: its operators would be missing."""
    try:
        wanted = next((r for r in requires("torchvision") or [] if r.replace(" ", "").startswith("torch==")), "")
        installed, needed = version("torch"), wanted.replace(" ", "").removeprefix("torch==").split(";")[0]
    except PackageNotFoundError:
        return  # a build without package metadata: nothing to compare
    if needed and installed.split("+")[0] != needed.split("+")[0]:
        raise UserError(
            f"torch {installed} and torchvision {version('torchvision')} do not match (it needs torch {needed}): "
            "install both anew with 'pip install --upgrade torch torchvision'"
        )


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same numbers from the same seed; on a GPU as far as PyTorch can (it warns of an operator that cannot)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    # Filling writes every new tensor once more, and no result needs it.
    fill, deterministic_options.fill_uninitialized_memory = deterministic_options.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        deterministic_options.fill_uninitialized_memory = fill


def keep_freed_memory() -> None:
    """From now on this process keeps freed memory for its next use, where the C library is GNU's.

    By default each step's large tensors are given back to the system and asked for again: on a CPU, touching fresh pages takes
    a quarter of a small net's step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # older versions take no more
    mallopt(M_TRIM_THRESHOLD, -1)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Draws inside the net (dropout, stochastic depth) are a function of (seed, step, rank): no generator state to keep."""
    number = integer(seed, 0x57E9, step, *([rank] if rank else []))
    torch.default_generator.manual_seed(number)  # torch.manual_seed would spend half a millisecond on devices that are not there
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MB: of the device where it is a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device: torch.device, precision: str, execution: str) -> dict[str, Any]:
    """What a result was made on, and how."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "processor": name,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "execution": execution,
    }


def versions() -> dict[str, str]:
    """What a result was made with."""
    return {"reslearn": __version__, "torch": torch.__version__, "python": platform.python_version()}


def command(function: str) -> str:
    """The command line that began a run, or that it was `function` in Python."""
    from_shell = Path(sys.argv[0]).parent.name == "reslearn" or Path(sys.argv[0]).name == "reslearn"
    return shlex.join(["reslearn", *sys.argv[1:]]) if from_shell else f"{function} in Python"


@dataclass
class Stop:
    """Which signal asked to stop, if any."""

    number: int | None = None

    def check(self) -> None:
        """Raise Interrupted once a signal has come, to whichever rank."""
        if number := ranks.agree(self.number or 0):
            raise Interrupted(number)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a request that the loop answers; a second one stops at once.

    Ranks get the same signal from several sides (the terminal, Slurm, torchrun, which itself stops them after a while).
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number is not None and ranks.count() == 1:
            raise KeyboardInterrupt
        stop.number = number

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are its caller's
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
