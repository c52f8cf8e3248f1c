"""Tasks by name, and a task of another package trained by the same core."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import toy_task
from command_line import RunCli
from reslearn import UserError, api, tasks, train
from reslearn.training import run, runtime
from reslearn.training.request import parse


def register(site: Path, name: str, target: str) -> None:
    """Create the metadata of an installed package with this entry point."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[reslearn.tasks]\n{name} = {target}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages: one with a task, two with tasks that cannot be imported."""
    register(tmp_path / "site", "brightness", "toy_task:BRIGHTNESS")
    register(tmp_path / "site", "broken", "package_that_is_not_there:TASK")
    register(tmp_path / "site", "renamed", "toy_task:NO_SUCH_TASK")
    monkeypatch.syspath_prepend(tmp_path / "site")
    tasks._known.cache_clear()
    yield tmp_path / "site"
    tasks._known.cache_clear()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 images of random brightness."""
    numbers = np.random.default_rng(0)
    images = numbers.random((40, 3, 8, 8)) * numbers.random((40, 1, 1, 1))
    np.save(tmp_path / "images.npy", images.astype(np.float32))
    return tmp_path / "images.npy"


SETTINGS = {"log.every": 1, "checkpoint.every": 2, "evaluate.every": 4, "schedule.lr": 0.02}


def test_a_task_of_another_package_is_found_by_name(site: Path) -> None:
    assert tasks.get("brightness") is toy_task.BRIGHTNESS
    assert {"classify", "detect", "localize", "brightness"} <= set(tasks.names())
    with pytest.raises(UserError, match=r"^no task 'brightnes'; did you mean 'brightness'\?$"):
        tasks.get("brightnes")
    for name, why in (("broken", "No module named 'package_that_is_not_there'"), ("renamed", "has no attribute 'NO_SUCH_TASK'")):
        with pytest.raises(UserError, match=f"task '{name}' .* cannot be imported: .*{why}"):
            tasks.get(name)


def test_it_trains_and_resumes_bit_for_bit(site: Path, data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    whole = train(data, task="brightness", settings=SETTINGS, out=tmp_path / "whole", quiet=True)
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0] and whole.result["last"]["val"]["n"] == 8
    assert not any("error" in line for line in lines), "the task does not count wrong images"
    assert whole.result["best"]["step"] in (4, 8) and whole.result["shown"] == "val"

    out = tmp_path / "stopped"
    loop = run.make_loop(run.begin(parse(data, task="brightness", settings=SETTINGS, out=out, quiet=True)))
    stop = runtime.Stop()
    with pytest.raises(run.Interrupted):
        for _ in loop.steps(stop):
            stop.number = signal.SIGINT if loop.state.progress.step == 5 else None
    assert [path.name for path in (out / "checkpoints").iterdir()][-1] and not (out / "model.safetensors").exists()
    code, printed, err = run_cli("train", "--resume", out)
    assert code == 0, err
    assert "result   held-out squared error" in printed and "report" not in printed, "there is no page for its numbers"
    assert (out / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_seeds_recipes_and_changed_data(site: Path, data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    request = parse(data, "brightness-quick", task="brightness", settings=SETTINGS, seed=3, out=tmp_path / "many", quiet=True)
    first, second = api.train_request_seeds(2, request)
    assert [first.folder.name, second.folder.name] == ["seed-3", "seed-4"]
    alone = train(data, task="brightness", settings=SETTINGS, seed=4, out=tmp_path / "alone", quiet=True)
    assert (second.folder / "model.safetensors").read_bytes() == (alone.folder / "model.safetensors").read_bytes()
    summary = json.loads((tmp_path / "many" / "seeds.json").read_text())
    assert summary["val"]["squared error"]["each"] == [100 * one.result["last"]["val"]["loss"] for one in (first, second)]

    listed = json.loads(run_cli("recipes", "--json").out)
    assert {"name": "brightness-quick", "task": "brightness", "summary": "Eight steps."} in listed

    (alone.folder / "result.json").unlink()
    np.save(data, np.zeros((40, 3, 8, 8), np.float32))
    assert f"the data set {data} has changed since {alone.folder} began" in run_cli("train", "--resume", alone.folder).err
