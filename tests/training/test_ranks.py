"""Distributed training in real processes, started by torchrun or with its environment variables."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import TORCHRUN, RunCli, run_python, start_reslearn
from drawing import draw_images
from ranked import CASES, STEPS, everything
from reslearn import UserError
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.data.sampling import SampleOrder, checksum
from reslearn.training import many, ranks
from reslearn.training.folder import begun
from reslearn.training.recipe import validate
from reslearn.training.request import parse
from reslearn.training.run import prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, kernels: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results of one rank, and of each of two."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "reslearn").mkdir()
    (folder / "reslearn" / "kernels").symlink_to(kernels)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        done = run_python(*TORCHRUN, ROOT / "tests" / "ranked.py", folder / "out")
        assert done.code == 0, done.err[-3000:]
        assert "arning" not in done.err, done.err
        alone = json.loads(json.dumps(everything()))
    torch.use_deterministic_algorithms(deterministic)
    return alone, [json.loads((folder / f"out.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_on_the_samples_of_one_and_hold_equal_states(found: Any, case: str) -> None:
    one, (a, b) = found[0]["train"][case], (part["train"][case] for part in found[1])
    assert [x + y for x, y in zip(a["seen"], b["seen"], strict=True)] == one["seen"], "the same pixels in the same order"
    assert a["stream"] == b["stream"] == one["stream"] != 0
    assert a["state"] == b["state"], "bit for bit"
    assert a["losses"] == b["losses"] and a["wrong"] == b["wrong"]
    assert max(abs(x - y) for x, y in zip(a["losses"], one["losses"], strict=True)) < 1e-4
    assert len(one["losses"]) == STEPS and one["losses"][-1] != one["losses"][0]


def test_synchronized_bn_equals_bn_over_the_whole_batch(found: Any) -> None:
    one, (first, second) = found[0]["bn"], (part["bn"] for part in found[1])
    close = {"rtol": 1e-9, "atol": 1e-9}
    for key in ("y", "x"):
        torch.testing.assert_close(torch.tensor(first[key] + second[key]), torch.tensor(one[key]), **close)
    for key in range(2):
        torch.testing.assert_close(torch.tensor(first["gradients"][key]), torch.tensor(one["gradients"][key]), **close)
    for name, value in one["statistics"].items():
        torch.testing.assert_close(torch.tensor(first["statistics"][name]), torch.tensor(value), **close)
    assert first["statistics"] == second["statistics"]


@pytest.mark.parametrize("size", ["103 by 25", "10 by 25"])
def test_each_image_is_evaluated_once(found: Any, size: str) -> None:
    one, (first, second) = found[0]["evaluate"][size], (part["evaluate"][size] for part in found[1])
    for key in ("logits", "labels", "indices", "bad", "holes"):
        assert first[key] == second[key] == one[key]
    assert len(one["labels"]) == int(size.split()[0]) - 1, "all but the one that cannot be read"
    assert first["calls"] == second["calls"] and first["calls"][-1] == one["calls"][-1]


def test_ranks_agree(found: Any) -> None:
    assert found[0]["agreed"] == [0, 5, [0]]
    assert found[1][0]["agreed"] == found[1][1]["agreed"] == [7, 5, [0, 1]]


def test_the_checksum_depends_on_order_and_is_additive() -> None:
    epochs, indices = SampleOrder(0, 10, 8)[1]
    whole = checksum(8, epochs, indices)
    assert (checksum(8, epochs[:3], indices[:3]) + checksum(11, epochs[3:], indices[3:])) % 2**32 == whole
    assert whole != checksum(8, epochs, indices.flip(0)) != checksum(8, epochs + 1, indices)
    assert whole != checksum(9, epochs, indices)


def start(arguments: list[str]) -> list[subprocess.Popen[str]]:
    """Start training on two ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    each = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [start_reslearn("train", *arguments, env=environment) for environment in each]


