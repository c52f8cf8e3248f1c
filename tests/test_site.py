"""The documentation as a site: it builds strictly, and the generated pages are up to date."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["recipes.md", "paper.md"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    spec = spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    make_docs = module_from_spec(spec)
    spec.loader.exec_module(make_docs)
    assert (ROOT / "docs" / page).read_text() == make_docs.render(page), "run make docs"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "site").iterdir()} >= {"index.html", "api", "recipes", "paper", "search"}
    assert "reslearn.api.train" in (tmp_path / "site" / "api" / "index.html").read_text()
