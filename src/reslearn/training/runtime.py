"""The process and machine of a run: determinism, seeds, signals, versions and memory."""

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
    """Raise UserError if the installed torchvision was built for another torch version: its operators would be missing."""
    try:
        wanted = next((r for r in requires("torchvision") or [] if r.replace(" ", "").startswith("torch==")), "")
        installed, needed = version("torch"), wanted.replace(" ", "").removeprefix("torch==").split(";")[0]
    except PackageNotFoundError:
        return  # builds without package metadata cannot be compared
    if needed and installed.split("+")[0] != needed.split("+")[0]:
        raise UserError(
            f"torchvision {version('torchvision')} needs torch {needed}, but torch {installed} is installed: "
            "run 'pip install --upgrade torch torchvision'"
        )


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic algorithms. On a GPU, PyTorch warns about operators that have none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    # Filling new tensors costs time and affects no result.
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
    """Keep freed memory in this process for reuse (GNU C library only).

    By default, large tensors are returned to the system after each step. Page faults of the new ones then take a quarter of a
    step of a small network on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    if not mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the maximum in older versions
    mallopt(M_TRIM_THRESHOLD, -1)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed dropout and stochastic depth by (seed, step, rank), so that checkpoints need no generator state."""
    number = integer(seed, 0x57E9, step, *([rank] if rank else []))
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes 0.5 ms for devices that do not exist
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the GPU, otherwise of the process."""
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
    """Describes the hardware and execution of a run, for recipe.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    common = {"device": device.type, "processor": name, "threads": torch.get_num_threads()}
    return common | {"precision": precision, "execution": execution}


def versions() -> dict[str, str]:
    """The versions of reslearn, torch and Python."""
    return {"reslearn": __version__, "torch": torch.__version__, "python": platform.python_version()}


def command(function: str) -> str:
    """The command line of this process, or "FUNCTION in Python"."""
    from_shell = Path(sys.argv[0]).parent.name == "reslearn" or Path(sys.argv[0]).name == "reslearn"
    return shlex.join(["reslearn", *sys.argv[1:]]) if from_shell else f"{function} in Python"


@dataclass
class Stop:
    """number: the signal that was received, or None."""

    number: int | None = None

    def check(self) -> None:
        """Raise Interrupted if any rank has received a signal."""
        if number := ranks.agree(self.number or 0):
            raise Interrupted(number)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Record the first SIGINT or SIGTERM for the loop to act on; a second one raises KeyboardInterrupt.

    With several ranks, further signals are ignored: the terminal, Slurm and torchrun may each send one, and torchrun kills the
    ranks after a timeout.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.number is not None and ranks.count() == 1:
            raise KeyboardInterrupt
        stop.number = number

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # signal handlers can be set in the main thread only
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
