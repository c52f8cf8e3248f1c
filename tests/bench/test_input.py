"""bench input: output and JSON; the values depend on the machine."""

import json
from pathlib import Path

import pytest
from PIL import Image

from command_line import RunCli
from drawing import draw_images
from reslearn import UserError
from reslearn.bench.input import bench


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """Two classes with four JPEGs each."""
    for png in draw_images(tmp_path / "jpegs", each=4, size=(600, 500)).rglob("*.png"):
        Image.open(png).save(png.with_suffix(".jpg"))
        png.unlink()
    return tmp_path / "jpegs"


def test_the_command(jpegs: Path, tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "input.json"
    code, text, _ = run_cli("bench", "input", jpegs, "--rounds", "1", "--images", "50", "--out", out)
    assert code == 0
    row = json.loads(out.read_text())
    assert [way["what"].split(",")[0] for way in row["ways"]].count("reslearn") == 4 and row["photos"] == 8
    assert row["ways"][0]["ratio"] == 1 and all(way["images_per_cpu_s"] > 0 and way["what"] in text for way in row["ways"])
    assert row["bytes_a_photo"][1] < row["bytes_a_photo"][0]


def test_other_data_sets_are_rejected() -> None:
    with pytest.raises(UserError, match="bench input needs a folder or list of photos"):
        bench("fashion-sample")
