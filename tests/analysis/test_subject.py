"""Subjects: which images and network are analyzed, and errors for missing information."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reslearn import UserError, train
from reslearn.analysis.responses import responses
from reslearn.analysis.subject import BATCH, chunks, fresh, initialized, open_subject
from reslearn.weights.store import Card, load, save

SHORT = ["schedule.steps=4", "batch.size=16", "log.every=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("fashion-sample", model="resnet8", settings=SHORT, out=tmp_path_factory.mktemp("runs") / "run", quiet=True).folder


def test_images_are_random_test_images(run: Path) -> None:
    one, again, other = (open_subject(run, None, 20, seed) for seed in (0, 0, 1))
    assert one.names == again.names != other.names and torch.equal(one.images, again.images)
    assert all(name.startswith("fashion-sample/test[") for name in one.names) and one.split == "test"
    assert one.facts()["images"] == 20 and one.facts()["trained"] and one.facts()["net"] == "resnet8"
    assert len(open_subject(run, None, 5000, 0).labels) == 1000, "all there are"


def test_a_run_on_an_undivided_folder_is_analyzed_on_its_held_out_images(images: Path, tmp_path: Path) -> None:
    folder = train(images, model="resnet8", settings=SHORT, out=tmp_path / "run", quiet=True).folder
    held_out = json.loads((folder / "split.json").read_text())
    subject = open_subject(folder, None, 100, 0)
    assert subject.split == "test" and set(subject.names) == set(held_out["test"]) and not subject.note
    (folder / "split.json").unlink()
    assert "images that the model was trained on" in open_subject(folder, None, 100, 0).note


def test_a_model_without_recorded_training_data(run: Path, tmp_path: Path) -> None:
    model = load(run)
    card = Card.model_validate(model.card.model_dump() | {"data": {}})  # type: ignore[union-attr]
    save(model, tmp_path / "m.safetensors", card)
    with pytest.raises(UserError, match="does not record its training data: choose a data set with --data"):
        open_subject(tmp_path / "m.safetensors", None, 5, 0)
    assert open_subject(tmp_path / "m.safetensors", "fashion-sample", 5, 0).data == "fashion-sample"


def test_a_network_name_opens_an_untrained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subject = open_subject("preact-resnet14", "fashion-sample", 30, 0)
    assert subject.name == "preact-resnet14, untrained" and not subject.facts()["trained"]
    assert subject.images.shape == (30, 1, 28, 28) and abs(subject.images.mean().item()) < 0.2
    assert torch.equal(subject.model.state_dict()["conv1.weight"], initialized(subject.card, subject.images, 0).conv1.weight)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="resnet14 is an untrained network: choose a data set with --data"):
        open_subject("resnet14", None, 5, 0)
    with pytest.raises(UserError, match="no model file or run folder called resnet15"):
        open_subject("resnet15", "fashion-sample", 5, 0)
    (tmp_path / "resnet14").mkdir()
    with pytest.raises(UserError, match=r"no model\.safetensors in resnet14"):
        open_subject("resnet14", "fashion-sample", 5, 0)


def test_a_fresh_network_is_untrained(run: Path) -> None:
    subject = open_subject(run, None, 40, 0)
    before = [response.std for response in responses(subject.model, subject.images)]
    new = [response.std for response in responses(fresh(subject), subject.images)]
    assert before != new and new == pytest.approx([1] * len(new), rel=1e-3), "its BN statistics are from the images"
    assert not fresh(subject).training and torch.equal(fresh(subject, 1).conv1.weight, fresh(subject, 1).conv1.weight)  # type: ignore[arg-type]


def test_bn_statistics_are_computed_without_dropout() -> None:
    card = open_subject("resnet8", "fashion-sample", 4, 0).card.model_copy(update={"options": {"merge": "dropout"}})
    images = torch.randn(9, 1, 28, 28)
    one, two = initialized(card, images), initialized(card, images)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not any(module.training for module in one.modules())
    assert all(module.momentum == 0.1 for module in one.modules() if isinstance(module, nn.BatchNorm2d))


def test_any_classes_allows_unlabeled_images_and_other_classes(run: Path, images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))[:5]):
        (flat / f"{i}.png").write_bytes(file.read_bytes())
    (flat / "notes.txt").write_text("not an image")
    subject = open_subject(run, str(flat), 100, 0, any_classes=True)
    assert subject.names == ("0.png", "1.png", "2.png", "3.png", "4.png") and set(subject.labels.tolist()) == {-1}
    other = open_subject(run, str(images), 100, 0, any_classes=True)
    assert len(other.labels) == 24 and np.bincount(other.labels.numpy()).tolist() == [12, 12] and len(other.classes) == 2
    with pytest.raises(UserError, match="the model has no class"):
        open_subject(run, str(images), 100, 0)


def test_chunks_cover_every_row_and_are_smaller_for_larger_images() -> None:
    images, labels = torch.arange(600.0)[:, None, None, None].expand(600, 1, 32, 32), torch.arange(600)
    parts = list(chunks(images, labels))
    assert [len(part) for part, _ in parts] == [BATCH, BATCH, 100] and torch.equal(torch.cat([rows for _, rows in parts]), labels)
    assert {len(part) for (part,) in chunks(torch.zeros(16, 3, 224, 224))} == {8}
