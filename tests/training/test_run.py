"""Whole runs in this process."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import reslearn
from drawing import draw_images
from reslearn.training import checkpoint

QUICK = ["schedule.steps=6", "batch.size=8", "log.every=2"]


def weights(run: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / name)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["images", "photos"])
def test_workers_and_checkpoints_do_not_change_the_weights(kind: str, tmp_path: Path) -> None:
    data = draw_images(tmp_path / "d", size=(16, 16) if kind == "images" else (70, 90))
    settings = [*QUICK, *(["data.size=32"] if kind == "photos" else [])]
    ways = {"0": ["data.workers=0"], "2": ["data.workers=2", "checkpoint.every=1"], "off": ["log.every=1"]}
    if kind == "photos":
        ways["off"] += ["data.cache=off", "data.workers=1"]
    runs = [
        reslearn.train(data, model="resnet8", settings=[*settings, *way], out=tmp_path / name, quiet=True).folder
        for name, way in ways.items()
    ]
    first = weights(runs[0])
    for run in runs[1:]:
        assert all(torch.equal(first[name], tensor) for name, tensor in weights(run).items())


def test_a_finished_run_keeps_only_its_last_checkpoint(images: Path, tmp_path: Path) -> None:
    run = reslearn.train(images, model="resnet8", settings=[*QUICK, "checkpoint.every=2"], out=tmp_path / "run", quiet=True).folder
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]


def test_the_seed_determines_the_weights(images: Path, tmp_path: Path) -> None:
    runs = [
        reslearn.train(images, model="resnet8", settings=QUICK, seed=seed, out=tmp_path / f"{i}", quiet=True).folder
        for i, seed in enumerate((1, 1, 2))
    ]
    assert (runs[0] / "model.safetensors").read_bytes() == (runs[1] / "model.safetensors").read_bytes()
    assert not torch.equal(weights(runs[0])["fc.weight"], weights(runs[2])["fc.weight"])


def test_the_best_weights_are_saved_with_the_last(images: Path, tmp_path: Path) -> None:
    settings = ["schedule.steps=30", "batch.size=8", "evaluate.every=3", "schedule.lr=0.3", "ema=0.5"]
    run = reslearn.train(images, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True)
    held_out = {line["step"]: (line["top1_error"], line["loss"]) for line in lines(run.folder) if line["event"] == "eval"}
    assert list(held_out) == list(range(3, 31, 3))
    best = min(held_out, key=lambda step: held_out[step])
    assert run.result["best"]["step"] == best and run.result["last"]["step"] == 30
    assert run.result["best"]["val"]["top1_error"] == pytest.approx(held_out[best][0])
    assert reslearn.load(run.folder / "best.safetensors").card.metrics["val"]["n"] == 2


def test_the_training_error_ends_the_warm_up(images: Path, tmp_path: Path) -> None:
    settings = ["schedule.shape=steps", "schedule.warmup=0", "schedule.warmup_lr=0.001", "schedule.warmup_until=99"]
    settings += ["schedule.steps=102", "batch.size=4", "log.every=1", "data.test=0", "data.val=0"]
    run = reslearn.train(images, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True).folder
    rates = [line["lr"] for line in lines(run) if line["event"] == "train"]
    lr = json.loads((run / "recipe.json").read_text())["recipe"]["schedule"]["lr"]
    assert rates == [0.001] * 100 + [lr] * 2
    assert checkpoint.load(checkpoint.find(run / "checkpoints")[-1]).facts["warmup_ended"] == 100


def test_tensorboard_gets_the_same_numbers(images: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = [*QUICK, "log.tensorboard=true"]
    run = reslearn.train(images, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True).folder
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    got = [(e.step, e.value) for e in events.Scalars("train/loss")]
    expected = [(line["step"], line["loss"]) for line in lines(run) if line["event"] == "train"]
    assert got == [(step, pytest.approx(loss)) for step, loss in expected]


def test_the_imagenet_sample_trains_evaluates_and_predicts(real_data: Path, tmp_path: Path) -> None:
    """200 classes of one photo each, of real sizes and qualities."""
    data = real_data / "imagenet-sample"
    settings = ["schedule.steps=2", "data.size=64", "batch.size=8"]
    run = reslearn.train(data, model="resnet18", settings=settings, out=tmp_path / "run", quiet=True)
    assert run.result["last"]["train"]["n"] == 200
    assert reslearn.evaluate(run.folder, data)["n"] == 200
    (prediction,) = reslearn.predict(reslearn.load(run.folder), next(data.glob("*/*.jpg")))
    assert len(prediction.classes) == 5


def test_cifar10_from_png_folders_is_the_same_data(real_data: Path, tmp_path: Path) -> None:
    from PIL import Image

    from reslearn import data

    official = data.open("cifar10")
    split = official.splits["test"].take(range(2000))
    for i, (pixels, label) in enumerate(zip(split.pixels, split.labels, strict=True)):
        path = tmp_path / "test" / official.classes[label] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, compress_level=0)
    folder = data.open(tmp_path)
    part = data.DataSet("part", official.classes, 3, {"test": split}, {}, (32, 32))
    assert folder.resident and folder.classes == official.classes
    assert folder.fingerprint() == part.fingerprint() != official.fingerprint()
