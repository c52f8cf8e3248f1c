"""Runs with several seeds: identical to single runs, and resumable after signals and kills."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boxed
from command_line import RunCli, start_reslearn
from reslearn import UserError, api, train
from reslearn.training import many
from reslearn.training.request import parse
from reslearn.training.run import Run, begin

SETTINGS = ["schedule.steps=6", "batch.size=8", "log.every=2", "data.val=4"]
BOXED = ["schedule.steps=2", "data.val=2", "detector.regions=8", "detector.anchors=[20]"]


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("boxes")
    return boxed.shapes(boxed.shapes(root, images=4, split="test"), images=6)


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights."""
    import safetensors.torch
    import torch

    a, b = (safetensors.torch.load_file(run / "model.safetensors") for run in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_each_seed_equals_a_single_run(images: Path, tmp_path: Path) -> None:
    runs = many.train_seeds(2, parse(images, model="resnet8", settings=SETTINGS, seed=4, out=tmp_path / "many", quiet=True))
    assert [each.folder.name for each in runs] == ["seed-4", "seed-5"]
    for seed, done in zip((4, 5), runs, strict=True):
        alone = train(images, model="resnet8", settings=SETTINGS, seed=seed, out=tmp_path / f"alone-{seed}", quiet=True)
        assert same(alone.folder, done.folder)
    assert not same(runs[0].folder, runs[1].folder)
    found = many.summary(runs)["test"]["error"]
    errors = [each.result["last"]["test"]["top1_error"] for each in runs]
    assert found["each"] == errors and found["mean"] == pytest.approx(np.mean(errors))
    assert found["std"] == pytest.approx(np.std(errors, ddof=1))
    assert many.summary(runs[:1])["test"]["error"] == {"each": errors[:1], "mean": errors[0], "std": None}


def test_undefined_values_have_no_mean() -> None:
    def one(ap: float | None, **more: Any) -> Run:
        numbers = {"AP": ap, "AP50": 3.0, "AP75": 1.0, "intervals": dict.fromkeys(("AP", "AP50", "AP75"))}
        return Run(Path("run"), "detect", {"last": {"step": 1, "test": numbers | more}})

    masks = one(2.0).result["last"]["test"]
    both = many.summary([one(4.0, masks=masks), one(None, masks=masks)])["test"]
    assert both["AP"] == {"each": [4.0, None], "mean": None, "std": None}
    assert both["AP50"] == {"each": [3.0, 3.0], "mean": 3.0, "std": 0.0} and both["mask AP"]["mean"] == 2.0
    assert "mask AP" not in many.summary([one(4.0, masks=masks), one(4.0)])["test"]


def test_detectors_with_several_seeds_equal_single_runs(boxes: Path, tmp_path: Path, run_cli: RunCli) -> None:
    out, recipe = tmp_path / "many", tmp_path / "mine.toml"
    recipe.write_text('base = "detect-default"\nseed = 3\n')  # where the seeds begin
    words = ["detect", "train", boxes, "--model", "resnet8", "--recipe", recipe, *(f"--set={each}" for each in BOXED)]
    code, printed, _ = run_cli(*words, "--seeds", 2, "--out", out, "--device", "cpu")
    assert code == 0 and not list(tmp_path.glob(".*"))
    results = []
    for seed in (3, 4):
        alone = train(
            boxes,
            recipe,
            model="resnet8",
            settings=BOXED,
            seed=seed,
            out=tmp_path / f"{seed}",
            device="cpu",
            quiet=True,
            task="detect",
        )
        assert same(alone.folder, out / f"seed-{seed}")
        results.append(json.loads((out / f"seed-{seed}" / "result.json").read_text()))
        assert results[-1]["last"] == json.loads((alone.folder / "result.json").read_text())["last"]
    assert not same(out / "seed-3", out / "seed-4")
    found, lines = json.loads((out / "seeds.json").read_text()), printed.splitlines()
    for split, title in (("val", "held-out"), ("test", "test")):
        for measure in ("AP", "AP50", "AP75"):
            values = [result["last"][split][measure] for result in results]
            mean, std = np.mean(values), np.std(values, ddof=1)
            assert found[split][measure] == {"each": values, "mean": pytest.approx(mean), "std": pytest.approx(std)}
            each = f"{values[0]:.2f}, {values[1]:.2f}; n=2 seeds"
            assert f"result   {title} {measure} {mean:.2f} +- {std:.2f}%  ({each})" in lines
    assert lines[-1] == f"report   {out / 'report.html'}"
    (out / "report.html").unlink()
    assert run_cli("report", out)[:2] == (0, f"{out / 'report.html'}\n")
    aps = [result["last"]["test"]["AP"] for result in results]
    said = f"Over 2 seeds of one recipe, the test AP is {np.mean(aps):.1f} ± {np.std(aps, ddof=1):.1f}%, AP50 is "
    assert said in (out / "report.html").read_text()


def test_concurrent_runs_equal_single_runs(images: Path, tmp_path: Path) -> None:
    steps = {1: 6, 2: 3, 3: 6}
    how = {seed: {"model": "resnet8", "settings": [*SETTINGS, f"schedule.steps={n}"], "seed": seed} for seed, n in steps.items()}
    jobs = [begin(parse(images, **how[seed], out=tmp_path / f"{seed}", device="cpu", quiet=True)) for seed in steps]
    for done, seed in zip(many.train_concurrently(jobs), steps, strict=True):
        assert done.folder.name == f"{seed}"
        alone = train(images, **how[seed], out=tmp_path / f"alone-{seed}", quiet=True)
        assert same(alone.folder, done.folder)


@pytest.mark.parametrize(("task", "sent"), [("classify", signal.SIGKILL), ("detect", signal.SIGINT)])
def test_interrupted_seeds_resume(
    task: str, sent: signal.Signals, images: Path, boxes: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out, command = tmp_path / "many", ["train"] if task == "classify" else ["detect", "train"]
    data, settings = (images, [*SETTINGS, "schedule.steps=40"]) if task == "classify" else (boxes, [*BOXED, "schedule.steps=20"])
    settings += ["log.every=1", "checkpoint.every=2"]
    words = [*command, str(data), "--model", "resnet8", "--seeds", "2", "--out", str(out), *(f"--set={each}" for each in settings)]
    process = start_reslearn(*words)
    while process.poll() is None and not list(out.glob("seed-0/checkpoints/step-*")):
        time.sleep(0.01)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    assert ("the run is saved; to resume it: reslearn train --resume" in said) == (sent == signal.SIGINT)
    assert (out / "seed-1" / "recipe.json").exists() and not (out / "seed-1" / "result.json").exists()
    done = run_cli(*command, "--resume", out)
    assert done.code == 0 and "n=2 seeds" in done.out, done.err
    assert len(json.loads((out / "seeds.json").read_text())["test"]) == (1 if task == "classify" else 3)
    assert (out / "report.html").exists()
    for seed in (0, 1):
        alone = train(data, model="resnet8", settings=settings, seed=seed, out=tmp_path / f"{seed}", quiet=True, task=task)
        assert same(alone.folder, out / f"seed-{seed}")


@pytest.mark.parametrize("command", [["train"], ["detect", "train"]])
def test_any_train_command_resumes_detectors(command: list[str], boxes: Path, tmp_path: Path, run_cli: RunCli) -> None:
    for seed in (0, 1):
        out = tmp_path / "many" / f"seed-{seed}"
        begin(parse(boxes, model="resnet8", settings=BOXED, seed=seed, out=out, device="cpu", quiet=True, task="detect"))
    code, out, _ = run_cli(*command, "--resume", tmp_path / "many")
    assert code == 0 and "result   held-out AP " in out and out.endswith(f"report   {tmp_path}/many/report.html\n")


def test_an_interrupt_while_opening_data_names_the_resume_command(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    def stop(*_: object) -> Run:
        raise KeyboardInterrupt

    begin(parse(images, model="resnet8", settings=SETTINGS, out=tmp_path / "many" / "seed-0", device="cpu", quiet=True))
    monkeypatch.setattr(many, "resume", stop)
    code, _, err = run_cli("train", "--resume", tmp_path / "many")
    assert code == 130 and err.endswith(f"the run is saved; to resume it: reslearn train --resume {tmp_path}/many\n")


@pytest.mark.parametrize("command", [["train"], ["detect", "train"]])
@pytest.mark.parametrize("words, said", [
    (["DATA", "--seeds", "0", "--out", "new"], "Invalid value for '--seeds'"),
    (["DATA", "--seeds", "-2", "--out", "new"], "Invalid value for '--seeds'"),
    (["DATA", "--seeds", "2"], "several seeds need a folder for their runs: set --out"),
    (["DATA", "--seeds", "2", "--out", "there"], "there already exists: resume its runs with --resume there"),
    (["DATA", "--seeds", "2", "--out", "new", "--seed", "2147483647", "--model", "resnet8"], "seed: must be less than"),
    (["--resume", "there", "--seeds", "2"], "--seeds cannot be combined with --resume: the recipe is that of the run"),
    (["DATA", "--resume", "there", "--seed", "0", "--set", "a=1"], "DATA, --set, --seed cannot be combined with --resume"),
    (["--seeds", "2", "--out", "new"], "DATA is missing: reslearn "),
])  # fmt: skip
def test_invalid_options_give_a_one_line_error(
    command: list[str], words: list[str], said: str, images: Path, boxes: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli,
) -> None:  # fmt: skip
    here = tmp_path / "here"
    (here / "there").mkdir(parents=True)
    monkeypatch.chdir(here)
    data = boxes if "detect" in command else images
    code, out, err = run_cli(*command, *(data if word == "DATA" else word for word in words))
    assert code == 2 and not out and err.startswith("reslearn: ") and said in err and err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["there"], "also where the first of the seeds could be begun"


@pytest.mark.parametrize("words", [["DATA", "--seeds", "2", "--out", "new"], ["--resume", "MANY"]])
@pytest.mark.parametrize("command", [["train"], ["detect", "train"]])
def test_several_seeds_reject_torchrun(
    command: list[str], words: list[str], images: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli,
) -> None:  # fmt: skip
    here = tmp_path / "here"
    begin(parse(images, model="resnet8", settings=SETTINGS, out=here / "many" / "seed-0", device="cpu", quiet=True))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCH_CPP_LOG_LEVEL", "ERROR")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(here)
    code, out, err = run_cli(*command, *({"DATA": images, "MANY": "many"}.get(word, word) for word in words))
    assert code == 2 and not out and err.endswith("several seeds do not support torchrun: start a single process\n")
    assert [path.name for path in here.iterdir()] == ["many"]


def test_the_python_functions_check_their_arguments(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="set --out"):
        api.train_request_seeds(2, parse(images))
    with pytest.raises(UserError, match="must be at least 1"):
        api.train_request_seeds(0, parse(images, out=tmp_path / "new"))
    with pytest.raises(UserError, match="has no runs of several seeds"):
        api.resume_seeds(tmp_path)
