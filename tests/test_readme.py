"""Every command and every snippet of the README runs, in its order, in one folder, with fewer steps."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

import boxed
from drawing import draw_images
from reslearn import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
FEW = ["--set", "schedule.steps=2"]
SMALL = {  # recipes for photos of 224 px
    "imagenet-classic": ["--set", "data.size=64"],
    "imagenet-fast": ["--set", "data.size=64", "--set", "data.grow=[32,64]"],
}


def command_line(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    words = shlex.split(re.sub(r"--set schedule\.epochs=\d+", "", line), comments=True)  # its length is FEW's
    few = FEW if words[1] == "train" and "--resume" not in words else []
    if words[1:3] == ["detect", "train"] and "--resume" not in words:
        few = [*FEW, "--set", "detector.min_size=48", "--set", "detector.max_size=64"]
    few = few + next((small for recipe, small in SMALL.items() if recipe in words), [])
    few = ["--rounds", "1", *(["--steps", "1"] if words[2] == "train" else ["--images", "50"])] if words[1] == "bench" else few
    few = ["--images", "8"] if words[1] == "analyze" and words[2] != "explain" else few
    few = ["--scale", "smoke", "--only", "plain20"] if words[1:3] == ["reproduce", "figure1"] else few
    monkeypatch.setattr(sys, "argv", [*words, *few])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    out, err = capsys.readouterr()
    findings = words[1] == "doctor" and exit.value.code == 1 and "photos" in out  # one photo is called what it is not
    assert not exit.value.code or findings, f"{line}: {err}"
    return out


def test_every_command_and_snippet_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_images(tmp_path / "photos", classes=["cat", "dog"], each=14, size=(100, 140))
    (tmp_path / "photos" / "cat" / "0.png").rename(tmp_path / "photos" / "cat" / "1.jpg")
    boxed.shapes(tmp_path / "cells")
    boxed.shapes(tmp_path / "cells", images=3, split="test")
    have_cifar = bool(os.environ.get("RESLEARN_DATA"))
    published = tmp_path / "resnet20-12fca82f.th"
    if have_cifar:
        published.symlink_to(Path(os.environ["RESLEARN_DATA"]) / "weights" / published.name)
    ran = 0
    for language, block in BLOCKS:
        if language == "toml":
            (tmp_path / "my.toml").write_text(block)
            command_line("reslearn train photos --recipe my.toml --out runs/toml", capsys, monkeypatch)
        elif language == "python":
            exec(block.replace("schedule.epochs=5", "schedule.steps=2"), {})
            capsys.readouterr()
        else:
            for line in block.splitlines():
                if line.startswith("reslearn ") and (have_cifar or not re.search("resnet20|plain20|published", line)):
                    assert not line.startswith("reslearn import") or published.is_file()
                    command_line(line, capsys, monkeypatch)
                    ran += 1
    assert ran >= 10


def test_make_knows_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
    assert {"demo", "test"} <= set(re.findall(r"^make (\w+)", README, re.M))


def test_benchmarks_that_the_docs_name_are_there() -> None:
    for script in re.findall(r"benchmarks/\w+\.py", README):
        assert (ROOT / script).is_file()
