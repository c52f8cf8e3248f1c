"""Scores in files, ensembles of them, and the commands."""

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


def some(seed: int = 0, n: int = 5) -> Scores:
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


def test_a_file_gives_back_what_was_saved_and_numpy_reads_it(tmp_path: Path) -> None:
    save_scores(some(), tmp_path / "s.npz")
    back = load_scores(tmp_path / "s.npz")
    assert torch.equal(back.scores, some().scores) and torch.equal(back.labels, some().labels)
    assert back.names == some().names and back.classes == some().classes
    assert (back.model, back.protocol, back.data, back.split) == ("m0", "10crop, mirrored", "photos", "val")
    with np.load(tmp_path / "s.npz") as file:
        assert file["scores"].dtype == np.float32 and file["labels"].dtype == np.int64 and str(file["names"][1]) == "b/ü 1.jpg"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz"]


def test_an_ensemble_is_the_mean_of_scores() -> None:
    both = ensemble([some(0), some(1)])
    torch.testing.assert_close(both.scores, (some(0).scores + some(1).scores) / 2)
    assert both.model == "m0 + m1" and both.protocol == "10crop, mirrored"
    expected = -both.scores.double()[torch.arange(5), both.labels].log().mean().item()
    assert both.metrics()["loss"] == pytest.approx(expected, rel=1e-6)
    sure = replace(some(), scores=torch.tensor([[1.0, 0, 0]] * 5))
    assert np.isfinite(sure.metrics()["loss"]) and sure.metrics()["top1_error"] == 60, "a score of 0 is no error"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": ("a", "x", "c")}, "m0 and m1 cannot be averaged: class 1 is 'b' of the first and 'x' of the second"),
        ({"names": (*some().names[:4], "z")}, "image 4 is 'b/ü 4.jpg' of the first and 'z' of the second"),
        ({"labels": torch.tensor([0, 1, 1, 0, 1])}, "'b/ü 2.jpg' is labeled 'c' in the first and 'b' in the second"),
    ],
)
def test_what_is_not_of_the_same_images(change: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        ensemble([some(0), replace(some(1), **change)])
    assert said in str(error.value)
    with pytest.raises(UserError, match=r"image 5 is none of the first and 'b/ü 5\.jpg' of the second"):
        ensemble([some(0), some(1, n=6)])


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    save_scores(some(), path)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    for wrong, said in (
        (whole[:-40], "is no file of scores, or is damaged"),
        (b"text", "is no file of scores, or is damaged"),
        ({"names": None}, "is no file of scores: it has no names"),
        ({"labels": arrays["labels"] + 1}, "do not fit together"),
        ({"scores": arrays["scores"][:, :2]}, "do not fit together"),
        ({"scores": arrays["scores"] * 2}, "rows must add up to 1"),
        ({"scores": arrays["scores"] * np.float32("nan")}, "rows must add up to 1"),
        ({"names": np.array(["x"] * 5, object)}, "is no file of scores, or is damaged"),
    ):
        if isinstance(wrong, bytes):
            path.write_bytes(wrong)
        else:
            np.savez(path, **{key: value for key, value in (arrays | wrong).items() if value is not None})
        with pytest.raises(UserError, match=r"s\.npz: .*" + said):
            load_scores(path)
    with pytest.raises(UserError, match="there is no file of scores called"):
        load_scores(tmp_path / "none.npz")


def test_several_models_are_an_ensemble_in_one_go_and_from_files(models: list[Path], photos3: Path, tmp_path: Path) -> None:
    together = evaluate(models, photos3, protocol="10crop", scores=tmp_path / "all.npz")
    alone = [evaluate(model, photos3, protocol="10crop", scores=model.with_suffix(".npz")) for model in models]
    assert [each["top1_error"] for each in together["members"]] == [each["top1_error"] for each in alone]
    assert len({each["loss"] for each in (*alone, together)}) == 4
    files = [load_scores(model.with_suffix(".npz")) for model in models]
    torch.testing.assert_close(load_scores(tmp_path / "all.npz").scores, ensemble(files).scores)
    assert ensemble(files).metrics()["loss"] == pytest.approx(together["loss"], rel=1e-6)
    assert load_scores(tmp_path / "all.npz").model == " + ".join(map(str, models))
    assert evaluate([load(models[0])], photos3)["loss"] == evaluate(models[0], photos3)["loss"]


def test_the_commands(models: list[Path], photos3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, _ = run_cli("eval", *models[:2], photos3, "--protocol", "10crop", "--json")
    together = json.loads(said)
    assert code == 0 and together["protocol"] == "10crop, mirrored" and len(together["members"]) == 2
    for model in models[:2]:
        words = ["eval", model, photos3, "--protocol", "10crop", "--scores", f"{model.stem}.npz"]
        assert run_cli(*words)[0] == 0
    code, said, _ = run_cli("ensemble", "m0.npz", "m1.npz", "--json", "--scores", "both.npz")
    found = json.loads(said)
    assert code == 0 and found["confusion"] == together["confusion"]
    assert found["loss"] == pytest.approx(together["loss"]) and load_scores(Path("both.npz")).names
    code, said, _ = run_cli("ensemble", "m0.npz", "m1.npz")
    assert code == 0 and "15 images, 10crop, mirrored" in said and said.count(" alone") == 2 and "ensemble)" in said
    words = ["eval", models[0], photos3, "--protocol", "multiscale", "--scales", "32,48", "--json"]
    assert json.loads(run_cli(*words)[1])["protocol"] == "multiscale 32 48, mirrored"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "m0.safetensors", "photos3", "--scales", "32"], "scales do not apply to protocol center"),
        (["eval", "m0.safetensors", "photos3", "--protocol", "dense", "--scales", "a"], "--scales a: write integers"),
        (["eval", "m0.safetensors", "photos3", "--protocol", "tencrop"], "tencrop"),
        (["eval", "m0.safetensors", "photos3", "--scores", "s.csv"], "cannot write scores to s.csv: the file must be a .npz"),
        (["eval", "m0.safetensors", "photos3", "--scores", "no/s.npz"], "cannot write no/s.npz: there is no folder no"),
        (["eval", "m0.safetensors", "none.safetensors", "photos3"], "no model file or run folder called none.safetensors"),
        (["eval", "photos3"], "Missing argument"),
        (["ensemble", "none.npz"], "there is no file of scores called none.npz"),
        (["ensemble", "m0.safetensors"], "m0.safetensors: is no file of scores"),
    ],
)
def test_mistakes(
    words: list[str],
    said: str,
    models: list[Path],
    photos3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: RunCli,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run_cli(*words)
    assert code == 2 and said in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
