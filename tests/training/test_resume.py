"""Interrupted and killed runs, in real processes, end with the same weights as uninterrupted ones."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from command_line import run_python, start_reslearn

ROOT = Path(__file__).parents[2]


def test_a_run_killed_at_a_random_moment_ends_bit_for_bit_the_same() -> None:
    """One of the benchmark's three settings each time."""
    script = ROOT / "benchmarks" / "kill_and_resume.py"
    done = run_python(script, "--runs", 1, "--seed", os.getpid())
    assert done.code == 0, done.out + done.err
    assert done.out.endswith("1 of 1 identical\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_within_a_step(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    process = start_reslearn("train", "fashion-sample", "--model", "resnet8", "--out", run, "--set", "log.every=1")
    metrics = run / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.count("\n") == 1 and "the run is saved" in err
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name == f"step-{last:08d}", "no step was lost"
