"""Runs the command line in this process (the fixture run_cli) or in a subprocess."""

import os
import subprocess
import sys
from typing import Any, NamedTuple, Protocol


class Result(NamedTuple):
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str


class RunCli(Protocol):
    """Runs `reslearn WORDS` in this process: the fixture run_cli."""

    def __call__(self, *words: object) -> Result: ...


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start_python(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Starts Python with one thread; `env` is added to the environment, other options are Popen's."""
    command = [sys.executable, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}), **options)


def run_python(*arguments: object, **options: Any) -> Result:
    """Runs Python with one thread to its end; options as for start_python."""
    with start_python(*arguments, **options) as process:
        try:
            out, err = process.communicate(timeout=900)
        finally:
            process.kill()  # if it is still running
    return Result(process.returncode, out, err)


def start_reslearn(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Starts `reslearn WORDS` as a process of one thread; options as for start_python."""
    return start_python("-m", "reslearn", *words, **options)


def run_reslearn(*words: object, **options: Any) -> Result:
    """Runs `reslearn WORDS` as a process of one thread to its end; options as for start_python."""
    return run_python("-m", "reslearn", *words, **options)
