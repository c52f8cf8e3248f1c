"""reslearn analyze, as it is called: files, pictures, lines, errors; on real data where it is there."""

import json
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

from reslearn import cli, train
from reslearn.analysis.lesion import lesion
from reslearn.analysis.responses import responses
from reslearn.analysis.subject import fresh, open_subject
from reslearn.weights.imports import import_weights

SHORT = ["schedule.steps=4", "batch.size=16", "log.every=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual net that has hardly been trained."""
    return train("fashion-sample", "resnet14", settings=SHORT, out=tmp_path_factory.mktemp("runs") / "residual", quiet=True).folder


def analyze(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reslearn", "analyze", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


CASES = {
    "responses": (["--images", 20], "13 layers"),
    "signal": (["--images", 20, "--fresh"], "of the gradient came through the shortcuts alone"),
    "lesion": (["--images", 20, "--draws", 1], "The block that is missed most is layer"),
    "paths": (["--images", 20, "--draws", 2], "6 blocks make 2^6 paths"),
    "landscape": (["--images", 10, "--size", 3], "in the middle"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_writes_numbers_and_a_picture(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, line = CASES[name]
    assert analyze(monkeypatch, name, run, *options, "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert line in said
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["findings"] and all(finding in said for finding in result["findings"])
    assert result["command"].startswith(f"reslearn analyze {name}") and result["numbers"]
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 300
    first = (tmp_path / f"{name}.json").read_bytes()
    assert analyze(monkeypatch, name, run, *options, "--out", tmp_path) == 0
    assert (tmp_path / f"{name}.json").read_bytes() == first, "the same seed, the same numbers"


def test_features_and_explain(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze(monkeypatch, "features", run, "fashion-sample", "--images", 30) == 0
    with np.load(run / "analysis" / "features.npz") as found:
        assert found["features"].shape == (30, 64) and len(found["names"]) == 30 and set(found["labels"]) <= set(range(10))
    picture = tmp_path / "one.png"
    Image.effect_noise((40, 30), 60).save(picture)
    assert analyze(monkeypatch, "explain", run, picture, "--class", "Sandal", "--json", "--out", tmp_path / "x") == 0
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{") :])
    heat = np.array(result["numbers"]["heat"])
    assert result["numbers"]["class"] == "Sandal" and heat.shape == (28, 28) and heat.min() >= 0 and heat.max() <= 1
    assert (tmp_path / "x" / "explain-one.png").exists()


def test_a_fresh_network_is_another(run: Path) -> None:
    subject = open_subject(run, None, 40, 0)
    before = [response.std for response in responses(subject.model, subject.images)]
    new = [response.std for response in responses(fresh(subject), subject.images)]
    assert before != new and all(0.3 < std < 3 for std in new), "its BN has seen the images"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["responses", "nowhere"], "nowhere"),
        (["responses", "RUN", "RUN"], "a model is given twice"),
        (["responses", "RUN", "--data", "cifar11"], "no data set or folder called 'cifar11'; did you mean 'cifar10'"),
        (["landscape", "RUN", "--size", 4], "--size 4: take an odd number"),
        (["explain", "RUN", "RUN/recipe.json"], "recipe.json"),
        (["explain", "RUN", "RUN/recipe.json", "--class", "Sandel"], "the model has no class 'Sandel'; did you mean 'Sandal'"),
        (["paths", "PLAIN"], "this network is plain: it has no shortcuts"),
    ],
)
def test_errors(
    words: list[object], line: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "PLAIN" in words:
        train("fashion-sample", "plain8", settings=SHORT, out=tmp_path / "plain", quiet=True)
        capsys.readouterr()
    places = {"RUN": str(run), "PLAIN": str(tmp_path / "plain"), "RUN/recipe.json": str(run / "recipe.json")}
    out = tmp_path / "out"
    assert analyze(monkeypatch, *(places.get(str(word), word) for word in words), "--out", out) == 2
    said = capsys.readouterr().err
    assert line in said and "Traceback" not in said
    assert not out.exists()


def test_deleting_a_block_of_a_trained_net(real_data: Path, tmp_path: Path) -> None:
    """Veit et al., Figure 3: most blocks can be left out, those that halve the size cannot."""
    import_weights(real_data / "weights" / "resnet32-d509ac18.th", out=tmp_path / "r32.safetensors")
    subject = open_subject(tmp_path / "r32.safetensors", "cifar10", 300, 0)
    found = lesion(subject.model, subject.images, subject.labels, draws=1)
    kept = [e for name, e in found.single.items() if name not in found.resizing and e is not None]
    lost = [e for name, e in found.single.items() if name in found.resizing and e is not None]
    assert found.whole < 12 and len(kept) == 13 and len(lost) == 2
    assert median(kept) < found.whole + 12, "most blocks are hardly missed"
    assert median(lost) > median(kept) + 8, "those that halve the size are"
