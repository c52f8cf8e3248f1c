"""The ImageNet recipes on small generated photos: jitter, color noise, progressive resizing, plateaus, precise BN."""

import json
from pathlib import Path

import pytest
import torch

import reslearn
from reslearn.data.augment import Draws, color_noise
from reslearn.data.images.stream import Photos
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.nets.resnet import ResNet
from reslearn.training.run import Run
from reslearn.weights.store import load

SMALL = ["data.size=32", "schedule.steps=4", "batch.size=8", "log.every=1", "data.workers=0"]
OWN = {
    "imagenet-paper": ["data.jitter=[36,60]", "batch.micro=4", "precise_bn=3"],
    "imagenet-classic": [],
    "imagenet-fast": ["data.grow=[32,64]"],
}


def train(photos: Path, out: Path, recipe: str, *more: str) -> Run:
    return reslearn.train(photos, recipe, model="resnet18", settings=[*SMALL, *OWN[recipe], *more], out=out, quiet=True)


@pytest.mark.parametrize("recipe", OWN)
def test_each_recipe_trains_on_any_folder(photos: Path, tmp_path: Path, recipe: str) -> None:
    run = train(photos, tmp_path / "run", recipe)
    assert run.result["step"] == 4 and run.result["last"]["test"]["n"] == 4
    assert reslearn.evaluate(run.folder, photos)["top1_error"] == run.result["last"]["test"]["top1_error"]


def test_precise_bn_averages_over_the_batches_after_the_last_step(photos: Path, tmp_path: Path) -> None:
    settings = ("precision=fp32", "execution=eager", "data.color=null", "data.flip=false")
    run = train(photos, tmp_path / "run", "imagenet-paper", *settings)
    moving = train(photos, tmp_path / "moving", "imagenet-paper", *settings, "precise_bn=null")
    model, before = load(run.folder), load(moving.folder)
    assert isinstance(model, ResNet) and isinstance(before, ResNet)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)), "weights stay"
    assert not torch.equal(model.bn1.running_mean, before.bn1.running_mean)
    facts = json.loads((run.folder / "recipe.json").read_text())["recipe"]
    split = json.loads((run.folder / "split.json").read_text())
    source = _train_source(photos, split, model.card.preprocessing, facts)
    means, variances = [], []
    for i in range(3):  # 4 steps of 8 images have gone by, so 8 of 4
        epochs, indices = SampleOrder(0, len(source), 4)[8 + i]
        images, _ = source.train_batch(Draws(view_seed(0), epochs, indices))
        out = torch.nn.functional.conv2d(images, model.conv1.weight, stride=2, padding=3).detach()
        means.append(out.mean((0, 2, 3)))
        variances.append(out.var((0, 2, 3)))
    assert torch.allclose(model.bn1.running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert torch.allclose(model.bn1.running_var, torch.stack(variances).mean(0), rtol=1e-4)


def _train_source(photos: Path, split: dict, preprocessing: object, recipe: dict) -> Photos:
    from reslearn import data as datasets
    from reslearn.data.splits import divide

    opened = datasets.open(str(photos))
    splits, _ = divide(opened, val=recipe["data"]["val"], test=recipe["data"]["test"], seed=0)
    return Photos(splits["train"], preprocessing, flip=False, jitter=(36, 60))  # type: ignore[arg-type]


def test_a_plateau_of_the_validation_error_divides_lr_by_10(photos: Path, tmp_path: Path) -> None:
    settings = ("schedule.patience=2", "evaluate.every=1", "schedule.steps=8", "schedule.lr=1e-9")  # nothing is learned
    run = train(photos, tmp_path / "run", "imagenet-paper", *settings)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["event"] == "train"]
    errors = [line["top1_error"] for line in lines if line["event"] == "eval"]
    expected, best, waited, rate = [], float("inf"), 0, 1e-9
    for error in errors:
        expected.append(rate)
        waited = 0 if error < best else waited + 1
        best = min(best, error)
        if waited == 2:
            waited, rate = 0, rate / 10
    assert rates == pytest.approx(expected) and len(set(rates)) > 1


def test_training_images_larger_than_in_evaluation_are_noted(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size, noted in ((48, True), (64, False)):
        settings = ["schedule.steps=1", "batch.size=8", "data.grow=[32,64]", f"data.size={size}", "data.workers=0"]
        reslearn.train(photos, "imagenet-fast", model="resnet18", settings=settings, out=tmp_path / f"{size}")
        assert ("training images grow to 64 px, larger than the 48 px of evaluation" in capsys.readouterr().out) == noted


def test_training_images_grow_and_evaluation_keeps_its_size(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    forward = ResNet.forward

    def watched(self: ResNet, x: torch.Tensor) -> torch.Tensor:
        seen.append((self.training, x.shape[-1]))
        return forward(self, x)

    monkeypatch.setattr(ResNet, "forward", watched)
    train(photos, tmp_path / "run", "imagenet-fast", "schedule.steps=12", "data.val=4", "data.test=4", "evaluate.every=12")
    sizes = [size for training, size in seen if training]
    assert sizes == sorted(sizes) and set(sizes) == {32, 64} and len(sizes) == 12
    assert {size for training, size in seen if not training} == {32}


def test_all_images_of_a_batch_have_one_size(photos: Path) -> None:
    from reslearn import data as datasets
    from reslearn.data.preprocess import Preprocessing

    split = datasets.open(str(photos)).splits["all"]
    view = Preprocessing(channels=3, size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    source = Photos(split, view, crop_scale=(0.5, 1.0), grow=(32, 64), epochs=2)
    late = Draws(0, torch.ones(4, dtype=torch.int64), torch.arange(4))
    assert source.train_batch(late)[0].shape[-1] == 32 and source._train_size(1) == (32, 32)
    far = Draws(0, torch.full((4,), 2), torch.arange(4))
    assert source.train_batch(far)[0].shape[-1] == 64
    assert source.train_batch(Draws(0, far.epochs, far.indices, began=0))[0].shape[-1] == 32


def test_color_noise_is_added_to_the_colors_of_each_photo(photos: Path) -> None:
    from reslearn import data as datasets
    from reslearn.data.preprocess import Preprocessing

    split = datasets.open(str(photos)).splits["all"]
    view = Preprocessing(channels=3, size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    draws = Draws(0, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    plain, _ = Photos(split, view, jitter=(36, 60)).train_batch(draws)
    noisy, _ = Photos(split, view, jitter=(36, 60), color=0.1).train_batch(draws)
    added = (noisy - plain) * torch.tensor(view.std)[:, None, None]
    assert torch.allclose(added, color_noise(draws, 0.1)[:, :, None, None].expand_as(added), atol=1e-5)
