"""Detectors in model files: round trip, and other kinds of files."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import reslearn
from detect.small import detector, pictures
from reslearn import Card, UserError
from reslearn.data.preprocess import Preprocessing
from reslearn.detect import create_detector, load_detector, save_detector
from reslearn.weights import read_card
from reslearn.weights.store import network


@pytest.mark.parametrize(
    ("net", "options"),
    [
        ("resnet8", {"masks": True, "context": True}),
        ("resnet8", {"kind": "fpn", "masks": True, "batch_norm": "frozen"}),
        ("resnet8", {"roi": "pool", "channels": 1}),
    ],
    ids=["c4", "fpn", "gray"],
)
def test_a_saved_detector_loads_unchanged(tmp_path: Path, net: str, options: dict) -> None:
    model = detector(net, **options)
    card = model.card.model_copy(update={"metrics": {"ap": 0.5}})
    loaded = load_detector(save_detector(model, tmp_path / "d.safetensors", card))
    images = pictures((40, 56), channels=options.get("channels", 3))
    with torch.no_grad():
        (one,), (two,) = model(images), loaded(images)
    assert len(one["boxes"]) > 0 and all(torch.equal(one[key], two[key]) for key in one)
    assert loaded.settings == model.settings and loaded.classes == ("class 1", "class 2", "class 3")
    assert loaded.card.metrics == {"ap": 0.5} and not loaded.training
    again = save_detector(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_other_kinds_of_files_are_rejected(tmp_path: Path) -> None:
    save_detector(create_detector("resnet8", ["one"]), tmp_path / "d.safetensors")
    view = Preprocessing(channels=3, size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    card = Card(net="resnet8", classes=("a", "b"), preprocessing=view)
    reslearn.save(reslearn.create("resnet8", 2), tmp_path / "c.safetensors", card)
    with pytest.raises(UserError, match=r"d\.safetensors holds a detector, not a classification network"):
        reslearn.load(tmp_path / "d.safetensors")
    with pytest.raises(UserError, match=r"c\.safetensors holds a classification network, not a detector: to use it as a backbone"):
        load_detector(tmp_path / "c.safetensors")
    assert "detector" not in json.loads(read_card(tmp_path / "c.safetensors").model_dump_json())
    with pytest.raises(ValueError, match="a classifier needs at least 2"):
        Card(net="resnet8", classes=("a",), preprocessing=view)


def test_predict_rejects_a_detector_and_train_an_unknown_task(tmp_path: Path) -> None:
    model = load_detector(save_detector(create_detector("resnet8", 2), tmp_path / "d.safetensors"))
    with pytest.raises(UserError, match="the model holds a detector, not a classification network: use reslearn detect"):
        reslearn.predict(model, tmp_path / "a.png")
    with pytest.raises(UserError, match=r"^no task 'detekt'; did you mean 'detect'\?$"):
        reslearn.train("fashion-sample", model="resnet8", out=tmp_path / "run", task="detekt")
    assert not (tmp_path / "run").exists()


def test_a_detector_is_not_shown_as_a_network(tmp_path: Path) -> None:
    save_detector(create_detector("resnet8", 2), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors holds a detector, not a classification network"):
        network(str(tmp_path))


def test_invalid_settings_in_a_card_are_rejected(tmp_path: Path) -> None:
    path = save_detector(create_detector("resnet8", 2), tmp_path / "d.safetensors")
    tensors, card = safetensors.torch.load_file(path), json.loads(read_card(path).model_dump_json())
    for change, message in (
        ({"masks": "maybe"}, "its card is not valid at 'detector.masks'"),
        ({"turbo": 1}, "its card is not valid at 'detector.turbo'"),
        ({"context": True}, "does not fit resnet8: 'roi_heads.box_predictor.cls_score.weight' has shape"),
    ):
        invalid = {**card, "detector": {**card["detector"], **change}}
        safetensors.torch.save_file(tensors, path, {"reslearn": json.dumps(invalid)})
        with pytest.raises(UserError, match=message):
            load_detector(path)


def test_a_backbone_without_a_card_cannot_be_saved(tmp_path: Path) -> None:
    model = create_detector(reslearn.create("resnet8", 2), 2)
    with pytest.raises(UserError, match="whose backbone has no card"):
        save_detector(model, tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())
