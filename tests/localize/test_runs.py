"""Runs of localize that are stopped or killed, and go on: real processes and real signals."""

import json
import signal
import time
from pathlib import Path

import pytest

from command_line import start_python
from painted_sets import TINY
from reslearn import UserError
from reslearn.localize import resume, train
from reslearn.localize import run as runs

WORDS = ["--model", "resnet8", "--size", "32", "--jitter", "32,48", "--batch", "8", "--epochs", "1", "--device", "cpu"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_ends_with_the_same_weights(run: Path, shapes: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "stopped"
    child = start_python(
        "-c", f"from reslearn.localize import train; train({str(shapes)!r}, {str(out)!r}, device='cpu', **{TINY!r})"
    )
    until = time.monotonic() + 240
    while len(list((out / "checkpoints").glob("step-*"))) < 2 and child.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    child.send_signal(number)
    said = child.communicate(timeout=120)[1]
    assert child.returncode != 0 and not (out / "model.safetensors").exists(), said
    if number == signal.SIGTERM:
        assert "SIGTERM" in said
    resume(out, device="cpu", say=lambda line: None)
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert (out / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


IN_THE_LAST_TEST = """
import importlib, os, signal, sys
from reslearn import cli
module = importlib.import_module("reslearn.localize.train")
test = module.evaluate
def stopped(*given, **named):
    os.kill(os.getpid(), signal.SIGINT)
    return test(*given, **named)
module.evaluate = stopped
sys.argv = {words!r}
cli.main()
"""


def test_ctrl_c_in_the_last_test(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    words = ["reslearn", "localize", "train", str(shapes), "--out", str(out), *WORDS]
    child = start_python("-c", IN_THE_LAST_TEST.format(words=words))
    said = child.communicate(timeout=240)[1]
    assert child.returncode == 130, said
    assert f"stopped by SIGINT; the run is saved, and reslearn localize train --resume '{out}' goes on" in said
    assert "Traceback" not in said and not (out / "result.json").exists()
    log = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").unlink()  # as if killed between the checkpoint and it
    result = resume(out, device="cpu", say=lambda line: None)
    assert (out / "metrics.jsonl").read_text() == log and len(list((out / "checkpoints").iterdir())) == 1
    assert result["step"] == 8 and result["test"]["n"] == 30 and (out / "model.safetensors").exists()


KILLED_AS_IT_BEGINS = """
import os, signal
from reslearn.localize import run, train
def killed(path, text):
    os.kill(os.getpid(), signal.SIGKILL)
run.write_text = killed
train({shapes!r}, {out!r}, device="cpu", **{plan!r})
"""


def test_a_run_that_is_killed_as_it_begins_is_not_there(shapes: Path, tmp_path: Path) -> None:
    """Between the first checkpoint and localize.json; the same command, into an empty folder even, begins it anew."""
    out, plan = tmp_path / "killed", {**TINY, "schedule": {**TINY["schedule"], "epochs": 1}}
    out.mkdir()
    child = start_python("-c", KILLED_AS_IT_BEGINS.format(shapes=str(shapes), out=str(out), plan=plan))
    child.communicate(timeout=240)
    assert child.returncode == -signal.SIGKILL and (tmp_path / ".killed.partial" / "checkpoints").exists()
    assert not list(out.iterdir())
    assert train(shapes, out, device="cpu", say=lambda line: None, **plan)["step"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]


def test_a_run_is_of_its_data_and_its_command(run: Path, tmp_path: Path) -> None:
    facts = json.loads((run / "localize.json").read_text())
    for change, said in (
        ({"fingerprint": "0"}, "is not the data that"),
        ({"plan": 3}, "is damaged"),
        ({"command": "refine"}, "is a run of localize refine: reslearn localize refine --resume"),
    ):
        (tmp_path / "localize.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match=said):
            resume(tmp_path)
    with pytest.raises(UserError, match="is there already: give a new folder"):
        runs.check_new(run)
