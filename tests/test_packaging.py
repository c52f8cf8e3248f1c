"""The wheel and the source distribution build, pass their checks, and work where nothing else of the checkout is."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

import reslearn

ROOT = Path(__file__).parents[1]


def run(*words: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def test_distributions_pass_the_checks_of_a_package_index(built: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)


def test_the_description_has_no_link_into_the_checkout(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        name = next(name for name in archive.getnames() if name.endswith("PKG-INFO"))
        file = archive.extractfile(name)
        assert file is not None
        links = re.findall(r"\]\(([^)]+)\)", file.read().decode())
    assert links and all(link.startswith("https://") for link in links)


def test_the_wheel_works_alone(built: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    bin = tmp_path / "env" / "bin"
    library = Path(run(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    wheel = next(built.glob("*.whl"))
    run(sys.executable, "-m", "pip", "--python", bin / "python", "install", "--no-deps", wheel, cwd=tmp_path)
    # The dependencies are those of this environment, of which the checkout itself is a part: the wheel comes first.
    (library / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where = run(bin / "python", "-c", "import reslearn; print(reslearn.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(library)
    assert reslearn.__version__ in run(bin / "reslearn", "--version", cwd=tmp_path)
    options = ["--model", "resnet8", "--set", "schedule.steps=2", "--out", "run"]
    run(bin / "reslearn", "train", "fashion-sample", *options, cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()


def test_versions_agree() -> None:
    assert version("reslearn") == reslearn.__version__
    assert f"version: {reslearn.__version__}" in (ROOT / "CITATION.cff").read_text()
