"""Scores files, ensembles, and the commands eval and ensemble."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import RunCli
from drawing import draw_images
from reslearn import UserError, evaluate, load, save
from reslearn.data.preprocess import Preprocessing
from reslearn.evaluation.scores import Scores, ensemble, load_scores, save_scores
from reslearn.weights import Card
from small_nets import network


def random_scores(seed: int = 0, n: int = 5) -> Scores:
    scores = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).softmax(1)
    names = tuple(f"b/ü {i}.jpg" for i in range(n))
    return Scores(scores, torch.arange(n) % 3, names, ("a", "b", "c"), f"m{seed}", "10crop, mirrored", "photos", "val")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    view = Preprocessing(channels=3, size=(32, 32), crop_ratio=0.8, mean=(0.5,) * 3, std=(0.1,) * 3)
    card = Card(net="resnet8", classes=("a", "b", "c", "d"), preprocessing=view)
    return [save(network("resnet8", seed=seed), tmp_path / f"m{seed}.safetensors", card) for seed in range(3)]


@pytest.fixture
def photos3(tmp_path: Path) -> Path:
    return draw_images(tmp_path / "photos3", "abc", each=5, size=(70, 90))


def test_save_and_load(tmp_path: Path) -> None:
    save_scores(random_scores(), tmp_path / "s.npz")
    back = load_scores(tmp_path / "s.npz")
    assert torch.equal(back.scores, random_scores().scores) and torch.equal(back.labels, random_scores().labels)
    assert back.names == random_scores().names and back.classes == random_scores().classes
    assert (back.model, back.protocol, back.data, back.split) == ("m0", "10crop, mirrored", "photos", "val")
    with np.load(tmp_path / "s.npz") as file:
        assert file["scores"].dtype == np.float32 and file["labels"].dtype == np.int64 and str(file["names"][1]) == "b/ü 1.jpg"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz"]


def test_an_ensemble_averages_scores() -> None:
    both = ensemble([random_scores(0), random_scores(1)])
    torch.testing.assert_close(both.scores, (random_scores(0).scores + random_scores(1).scores) / 2)
    assert both.model == "m0 + m1" and both.protocol == "10crop, mirrored"
    expected = -both.scores.double()[torch.arange(5), both.labels].log().mean().item()
    assert both.metrics()["loss"] == pytest.approx(expected, rel=1e-6)
    certain = replace(random_scores(), scores=torch.tensor([[1.0, 0, 0]] * 5))
    assert np.isfinite(certain.metrics()["loss"]) and certain.metrics()["top1_error"] == 60, "a score of 0 is valid"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("a", "x", "c")}, "cannot average m0 and m1: class 1 is 'b' in the first and 'x' in the second"),
        ({"names": (*random_scores().names[:4], "z")}, "image 4 is 'b/ü 4.jpg' in the first and 'z' in the second"),
        ({"labels": torch.tensor([0, 1, 1, 0, 1])}, "'b/ü 2.jpg' is labeled 'c' in the first and 'b' in the second"),
    ],
)
def test_scores_of_different_images_are_rejected(change: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        ensemble([random_scores(0), replace(random_scores(1), **change)])
    assert message in str(error.value)
    with pytest.raises(UserError, match=r"image 5 is missing in the first and 'b/ü 5\.jpg' in the second"):
        ensemble([random_scores(0), random_scores(1, n=6)])


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    save_scores(random_scores(), path)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    for change, message in (
        (whole[:-40], "is not a scores file, or is damaged"),
        (b"text", "is not a scores file, or is damaged"),
        ({"names": None}, "is not a scores file: it has no names"),
        ({"labels": arrays["labels"] + 1}, "are inconsistent"),
        ({"scores": arrays["scores"][:, :2]}, "are inconsistent"),
        ({"scores": arrays["scores"] * 2}, "rows of scores must sum to 1"),
        ({"scores": arrays["scores"] * np.float32("nan")}, "rows of scores must sum to 1"),
        ({"names": np.array(["x"] * 5, object)}, "is not a scores file, or is damaged"),
    ):
        if isinstance(change, bytes):
            path.write_bytes(change)
        else:
            np.savez(path, **{key: value for key, value in (arrays | change).items() if value is not None})
        with pytest.raises(UserError, match=r"s\.npz .*" + message):
            load_scores(path)
    with pytest.raises(UserError, match="no scores file called"):
        load_scores(tmp_path / "none.npz")


def test_an_ensemble_of_models_equals_one_of_files(models: list[Path], photos3: Path, tmp_path: Path) -> None:
    together = evaluate(models, photos3, protocol="10crop", scores=tmp_path / "all.npz")
    single = [evaluate(model, photos3, protocol="10crop", scores=model.with_suffix(".npz")) for model in models]
    assert [result["top1_error"] for result in together["members"]] == [result["top1_error"] for result in single]
    assert len({result["loss"] for result in (*single, together)}) == 4
    files = [load_scores(model.with_suffix(".npz")) for model in models]
    torch.testing.assert_close(load_scores(tmp_path / "all.npz").scores, ensemble(files).scores)
    assert ensemble(files).metrics()["loss"] == pytest.approx(together["loss"], rel=1e-6)
    assert load_scores(tmp_path / "all.npz").model == " + ".join(map(str, models))
    assert evaluate([load(models[0])], photos3)["loss"] == evaluate(models[0], photos3)["loss"]


def test_the_commands(models: list[Path], photos3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli("eval", *models[:2], photos3, "--protocol", "10crop", "--json")
    together = json.loads(out)
    assert code == 0 and together["protocol"] == "10crop, mirrored" and len(together["members"]) == 2
    for model in models[:2]:
        words = ["eval", model, photos3, "--protocol", "10crop", "--scores", f"{model.stem}.npz"]
        assert run_cli(*words)[0] == 0
    code, out, _ = run_cli("ensemble", "m0.npz", "m1.npz", "--json", "--scores", "both.npz")
    result = json.loads(out)
    assert code == 0 and result["confusion"] == together["confusion"]
    assert result["loss"] == pytest.approx(together["loss"]) and load_scores(Path("both.npz")).names
    code, out, _ = run_cli("ensemble", "m0.npz", "m1.npz")
    assert code == 0 and "15 images, 10crop, mirrored" in out and out.count(" alone") == 2 and "ensemble)" in out
    words = ["eval", models[0], photos3, "--protocol", "multiscale", "--scales", "32,48", "--json"]
    assert json.loads(run_cli(*words)[1])["protocol"] == "multiscale 32 48, mirrored"


INVALID = {
    "--scales 32": "scales do not apply to protocol center",
    "--protocol dense --scales a": "--scales a: ",
    "--protocol tencrop": "tencrop",
    "--scores s.csv": "cannot write scores to s.csv: the file must be a .npz",
    "--scores no/s.npz": "cannot write no/s.npz: there is no folder no",
}


def test_invalid_options_give_a_one_line_error(
    models: list[Path], photos3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for words, message in INVALID.items():
        code, _, err = run_cli("eval", "m0.safetensors", "photos3", *words.split())
        assert code == 2 and message in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
