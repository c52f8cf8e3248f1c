"""Model files: round trip, and everything that can be wrong with one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import reslearn
from reslearn import Card, UserError
from reslearn.data.preprocess import Preprocessing
from reslearn.weights import read_card

PREPROCESSING = Preprocessing(channels=3, size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def make(path: Path, net: str = "resnet8", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = reslearn.create(net, 3, **options)
    card = Card(net=net, options=options, classes=("a", "b", "ü"), preprocessing=PREPROCESSING, metrics={"x": 1})
    reslearn.save(model, path, card)
    return model.eval()


@pytest.mark.parametrize(("net", "options"), [("resnet8", {}), ("resnet8", {"shortcut": "B"}), ("resnet50", {"stride_in": "3x3"})])
def test_a_model_comes_back_the_same_with_its_card(tmp_path: Path, net: str, options: dict) -> None:
    model = make(tmp_path / "m.safetensors", net, **options)
    loaded = reslearn.load(tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert loaded.card.classes == ("a", "b", "ü")
    assert loaded.card.options == options
    assert not loaded.training
    again = reslearn.save(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "m.safetensors").read_bytes(), "a loaded model saves without a card given"


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    make(tmp_path / "model.safetensors")
    assert read_card(tmp_path).net == "resnet8"


def test_the_pixel_mean_travels_in_the_card(tmp_path: Path) -> None:
    mean = torch.rand(3, 32, 32)
    view = PREPROCESSING.model_copy(update={"pixel_mean": Preprocessing.encode_pixel_mean(mean), "std": (1.0,) * 3})
    card = Card(net="resnet8", classes=("a", "b"), preprocessing=view)
    reslearn.save(reslearn.create("resnet8", 2), tmp_path / "m.safetensors", card)
    normalise = reslearn.load(tmp_path / "m.safetensors").card.preprocessing.normaliser()
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(normalise(pixels), pixels / 255 - mean)


def change_card(**change: object) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        card = json.loads(read_card(path).model_dump_json()) | change
        safetensors.torch.save_file(tensors, path, {"reslearn": json.dumps(card)})

    return spoil


def drop_card(path: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)


def drop_tensor(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    del tensors["layer1.0.conv1.weight"]
    safetensors.torch.save_file(tensors, path, {"reslearn": read_card(path).model_dump_json()})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no model file or run folder"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
    "text": (lambda p: p.write_text("hello, world, this is no model"), "not a whole safetensors file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "not a whole safetensors file"),
    "a folder without a model": (lambda p: (p.unlink(), p.mkdir()), "no model.safetensors in"),
    "no card": (drop_card, "no reslearn card"),
    "unknown net": (change_card(net="resnt8"), "no network called 'resnt8'"),
    "another net": (change_card(net="resnet14"), "does not fit resnet14: 'layer1.1.conv1.weight' is missing"),
    "fewer classes": (change_card(classes=["a", "b"]), "'fc.weight' has shape (3, 64), not (2, 64)"),
    "a missing tensor": (drop_tensor, "'layer1.0.conv1.weight' is missing"),
    "unknown key": (change_card(extra=1), "its card is not valid at 'extra'"),
    "bad option": (change_card(options={"shortcut": "Z"}), "must be one of 'A', 'A-centred'"),
    "bad preprocessing": (
        change_card(preprocessing=json.loads(PREPROCESSING.model_dump_json()) | {"std": [0.0, 1.0, 1.0]}),
        "its card is not valid at 'preprocessing'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.safetensors"
    make(path)
    spoil, said = BROKEN[case]
    spoil(path)
    with pytest.raises(UserError) as caught:
        reslearn.load(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_is_left_where_a_model_cannot_be_written(tmp_path: Path) -> None:
    model = reslearn.create("resnet8", 2)
    with pytest.raises(UserError, match="needs a card"):
        reslearn.save(model, tmp_path / "m.safetensors")
    card = Card(net="resnet8", classes=("a", "b"), preprocessing=PREPROCESSING)
    with pytest.raises(UserError, match="there is no folder"):
        reslearn.save(model, tmp_path / "none" / "m.safetensors", card)
    assert not list(tmp_path.iterdir())
