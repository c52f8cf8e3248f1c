"""benchmarks/gpu_detection.py as a process, small and on the CPU: it runs to its end, and ours agrees with torchvision's."""

import json
from pathlib import Path

import boxed
from command_line import run_python

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_detection.py"
SMALL = "--device cpu --size 48 --images 2 --rounds 1 --steps 1 --batch 1 --regions 4 --workers 1 --minutes 60"
TRAIN = "--train 1 --train-batch 2"


def test_it_runs_to_its_end_and_ours_agrees(tmp_path: Path) -> None:
    boxed.shapes(tmp_path / "set", images=6)
    boxed.shapes(tmp_path / "set", images=2, split="test")
    words = [tmp_path / "set", *SMALL.split(), *TRAIN.split(), "--out", tmp_path / "out"]
    done = run_python("-W", "error::UserWarning", SCRIPT, *words)
    assert done.code == 0, done.out + done.err
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "machine", "versions"} <= set(found) and found["sizes"] == {"min_size": 48, "max_size": 80}
    assert [row["batch_norm"] for row in found["agreement"]] == ["live", "frozen"]
    for row in found["agreement"]:
        assert row["losses_agree"] and row["boxes_agree"] and row["boxes"]["torchvision"] > 10, row
        assert row["losses"]["loss_classifier"] > 0.1 and row["losses"]["gradient"] > 0
    assert [(row["kind"], row["batch_norm"]) for row in found["training"]] == [("fpn", "live"), ("fpn", "frozen"), ("c4", "live")]
    for row in found["training"]:
        base, ours, *_ = row["images_per_s"]
        assert "plain loop" in base and ours.startswith("reslearn") and row["ratio"][base] == 1 and row["ratio"][ours] > 0
        assert sum("reading" in what for what in row["images_per_s"]) == 2 and all(row["images_per_s"].values())
        assert f"BN {row['batch_norm']}, batch 1, 1 rounds" in done.out
    assert all(ms > 0 for row in found["inference"] for ms in row["ms_an_image"].values()) and len(found["inference"]) == 2
    assert [row["kind"] for row in found["trained"]] == ["fpn", "c4"]
    assert all(row["step"] == 1 and row["test"]["n"] == 2 for row in found["trained"])


def test_without_time_nothing_is_measured(tmp_path: Path) -> None:
    boxed.shapes(tmp_path / "set", images=2)
    code, said, _ = run_python(SCRIPT, tmp_path / "set", "--device", "cpu", "--minutes", 0, "--out", tmp_path / "out")
    assert code == 0 and said.count("left out for want of time") == 10
