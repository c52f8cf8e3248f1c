"""Several seeds: each run is what it is alone, one after the other or side by side; interrupted ones go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import boxed
from reslearn import UserError, cli, train
from reslearn.training import many
from reslearn.training.run import begin

SETTINGS = ["schedule.steps=6", "batch.size=8", "log.every=2", "data.val=4"]


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights; the command that began them may differ."""
    import safetensors.torch
    import torch

    a, b = (safetensors.torch.load_file(run / "model.safetensors") for run in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_each_seed_is_what_it_is_alone(images: Path, tmp_path: Path) -> None:
    runs = many.train_seeds(2, images, "resnet8", settings=SETTINGS, seed=4, out=tmp_path / "many", quiet=True)
    assert [run.folder.name for run in runs] == ["seed-4", "seed-5"]
    for seed, run in zip((4, 5), runs, strict=True):
        alone = train(images, "resnet8", settings=SETTINGS, seed=seed, out=tmp_path / f"alone-{seed}", quiet=True)
        assert same(alone.folder, run.folder)
    assert not same(runs[0].folder, runs[1].folder)
    found = many.summary(runs)
    errors = [run.result["last"]["test"]["top1_error"] for run in runs]
    assert found["test"]["errors"] == errors and found["test"]["mean"] == sum(errors) / 2


def test_side_by_side_is_as_alone(images: Path, tmp_path: Path) -> None:
    jobs = [
        begin(images, "resnet8", None, [*SETTINGS, f"schedule.steps={steps}"], seed, tmp_path / f"{seed}", "cpu", True, None)
        for seed, steps in ((1, 6), (2, 3), (3, 6))
    ]
    for run, job in zip(many.side_by_side(jobs), jobs, strict=True):
        settings = [*SETTINGS, f"schedule.steps={job.ready.recipe.schedule.steps}"]
        alone = train(
            images, "resnet8", settings=settings, seed=job.ready.recipe.seed, out=tmp_path / f"alone-{run.folder.name}", quiet=True
        )
        assert same(alone.folder, run.folder)


def test_interrupted_seeds_go_on(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "many"
    words = ["train", str(images), "--model", "resnet8", "--seeds", "2", "--out", str(out)]
    words += [f"--set={s}" for s in ("schedule.steps=40", "batch.size=8", "log.every=1", "data.val=4")]
    one_thread: dict[str, Any] = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "reslearn", *words], stderr=subprocess.PIPE, **one_thread)
    while process.poll() is None and not (out / "seed-0" / "metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the run is saved" in said
    assert (out / "seed-1" / "recipe.json").exists() and not (out / "seed-1" / "result.json").exists()
    again = [sys.executable, "-m", "reslearn", "train", "--resume", str(out)]
    done = subprocess.run(again, capture_output=True, **one_thread)
    assert done.returncode == 0 and "n=2 seeds" in done.stdout, done.stderr
    assert len(json.loads((out / "seeds.json").read_text())["test"]["errors"]) == 2 and (out / "report.html").exists()
    alone = train(images, "resnet8", settings=[w.removeprefix("--set=") for w in words[8:]], out=tmp_path / "alone", quiet=True)
    assert same(alone.folder, out / "seed-0")


@pytest.mark.parametrize("command", [["train"], ["detect", "train"]])
def test_detectors_of_several_seeds_go_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of them, as experiments leave it, whichever of the commands goes on with it."""
    data = boxed.shapes(boxed.shapes(tmp_path / "set", images=4, split="test"), images=6)
    settings = ["schedule.steps=2", "data.val=2", "detector.regions=8", "detector.anchors=[20]"]
    for seed in (0, 1):
        begin(data, "resnet8", None, settings, seed, tmp_path / "many" / f"seed-{seed}", "cpu", True, None, "detect")
    monkeypatch.setattr(sys, "argv", ["reslearn", *command, "--resume", str(tmp_path / "many")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out = capsys.readouterr().out
    assert not left.value.code and "result   held-out AP " in out and out.endswith(f"report   {tmp_path}/many/report.html\n")
    results = [json.loads((tmp_path / "many" / f"seed-{seed}" / "result.json").read_text()) for seed in (0, 1)]
    found = json.loads((tmp_path / "many" / "seeds.json").read_text())
    for split in ("val", "test"):
        values = [result["last"][split]["AP"] for result in results]
        assert found[split]["AP"] == values and found[split]["mean"] == pytest.approx(sum(values) / 2)
    assert "errors" not in found["test"]


def test_what_cannot_be_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say where with --out"):
        many.train_seeds(2, images)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists: continue its runs with --resume"):
        many.train_seeds(2, images, out=tmp_path / "there")
    with pytest.raises(UserError, match="must be at least 1"):
        many.train_seeds(0, images, out=tmp_path / "new")
