"""Fine-tuning: same and other classes, frozen stages, deepened models."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import reslearn
from drawing import draw_images
from reslearn import UserError
from reslearn.weights.deepened import deepen_model

QUICK = ["schedule.steps=8", "batch.size=8", "log.every=1", "schedule.warmup=0"]


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, data): a trained resnet8 with two classes."""
    folder = tmp_path_factory.mktemp("shallow")
    data = draw_images(folder / "data", each=40)
    settings = ["schedule.epochs=8", "batch.size=8", "loss.label_smoothing=0"]
    return reslearn.train(data, model="resnet8", settings=settings, out=folder / "run", quiet=True).folder, data


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "train"]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path / "model.safetensors" if path.is_dir() else path)


def test_a_deepened_net_starts_with_the_loss_of_the_shallow_one(shallow: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = shallow
    deep = deepen_model(run, "resnet20", tmp_path / "deep.safetensors").path
    settings = [*QUICK, "schedule.lr=0.001", "loss.label_smoothing=0", "precision=fp32"]
    starts = [
        losses(reslearn.train(data, settings=settings, init=init, out=tmp_path / name, quiet=True).folder)[0]
        for name, init in (("a", run), ("b", deep))
    ]
    assert starts[0] == pytest.approx(starts[1], rel=1e-5)
    fresh = reslearn.train(data, model="resnet20", settings=settings, out=tmp_path / "c", quiet=True).folder
    assert starts[1] < 0.5 * losses(fresh)[0]


def test_the_preprocessing_of_the_model_is_reused(shallow: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = shallow
    tuned = reslearn.load(reslearn.train(data, settings=QUICK, init=run, out=tmp_path / "t", quiet=True).folder)
    assert tuned.card.net == "resnet8" and tuned.card.preprocessing == reslearn.load(run).card.preprocessing


def test_other_classes_get_a_new_last_layer(shallow: tuple[Path, Path], tmp_path: Path) -> None:
    data = draw_images(tmp_path / "three", classes="xyz", size=(20, 20), mode="L")
    settings = [*QUICK, "net.frozen=4"]
    tuned = reslearn.train(data, settings=settings, init=shallow[0], out=tmp_path / "t", quiet=True).folder
    before, after = weights(shallow[0]), weights(tuned)
    assert after["fc.weight"].shape == (3, 64)
    changed = [name for name in before if not name.startswith("fc") and not torch.equal(before[name], after[name])]
    assert not changed, "all stages are frozen: their weights and BN statistics stay, and gray images are fed as color"


def test_frozen_stages_do_not_change(shallow: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = shallow
    settings = [*QUICK, "net.frozen=2", "ema=0.5"]
    tuned = weights(reslearn.train(data, settings=settings, init=run, out=tmp_path / "t", quiet=True).folder)
    before = weights(run)
    same = {name.split(".")[0] for name in before if torch.equal(before[name], tuned[name])}
    assert {"conv1", "bn1", "layer1"} <= same and "layer2" not in {n.split(".")[0] for n in same}


def test_backbone_lr_slows_the_backbone(shallow: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = shallow
    moved = {}
    for share in (1.0, 0.01):
        settings = [*QUICK, f"optimizer.backbone_lr={share}", "optimizer.weight_decay=0"]
        tuned = weights(reslearn.train(data, settings=settings, init=run, out=tmp_path / f"{share}", quiet=True).folder)
        moved[share] = (tuned["conv1.weight"] - weights(run)["conv1.weight"]).norm().item()
    assert moved[0.01] < 0.1 * moved[1.0]


def test_a_fine_tuning_resumes_bit_for_bit(shallow: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = shallow
    settings = [*QUICK, "net.frozen=2", "optimizer.backbone_lr=0.1", "optimizer.style=caffe", "checkpoint.every=3"]
    whole = reslearn.train(data, settings=settings, init=run, out=tmp_path / "whole", quiet=True).folder
    part = reslearn.train(data, settings=settings, init=run, out=tmp_path / "part", quiet=True).folder
    for name in ("result.json", "model.safetensors", "best.safetensors"):
        (part / name).unlink()
    last = sorted((part / "checkpoints").iterdir())[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    reslearn.resume(part, quiet=True)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        ([], "resnet20", "is a resnet8, not a resnet20"),
        (["net.name=resnet14"], None, "is a resnet8, not a resnet14: leave out the network name"),
        (["net.frozen=9"], None, "has a stem and 3 stages"),
    ],
)
def test_mismatches_are_reported(shallow: tuple[Path, Path], settings: list[str], model: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        reslearn.train(
            shallow[1], model=model, settings=[*QUICK, *settings], init=shallow[0], out=shallow[0].parent / "no", quiet=True
        )


@pytest.mark.parametrize("setting", ["net.frozen=1", "optimizer.backbone_lr=0.1"])
def test_fine_tuning_options_need_init(shallow: tuple[Path, Path], setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs (net\.)?init"):
        reslearn.train(shallow[1], model="resnet8", settings=[setting], out=tmp_path / "no", quiet=True)
