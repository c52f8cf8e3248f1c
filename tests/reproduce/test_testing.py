"""Tables 4 and 5: multi-crop and multi-scale tests of given models and their ensembles, next to the paper's numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import RunCli
from drawing import draw_images
from reslearn import UserError, evaluate, save
from reslearn.data.preprocess import Preprocessing
from reslearn.nets import models as known
from reslearn.nets import spec
from reslearn.reproduce import testing
from reslearn.reproduce.catalog import EXPERIMENTS
from reslearn.reproduce.experiment import ExperimentOptions
from reslearn.reproduce.run import reproduce
from reslearn.reproduce.testing import measure_single, published
from reslearn.weights import Card
from small_nets import network

VIEW = Preprocessing(channels=3, size=(32, 32), crop_ratio=0.8, mean=(0.5,) * 3, std=(0.1,) * 3)
CLASSES = ("a", "b", "c", "d")


def card(net: str, **options: Any) -> Card:
    return Card(net=net, options=options, classes=CLASSES, preprocessing=VIEW)


def test_published_numbers_match_the_paper() -> None:
    numbers = {
        "plain18": published(card("plain18")),
        "plain34": published(card("plain34")),
        "18A": published(card("resnet18", shortcut="A")),
        "34A": published(card("resnet34", shortcut="A-centered")),
        "34B": published(card("resnet34")),
        "34C": published(card("resnet34", shortcut="C")),
        "50": published(card("resnet50", pool="ceil")),
        "101": published(card("resnet101", zero_init_last_gamma=True)),
        "152": published(card("resnet152")),
        "vgg16": published(card("vgg16")),
    }
    none = (None, None)
    assert numbers == {
        "plain18": ((27.94, None), none),
        "plain34": ((28.54, 10.02), none),
        "18A": ((27.88, None), none),
        "34A": ((25.03, 7.76), none),
        "34B": ((24.52, 7.46), (21.84, 5.71)),
        "34C": ((24.19, 7.40), (21.53, 5.60)),
        "50": ((22.85, 6.71), (20.74, 5.25)),
        "101": ((21.75, 6.05), (19.87, 4.60)),
        "152": ((21.43, 5.71), (19.38, 4.49)),
        "vgg16": ((28.07, 9.33), none),
    }
    others = [card("resnet50", shortcut="C"), card("resnet50", order="full"), card("resnet50-v1.5"), card("resnet18")]
    assert all(published(other) == (none, none) for other in others)
    assert all(spec(name).stem == "imagenet" or published(card(name)) == (none, none) for name in known())


@pytest.fixture
def given(tmp_path: Path) -> list[Path]:
    draw_images(tmp_path / "photos", "abc", each=4, size=(70, 90))
    return [save(network("resnet8", seed), tmp_path / f"m{seed}.safetensors", card("resnet8")) for seed in range(2)]


def test_both_tables(given: list[Path], tmp_path: Path) -> None:
    data, out = str(tmp_path / "photos"), tmp_path / "out"
    four = reproduce(EXPERIMENTS["table4"], "paper", models=given, data=data, out=out, quiet=True)
    assert [(row["what"], row["ours"]["n"], row["verdict"]) for row in four["rows"]] == [
        (f"resnet8 ({path.name}), top-1, {name}", 1, "") for name in ("10-crop", "multi-scale") for path in given
    ]
    expected = [evaluate(model, data, protocol="multiscale")["top1_error"] for model in given]
    assert [row["ours"]["mean"] for row in four["rows"][-len(given) :]] == expected and four["data"] == "photos"
    five = reproduce(EXPERIMENTS["table5"], "paper", models=given, data=data, out=out, quiet=True)
    ensemble = evaluate(given, data, protocol="multiscale")["top1_error"]
    assert [row["ours"]["mean"] for row in five["rows"]] == [*expected, ensemble]
    assert five["claims"][0]["effect"]["mean"] == pytest.approx(min(expected) - ensemble)
    assert json.loads((out / "table5-models.json").read_text()) == five
    with pytest.raises(UserError, match="table5 measures an ensemble: pass several models"):
        reproduce(EXPERIMENTS["table5"], "paper", models=given[:1], data=data, out=out, quiet=True)
    with pytest.raises(UserError, match=r"m0\.safetensors does not record its training data: pass ImageNet.s validation images"):
        reproduce(EXPERIMENTS["table4"], "paper", models=given, out=out, quiet=True)


@pytest.mark.parametrize(("images", "verdict"), [(50, "holds"), (49, "not comparable")])
def test_only_imagenets_validation_images_are_compared(
    images: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """evaluate is replaced by a stub with results for 50,000 images."""
    model = save(network("resnet50"), tmp_path / "m.safetensors", card("resnet50"))

    def numbers(model: Path, data: str, device: str, protocol: str) -> dict[str, Any]:
        errors = {"10crop": (22.9, 6.7), "multiscale": (20.9, 5.3)}[protocol]
        rows = [{"class": str(i), "n": images if i == 7 else 50, "accuracy": 1.0} for i in range(1000)]
        return {"top1_error": errors[0], "top5_error": errors[1], "per_class": rows, "data": "val"}

    monkeypatch.setattr(testing, "evaluate", numbers)
    measured = measure_single({"resnet50": [model]}, ExperimentOptions("val", "", 1, tmp_path, "cpu", lambda line: None))
    assert [row["published"] for row in measured.rows] == [22.85, 6.71, 20.74, 5.25]
    assert [row["verdict"] for row in measured.rows] == [verdict] * 4


def test_the_command_chooses_the_only_scale(
    given: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli("reproduce", "table5", *(f"--model={model}" for model in given), "--data", "photos")
    assert code == 0, err
    assert "ensemble of 2 models, top-1" in out and "The ensemble has a lower top-1 error" in out
    assert "ImageNet: ensembles" in (tmp_path / "reproduction" / "index.html").read_text()
