"""The architecture: import directions, fast --help, file lengths, public names."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reslearn

SOURCE = Path(reslearn.__file__).parent

# Each part may import from the rows above its own, and from the single files errors, files, device and progress.
ROWS: tuple[set[str], ...] = (
    {"errors", "files", "device", "progress", "html"},
    {"nets", "kernels"},
    {"data"},
    {"weights"},
    {"evaluation"},
    {"training", "tasks"},
    {"classify"},
    {"detect"},
    {"localize"},
    {"analysis", "bench", "deploy", "reproduce"},
    {"report"},
    {"api"},
    {"cli"},
    {"__main__"},
)
MAY_IMPORT = {part: set().union(*ROWS[: i + 1]) for i, row in enumerate(ROWS) for part in row}
MAY_IMPORT |= {"report": {"errors", "files"}, "detect": MAY_IMPORT["detect"] - {"classify"}}
MAY_IMPORT |= {"localize": MAY_IMPORT["localize"] - {"classify"}}


def imported(path: Path) -> set[str]:
    """The parts of reslearn that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: import by full names"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "reslearn":
            _, *rest = node.module.split(".")
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("reslearn.")}
    return found - {"__version__", "UserError", "errors", "files", "device", "progress", "html"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if part == "__init__":
        return  # the public names, imported when first used
    assert part in MAY_IMPORT, f"a new part: say in this test what {part} may import"
    assert imported(path) <= MAY_IMPORT[part] | {part}


def module_name(path: Path) -> str:
    return ".".join(("reslearn", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def packages_of(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(2, len(parts))}


MODULES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def imported_first(module: str) -> set[str]:
    """The modules that must have been imported before this one: those it names at its top, and the packages that they are in."""
    named = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
    named &= MODULES.keys()
    return (named | {package for one in named for package in packages_of(one)}) & MODULES.keys() - packages_of(f"{module}.x")


def test_any_module_can_be_imported_first() -> None:
    needs = {module: imported_first(module) - {"reslearn"} for module in MODULES}
    circles = set()
    for module in MODULES:
        seen, ahead = set(), [module]
        while ahead:
            more = needs[ahead.pop()] - seen
            seen |= more
            ahead += more
        circles |= {module} & seen
    assert not {f"{one} -> {other}" for one in circles for other in needs[one] & circles}


def test_files_have_at_most_400_lines() -> None:
    long = {str(p.relative_to(SOURCE)): n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_help_does_not_import_torch() -> None:
    code = "import sys; sys.argv = ['reslearn', '--help']\nfrom reslearn import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "heavy = {'torch', 'numpy', 'matplotlib', 'torchvision', 'PIL'} & set(sys.modules)\nassert not heavy, heavy"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    assert time.perf_counter() - started < 5, "no benchmark: --help must just not be absurdly slow here"


def test_public_names_are_few_and_all_there() -> None:
    assert len(reslearn.__all__) <= 25
    for name in reslearn.__all__:
        assert callable(getattr(reslearn, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reslearn.nothing  # type: ignore[attr-defined]
    assert set(reslearn.__all__) <= set(dir(reslearn)) and sorted(reslearn._HOME) == reslearn.__all__
