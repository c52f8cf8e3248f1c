"""Checkpoints: atomic writes, detection of damage, full disks."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from reslearn import UserError
from reslearn.training import checkpoint
from reslearn.training.checkpoint import Checkpoint


def make(value: float = 1.0, size: int = 50) -> Checkpoint:
    return Checkpoint({"w": torch.full((size,), float(value))}, {"momentum.w": torch.arange(3.0)}, {"step": 1, "lr": 0.1}, {})


def test_round_trip_keeps_the_last_two(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, make(step))
    assert [p.name for p in checkpoint.find(tmp_path)] == ["step-00000020", "step-00000030"]
    saved = checkpoint.load(checkpoint.find(tmp_path)[-1])
    assert torch.equal(saved.model["w"], torch.full((50,), 30.0))
    assert torch.equal(saved.state["momentum.w"], torch.arange(3.0))
    assert saved.facts == {"step": 1, "lr": 0.1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"], "nothing temporary stays"


def test_there_is_no_pickle(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, make())
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.safetensors",
        "manifest.json",
        "model.safetensors",
        "state.json",
        "state.safetensors",
    ]


def test_flipped_bits_and_truncation_are_detected(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, make())
    chance, files = random.Random(0), sorted(folder.iterdir())
    for trial in range(400):
        file = chance.choice(files)
        whole = file.read_bytes()
        if trial % 2:
            spoiled = bytearray(whole)
            spoiled[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        else:
            spoiled = bytearray(whole[: chance.randrange(len(whole))])
        file.write_bytes(spoiled)
        if file.name == "manifest.json":  # its own white space and key order carry no meaning
            try:
                same = json.loads(spoiled) == json.loads(whole)
            except ValueError:
                same = False
            if same:
                file.write_bytes(whole)
                continue
        with pytest.raises(UserError) as caught:
            checkpoint.load(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        file.write_bytes(whole)
    checkpoint.load(folder)


@pytest.mark.parametrize("crash", ["save_file", "fsync", "rename"])
def test_a_failed_save_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str) -> None:
    checkpoint.save(tmp_path, 1, make(1))

    def die(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    target = {"save_file": (safetensors.torch, "save_file"), "fsync": (os, "fsync"), "rename": (Path, "rename")}[crash]
    monkeypatch.setattr(*target, die)
    with pytest.raises(UserError, match=r"the disk is full: cannot write .*step-00000002 \(0\.0 MB are needed\)"):
        checkpoint.save(tmp_path, 2, make(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load(tmp_path / "step-00000001").model["w"][0] == 1


def test_full_disk(small_disk: Path) -> None:
    checkpoint.save(small_disk, 1, make(1, 50_000))
    with pytest.raises(UserError, match=r"the disk is full: .* \(4\.0 MB are needed\)"):
        checkpoint.save(small_disk, 2, make(2, 1_000_000))
    assert [p.name for p in small_disk.iterdir()] == ["step-00000001"]
    assert checkpoint.load(small_disk / "step-00000001").model["w"][0] == 1


def test_read_only_disk(small_disk: Path) -> None:
    checkpoint.save(small_disk, 1, make(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="no permission, or the disk is read-only"):
        checkpoint.save(small_disk, 2, make(2))
    assert checkpoint.load(small_disk / "step-00000001").model["w"][0] == 1
