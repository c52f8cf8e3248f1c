"""Kernels in C++, compiled once by the machine's own compiler and kept in the cache folder. PyTorch or Pillow serve without."""

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
    """Why there is no library; its text ends a sentence such as "BN and ReLU are not fused: ..."."""


def load(source: Path, flags: Sequence[str] = (), libraries: Sequence[str] = ()) -> ctypes.CDLL:
    """The library made of a C++ source file, linked with others by name. Raises CannotCompile."""
    compiler = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), ""
    )
    if not compiler:
        raise CannotCompile("there is no C++ compiler")
    try:
        return ctypes.CDLL(str(_compiled(compiler, source, (*FLAGS, *flags), [f"-l{name}" for name in libraries])))
    except subprocess.SubprocessError:
        with_ = f" with lib{' and lib'.join(libraries)}" if libraries else ""
        raise CannotCompile(f"{compiler} cannot compile them{with_}") from None
    except OSError as error:
        raise CannotCompile(f"they cannot be loaded ({error})") from None


def _compiled(compiler: str, source: Path, flags: Sequence[str], links: Sequence[str]) -> Path:
    """The library, from the cache where this compiler has made it from this source on this processor before."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    parts = [source.read_bytes(), *map(str.encode, [*flags, *links]), compiler.encode(), version, _processor().encode()]
    key = hashlib.sha256(b"\n".join(parts)).hexdigest()
    library = cache_folder() / "kernels" / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
            compile_, link = [compiler, *flags, "-c", str(source), "-o", str(built)], [compiler, "-shared", str(built)]
            subprocess.run(compile_, check=True, capture_output=True, timeout=120)
            # Linked by hand without the compiler's OpenMP: PyTorch's own, which is loaded already, serves both.
            subprocess.run([*link, *links, "-o", str(linked)], check=True, capture_output=True, timeout=120)
            linked.rename(library)
    return library


def _processor() -> str:
    """What the machine's processor can do: a cache may be shared by machines, and code for one is wrong for another."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    return f"{platform.machine()} {platform.processor()}"
