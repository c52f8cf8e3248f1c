"""Compiles C++ kernels with the system's compiler and caches the libraries. Without them, PyTorch or Pillow is used."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from reslearn.files import cache_folder

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC")


class CannotCompile(Exception):
    """Why there is no library, as the end of a sentence such as "BN and ReLU are not fused: ..."."""


def load(source: Path, flags: Sequence[str] = (), libraries: Sequence[str] = ()) -> ctypes.CDLL:
    """Compiles a C++ source file, links it with the named libraries and loads it. Raises CannotCompile."""
    compiler = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), ""
    )
    if not compiler:
        raise CannotCompile("there is no C++ compiler")
    try:
        return ctypes.CDLL(str(_compiled(compiler, source, (*FLAGS, *flags), [f"-l{name}" for name in libraries])))
    except subprocess.SubprocessError:
        linked = f" with lib{' and lib'.join(libraries)}" if libraries else ""
        raise CannotCompile(f"{compiler} cannot compile {source.name}{linked}") from None
    except OSError as error:
        raise CannotCompile(f"cannot load the library of {source.name} ({error})") from None


def _compiled(compiler: str, source: Path, flags: Sequence[str], links: Sequence[str]) -> Path:
    """Returns the library's path. The cache key covers source, flags, compiler version and processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    parts = [source.read_bytes(), *map(str.encode, [*flags, *links]), compiler.encode(), version, _processor().encode()]
    key = hashlib.sha256(b"\n".join(parts)).hexdigest()
    library = cache_folder() / "kernels" / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            object_file, shared = f"{folder}/kernel.o", f"{folder}/kernel.so"
            subprocess.run([compiler, *flags, "-c", str(source), "-o", object_file], check=True, capture_output=True, timeout=120)
            # Linked separately, without -fopenmp, so that the library uses PyTorch's OpenMP runtime, which is loaded already.
            link = [compiler, "-shared", object_file, *links, "-o", shared]
            subprocess.run(link, check=True, capture_output=True, timeout=120)
            Path(shared).rename(library)
    return library


def _processor() -> str:
    """Processor model and features: machines with different processors may share a cache."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return f"{platform.machine()} {platform.processor()}"