def finish(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and errors."""
    texts = [process.communicate(timeout=300) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in texts], [error for _, error in texts]


def weights(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("model.safetensors", "best.safetensors")]


def progress(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in (file.read_text() if file.exists() else "").splitlines(True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


SETTINGS = ["schedule.steps=24", "schedule.lr=0.02", "batch.size=8", "ema=0.9", "log.every=1", "checkpoint.every=1000"]


def test_a_signal_to_any_rank_stops_all_ranks_and_the_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = str(draw_images(tmp_path / "images", each=40))
    arguments = [data, "--model", "resnet8", "--device", "cpu", *(f"--set={setting}" for setting in SETTINGS)]
    whole, run = tmp_path / "whole", tmp_path / "run"
    codes, outputs, errors = finish(start([*arguments, "--out", str(whole)]))
    assert codes == [0, 0], errors
    assert "2 ranks, cpu" in outputs[0] and "report" in outputs[0] and outputs[1] == "", "one rank speaks"
    metrics = run / "metrics.jsonl"
    for number, code, to, step in ((signal.SIGTERM, 143, (1,), 3), (signal.SIGINT, 130, (0, 1), 10)):
        resumed = run.exists()
        processes = start(["--resume", str(run)] if resumed else [*arguments, "--out", str(run)])
        while all(p.poll() is None for p in processes) and (not metrics.exists() or len(metrics.read_text().splitlines()) < step):
            time.sleep(0.005)
        for rank in to:
            processes[rank].send_signal(number)
        codes, _, errors = finish(processes)
        assert codes == [code, code], errors
        assert errors[0].count("\n") == 1 and "the run is saved" in errors[0] and errors[1] == "", "one rank speaks"
        last = progress(run)[-1]["step"]
        assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == f"step-{last:08d}", "no step was lost"
    assert last < 24, "stopped before its end"
    codes, _, errors = finish(start(["--resume", str(run)]))
    assert codes == [0, 0], errors
    assert weights(run) == weights(whole) and progress(run) == progress(whole)
    assert not list(run.glob("**/.*partial*"))
    recorded = json.loads((run / "recipe.json").read_text())
    assert recorded["machine"]["ranks"] == 2 and "job" not in recorded


def test_a_killed_rank_ends_the_job_and_the_run_resumes_bit_for_bit() -> None:
    script = ROOT / "benchmarks" / "kill_a_rank.py"
    done = run_python(script, "--runs", 1, "--seed", os.getpid())
    assert done.code == 0, done.out + done.err
    assert done.out.endswith("1 of 1 identical\n")


WAITING = """
import time
from datetime import timedelta
from reslearn.training import ranks
ranks.ANSWER = timedelta(seconds=1.5)
with ranks.joined("cpu"):
    for slow in (0, 1):
        if ranks.rank() == slow:
            time.sleep(4)
        began = time.monotonic()
        try:
            ranks.wait(ranks.WRITING, others=ranks.ANSWER)
            print(f"{slow} was slow: here", flush=True)
        except RuntimeError:
            print(f"{slow} was slow: left after {time.monotonic() - began:.0f}", flush=True)
    time.sleep(5)
"""


def test_ranks_wait_longer_for_rank_0_than_rank_0_for_them() -> None:
    lines = run_python(*TORCHRUN, "--tee", 3, "--no-python", sys.executable, "-c", WAITING).out.splitlines()
    for said in ("[default0]:0 was slow: here", "[default1]:0 was slow: here", "[default0]:1 was slow: left after 2"):
        assert said in lines, lines


def recipe(**values: Any) -> ClassifyRecipe:
    return validate({"net": {"name": "resnet8"}, "schedule": {"steps": 2}} | values, ClassifyRecipe)


def test_unsupported_options_are_rejected(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 3)
    with pytest.raises(UserError, match=r"batch.size=128 cannot be divided among 3 ranks: set a multiple of 3$"):
        ranks.check(recipe())
    with pytest.raises(UserError, match=r"among 3 ranks with batch.micro=16: set a multiple of 48"):
        ranks.check(recipe(batch={"size": 96 - 48 + 16, "micro": 16}))
    ranks.check(recipe(batch={"size": 96, "micro": 16}))
    with pytest.raises(UserError, match="class_weights=auto"):
        prepare(parse(images, model="resnet8", settings={"batch.size": 96, "loss.class_weights": "auto"}, quiet=True))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="several seeds do not support torchrun"):
        many.train_seeds(2, parse("fashion-sample", out="nowhere"))
    with pytest.raises(UserError, match="each rank needs its own GPU; use --device cuda"):
        ranks.own_device(torch.device("cuda:1"))
    with pytest.raises(UserError, match="does not support mps"):
        ranks.own_device(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="no GPU for rank 1 of this host: start at most one rank per GPU, --nproc-per-node 1"):
        ranks.own_device(torch.device("cuda"))
    assert ranks.own_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("command", ["models", "detect eval"])
def test_other_commands_reject_torchrun(command: str, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        monkeypatch.setenv(name, value)
    done = run_cli(*command.split(), *(["a", "b"] if " " in command else []))
    assert done.code == 2 and done.err == f"reslearn: {command} does not support torchrun: start it as a single process\n"


def test_a_restarted_job_resumes_only_its_own_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Path) -> None:
    from reslearn import train

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    run = train(
        images, model="resnet8", settings=["schedule.steps=2", "batch.size=4"], out=tmp_path / "run", quiet=True, device="cpu"
    )
    assert begun(run.folder) is None, "nothing has been restarted"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(UserError, match="set --out"):
        begun(None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begun(run.folder) == run.folder
    assert begun(tmp_path / "other") is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert begun(run.folder) is None
