"""bench train: output and JSON; the values depend on the machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import RunCli
from reslearn import UserError
from reslearn.bench import limits
from reslearn.bench.plain import PlainProcess, reference
from reslearn.bench.train import bench

SHORT: dict[str, Any] = {"rounds": 1, "steps": 1}


def test_a_faster_loop_has_a_higher_rate() -> None:
    device = torch.device("cpu")
    assert limits.rate(lambda: sum(range(1000)), device, 0.1) > limits.rate(lambda: sum(range(100_000)), device, 0.1)


def test_torchvisions_network_of_the_same_depth() -> None:
    assert [reference(net) for net in ("resnet20", "plain34", "resnet50")] == [None, None, "resnet50"]


def test_a_killed_plain_loop_raises_a_user_error() -> None:
    plain = PlainProcess("fashion-sample", "resnet8", {}, 8, torch.device("cpu"), threads=1, seed=0)
    try:
        assert plain.seconds(1) > 0
        plain.process.kill()
        with pytest.raises(UserError, match="the plain loop's process has ended"):
            plain.seconds(1)
    finally:
        plain.close()


def test_the_command(tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.05)
    words = ["bench", "train", "resnet8", "--data", "fashion-sample", "--batch", "16", "--rounds", "1", "--steps", "1"]
    code, text, _ = run_cli(*words, "--out", tmp_path / "speeds.json")
    assert code == 0 and "plain loop" in text and "limits: " in text
    (row,) = json.loads((tmp_path / "speeds.json").read_text())
    assert row["net"] == "resnet8" and f"reslearn, {row['machine']['execution']}" in text
    assert [speed["what"].split(",")[0] for speed in row["speeds"]] == ["plain loop", "reslearn"]
    assert row["speeds"][0]["ratio"] == 1 and all(speed["images_per_s"] > 0 for speed in row["speeds"])
    assert sum(row["shares"].values()) == pytest.approx(100, abs=0.3)
    assert 0 < row["share_of_matrix_peak"] < 100 and row["machine"]["execution"] in ("fused", "eager")
    assert row["limit"]["images_per_s_by_bytes"] > 0


def test_photos_are_rejected(photos: Path) -> None:
    with pytest.raises(UserError, match="bench train needs small images"):
        bench("resnet18", str(photos), **SHORT)
