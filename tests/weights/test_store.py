"""Model files: round trip, and invalid files."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import reslearn
from reslearn import Card, UserError
from reslearn.data.preprocess import Preprocessing
from reslearn.weights import read_card
from reslearn.weights.store import network

PREPROCESSING = Preprocessing(channels=3, size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def make(path: Path, net: str = "resnet8", **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = reslearn.create(net, 3, **options)
    card = Card(net=net, options=options, classes=("a", "b", "ü"), preprocessing=PREPROCESSING, metrics={"x": 1})
    reslearn.save(model, path, card)
    return model.eval()


@pytest.mark.parametrize(("net", "options"), [("resnet8", {}), ("resnet8", {"shortcut": "B"}), ("resnet50", {"stride_in": "3x3"})])
def test_save_and_load_keep_weights_and_card(tmp_path: Path, net: str, options: dict) -> None:
    model = make(tmp_path / "m.safetensors", net, **options)
    loaded = reslearn.load(tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert loaded.card.classes == ("a", "b", "ü")
    assert loaded.card.options == options
    assert not loaded.training
    again = reslearn.save(loaded, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / "m.safetensors").read_bytes(), "a loaded model is saved with its card"


def test_a_run_folder_resolves_to_its_model(tmp_path: Path) -> None:
    make(tmp_path / "model.safetensors")
    assert read_card(tmp_path).net == "resnet8"


def test_the_card_holds_the_mean_image(tmp_path: Path) -> None:
    mean = torch.rand(3, 32, 32)
    view = PREPROCESSING.model_copy(update={"pixel_mean": Preprocessing.encode_pixel_mean(mean), "std": (1.0,) * 3})
    card = Card(net="resnet8", classes=("a", "b"), preprocessing=view)
    reslearn.save(reslearn.create("resnet8", 2), tmp_path / "m.safetensors", card)
    normalize = reslearn.load(tmp_path / "m.safetensors").card.preprocessing.normalizer()
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(normalize(pixels), pixels / 255 - mean)


def change_card(**change: object) -> Callable[[Path], None]:
    def corrupt(path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        card = json.loads(read_card(path).model_dump_json()) | change
        safetensors.torch.save_file(tensors, path, {"reslearn": json.dumps(card)})

    return corrupt


def drop_card(path: Path) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)


def drop_tensor(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    del tensors["layer1.0.conv1.weight"]
    safetensors.torch.save_file(tensors, path, {"reslearn": read_card(path).model_dump_json()})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "no model file or run folder"),
    "empty": (lambda p: p.write_bytes(b""), "not a complete safetensors file"),
    "text": (lambda p: p.write_text("hello, world, this is no model"), "not a complete safetensors file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "not a complete safetensors file"),
    "a folder without a model": (lambda p: (p.unlink(), p.mkdir()), "no model.safetensors in"),
    "no card": (drop_card, "no reslearn card"),
    "unknown net": (change_card(net="resnt8"), "no network called 'resnt8'"),
    "another net": (change_card(net="resnet14"), "does not fit resnet14: 'layer1.1.conv1.weight' is missing"),
    "fewer classes": (change_card(classes=["a", "b"]), "'fc.weight' has shape (3, 64), not (2, 64)"),
    "a missing tensor": (drop_tensor, "'layer1.0.conv1.weight' is missing"),
    "unknown key": (change_card(extra=1), "its card is not valid at 'extra'"),
    "bad option": (change_card(options={"shortcut": "Z"}), "must be one of 'A', 'A-centered'"),
    "bad preprocessing": (
        change_card(preprocessing=json.loads(PREPROCESSING.model_dump_json()) | {"std": [0.0, 1.0, 1.0]}),
        "its card is not valid at 'preprocessing'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_gives_a_one_line_error(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.safetensors"
    make(path)
    corrupt, message = BROKEN[case]
    corrupt(path)
    with pytest.raises(UserError) as caught:
        reslearn.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_save_leaves_no_files(tmp_path: Path) -> None:
    model = reslearn.create("resnet8", 2)
    with pytest.raises(UserError, match="needs a card"):
        reslearn.save(model, tmp_path / "m.safetensors")
    card = Card(net="resnet8", classes=("a", "b"), preprocessing=PREPROCESSING)
    with pytest.raises(UserError, match="there is no folder"):
        reslearn.save(model, tmp_path / "none" / "m.safetensors", card)
    assert not list(tmp_path.iterdir())


def test_a_card_that_does_not_fit_the_model_is_never_written(tmp_path: Path) -> None:
    card = Card(net="resnet14", classes=("a", "b", "c"), preprocessing=PREPROCESSING)
    with pytest.raises(UserError, match=r"the card \(resnet14 with 3 classes\) does not fit the model: 'layer1\.1"):
        reslearn.save(reslearn.create("resnet8", 3), tmp_path / "m.safetensors", card)
    assert not list(tmp_path.iterdir())


def test_half_precision_loads_as_float32_and_integers_are_rejected(tmp_path: Path) -> None:
    model = make(tmp_path / "m.safetensors")
    for dtype in (torch.float16, torch.int32):
        changed = reslearn.create("resnet8", 3)
        changed.load_state_dict(model.state_dict())
        changed.to(torch.float16)
        if dtype == torch.int32:
            changed.fc.weight = torch.nn.Parameter(changed.fc.weight.to(dtype), requires_grad=False)
        reslearn.save(changed, tmp_path / "other.safetensors", read_card(tmp_path / "m.safetensors"))
        if dtype == torch.int32:
            with pytest.raises(UserError, match=r"does not fit resnet8: 'fc.weight' is int32"):
                reslearn.load(tmp_path / "other.safetensors")
        else:
            loaded = reslearn.load(tmp_path / "other.safetensors")
            assert all(t.dtype == torch.float32 for t in loaded.parameters())


def test_unknown_options_in_a_card_are_rejected(tmp_path: Path) -> None:
    make(tmp_path / "m.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    card = read_card(tmp_path / "m.safetensors").model_copy(update={"options": {"classes": 5}})
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", {"reslearn": card.model_dump_json()})
    with pytest.raises(UserError, match="no option 'classes'"):
        reslearn.load(tmp_path / "m.safetensors")


def test_model_files_are_readable_by_others(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        make(tmp_path / "m.safetensors")
    finally:
        os.umask(mask)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o644


def test_network_names_take_precedence_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet20").mkdir()
    assert network("resnet20")[1] == (3, 32, 32)
    with pytest.raises(UserError, match="no network called"):
        network("x" * 300)


def test_non_finite_weights_are_rejected(tmp_path: Path) -> None:
    make(tmp_path / "m.safetensors")
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-5000:-4994] = b"\xff" * 6
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"m\.safetensors is damaged: '.*' has non-finite values"):
        reslearn.load(tmp_path / "m.safetensors")


def test_foreign_weights_must_be_imported(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"m\.pth must be imported first: reslearn import"):
        reslearn.load(tmp_path / "m.pth")
