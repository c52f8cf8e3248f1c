"""Each part of benchmarks/gpu.py, with tiny settings on the CPU; our detector agrees with torchvision's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import boxed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def figures(part: str, tmp_path: Path, *words: object) -> dict[str, Any]:
    command = [sys.executable, "-W", "error::UserWarning", SCRIPT, part, "--smoke", *words, "--out", tmp_path / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["part"] == part and {"command", "card", "versions"} <= set(record)
    return record["figures"]


def test_cifar(tmp_path: Path) -> None:
    result = figures("cifar", tmp_path)
    assert result["largest difference of a loss, fused and eager"] < 1e-3 and result["resumed run identical"]
    assert all(speed > 0 for speed in result["images/s"]["resnet8"].values()) and len(result["images/s"]["resnet8"]) == 2
    assert all(seconds > 0 for seconds in result["seconds of 2 steps of resnet8, by seeds trained side by side"].values())


@pytest.mark.parametrize(("part", "name"), [("table6", "done"), ("imagenet", "images/s at 64 px, batch 4")])
def test_table6_and_imagenet(part: str, name: str, tmp_path: Path) -> None:
    assert figures(part, tmp_path)[name]


def test_detection(tmp_path: Path) -> None:
    boxed.shapes(tmp_path / "set", images=6)
    boxed.shapes(tmp_path / "set", images=2, split="test")
    result = figures("detection", tmp_path, "--data", tmp_path / "set")
    for batch_norm in ("live", "frozen"):
        row = result[f"agreement, FPN, BN {batch_norm}"]
        assert row["within_0.001_px"] == row["boxes"] > 10, row
        assert max(value for name, value in row["differences"].items() if name != "gradient") <= 1e-4, row
        assert row["losses"]["loss_classifier"] > 0.1 and row["losses"]["gradient"] > 0
        assert result[f"training, FPN, BN {batch_norm}, plain loop, images/s"]["torchvision"] > 0
        assert all(ms > 0 for ms in result[f"inference, FPN, BN {batch_norm}, ms"].values())
    for case in ("fpn, BN live", "fpn, BN frozen", "c4, BN live"):
        assert result[f"training, {case}"]["step"] == 1 and "test" in result[f"training, {case}"]


def test_detection_needs_data(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "detection", "--smoke", "--out", tmp_path / "out.json"]
    assert "pass one with --data" in subprocess.run(command, capture_output=True, text=True).stderr
