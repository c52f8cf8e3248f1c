"""Runs stopped or killed by real signals, and resumed."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from command_line import RunCli, run_python, start_python
from painted_sets import TINY, in_python, lines, train
from reslearn import UserError, resume

SHORT = {**TINY, "schedule.epochs": 1}


def stop(code: str, out: Path, number: signal.Signals, checkpoints: int = 2, delay: float = 0.0) -> str:
    """Runs code that trains into a folder and stops it after some checkpoints. Returns its standard error."""
    child = start_python("-c", code)
    until = time.monotonic() + 240
    wanted = f"step-{checkpoints * TINY['checkpoint.every']:08d}"
    while not (out / "checkpoints" / wanted).exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(delay)
    child.send_signal(number)
    said = child.communicate(timeout=120)[1]
    assert child.returncode != 0 and not (out / "result.json").exists(), said
    return said


def assert_same(one: Path, other: Path) -> None:
    """Asserts that two runs have equal files, except for times."""
    for name in ("model.safetensors", "best.safetensors", "images/examples.jpg"):
        assert (one / name).exists() == (other / name).exists()
        assert not (one / name).exists() or (one / name).read_bytes() == (other / name).read_bytes(), name
    assert lines(one) == lines(other)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert all(results[0].get(key) == results[1].get(key) for key in ("step", "last", "best", "gallery"))


@pytest.mark.parametrize(
    ("number", "checkpoints", "delay"),
    [
        (signal.SIGKILL, 9, 0.02),
        (signal.SIGTERM, 2, 0.0),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(
    run: Path, shapes: Path, tmp_path: Path, number: signal.Signals, checkpoints: int, delay: float
) -> None:
    out = tmp_path / "stopped"
    said = stop(in_python(shapes, out), out, number, checkpoints, delay)
    assert number == signal.SIGKILL or number.name in said
    resume(out, device="cpu", quiet=True)
    assert_same(run, out)


STOPPED_IN_FINAL_EVALUATION = """
import os, signal, sys
from reslearn import cli
from reslearn.localize.task import Localization
evaluate = Localization.evaluate
def stopped(*given, **named):
    assert given[-1].full
    os.kill(os.getpid(), signal.SIGINT)
    return evaluate(*given, **named)
Localization.evaluate = stopped
sys.argv = {words!r}
cli.main()
"""


def test_ctrl_c_in_the_final_evaluation(shapes: Path, tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "a run"
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={json.dumps(value)}".replace('"', ""))]
    words = ["reslearn", "localize", "train", str(shapes), "--out", str(out), "--device", "cpu", *settings]
    said = run_python("-c", STOPPED_IN_FINAL_EVALUATION.format(words=words))
    assert said.code == 130, said.err
    assert f"stopped by SIGINT; the run is saved; to resume it: reslearn train --resume '{out}'" in said.err
    assert "Traceback" not in said.err and not (out / "result.json").exists()
    log = (out / "metrics.jsonl").read_text()
    done = run_cli("train", "--resume", out, "--device", "cpu")  # works for any task
    assert done.code == 0 and "result   test localization error, true class given, dense" in done.out, done.err
    assert (out / "metrics.jsonl").read_text() == log and len(list((out / "checkpoints").iterdir())) == 1
    result = json.loads((out / "result.json").read_text())
    assert result["step"] == 8 and result["last"]["test"]["n"] == 30 and (out / "model.safetensors").exists()
    assert "is complete: nothing to resume" in run_cli("localize", "train", "--resume", out).out


KILLED_AT_START = """
import os, signal
from reslearn.training import run
def killed(path, text):
    os.kill(os.getpid(), signal.SIGKILL)
run.write_text = killed
"""


def test_a_run_killed_at_start_leaves_nothing(shapes: Path, tmp_path: Path) -> None:
    """The same command starts again, also with an existing empty folder."""
    out = tmp_path / "killed"
    out.mkdir()
    child = run_python("-c", KILLED_AT_START + in_python(shapes, out, SHORT))
    assert child.code == -signal.SIGKILL and not list(out.iterdir())
    assert train(shapes, out, SHORT).result["step"] == 8
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["killed"]


def test_changed_data_or_a_damaged_recipe_is_rejected(run: Path, shapes: Path, tmp_path: Path) -> None:
    facts = json.loads((run / "recipe.json").read_text())
    for change, message in (
        ({"data": facts["data"] | {"fingerprint": "0"}}, "has changed since"),
        ({"recipe": 3}, "is damaged"),
        ({"preprocessing": {}}, r"is damaged \(preprocessing\)"),
        ({"task": "locate"}, "no task 'locate'; did you mean 'localize'"),
    ):
        (tmp_path / "recipe.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match=message):
            resume(tmp_path)
    with pytest.raises(UserError, match="already contains a run: resume it with --resume"):
        train(shapes, run)
    copy, out = tmp_path / "set", tmp_path / "run"
    shutil.copytree(shapes, copy)
    stop(in_python(copy, out), out, signal.SIGTERM)
    file = copy / "test" / "_annotations.coco.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="has changed since"):
        resume(out)
