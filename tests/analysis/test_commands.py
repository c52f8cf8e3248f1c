"""The analyze commands: files, figures, findings and errors; on real data where available."""

import json
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

from command_line import RunCli
from reslearn import train
from reslearn.analysis.lesion import lesion
from reslearn.analysis.subject import open_subject
from reslearn.weights.read import import_weights

SHORT = ["schedule.steps=4", "batch.size=16", "log.every=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A residual net after a few training steps."""
    return train(
        "fashion-sample", model="resnet14", settings=SHORT, out=tmp_path_factory.mktemp("runs") / "residual", quiet=True
    ).folder


CASES = {
    "responses": (["--images", 20], "13 layers"),
    "signal": (["--images", 20, "--fresh"], "came through the shortcuts alone"),
    "lesion": (["--images", 20, "--draws", 1], "The most important block is layer"),
    "paths": (["--images", 20, "--draws", 2], "6 blocks make 2^6 paths"),
    "landscape": (["--images", 10, "--size", 3], "at the center"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_analysis_writes_numbers_and_a_figure(name: str, run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    options, line = CASES[name]
    code, out, _ = run_cli("analyze", name, run, *options, "--out", tmp_path)
    assert code == 0
    assert line in out
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["findings"] and all(finding in out for finding in result["findings"])
    assert result["command"].startswith(f"reslearn analyze {name}") and result["numbers"]
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 300
    first = (tmp_path / f"{name}.json").read_bytes()
    assert run_cli("analyze", name, run, *options, "--out", tmp_path).code == 0
    assert (tmp_path / f"{name}.json").read_bytes() == first, "the same seed, the same numbers"


def test_features_and_explain(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    assert run_cli("analyze", "features", run, "fashion-sample", "--images", 30).code == 0
    with np.load(run / "analysis" / "features.npz") as saved:
        assert saved["features"].shape == (30, 64) and len(saved["names"]) == 30 and set(saved["labels"]) <= set(range(10))
    image = tmp_path / "one.png"
    Image.effect_noise((40, 30), 60).save(image)
    code, printed, _ = run_cli("analyze", "explain", run, image, "--class", "Sandal", "--json", "--out", tmp_path / "x")
    assert code == 0
    result = json.loads(printed[printed.index("{") :])
    heat = np.array(result["numbers"]["heat"])
    assert result["numbers"]["class"] == "Sandal" and heat.shape == (28, 28) and heat.min() >= 0 and heat.max() <= 1
    assert (tmp_path / "x" / f"explain-{tmp_path.name}-one-Sandal.png").exists()


def test_features_are_written_to_the_named_file(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("analyze", "features", run, "fashion-sample", "--images", 9, "--out", tmp_path / "new" / "mine.npz")
    assert code == 0 and "mine.npz: 9 images of fashion-sample, 64 features each" in out
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["mine.json", "mine.npz", "mine.png"]


def test_a_network_name_selects_the_untrained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli("analyze", "signal", "preact-resnet14", "--data", "fashion-sample", "--images", 8)
    assert code == 0 and " (rounding); of the gradient, " in out
    result = json.loads((tmp_path / "analysis" / "preact-resnet14" / "signal.json").read_text())
    facts = result["models"]["preact-resnet14, untrained"]
    assert facts["trained"] is False and facts["images"] == 8 and facts["split"] == "test" and result["seed"] == 0
    assert set(result["versions"]) >= {"reslearn", "torch"}


def test_several_networks_share_a_figure(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("analyze", "responses", run, "plain14", "--data", "fashion-sample", "--images", 8, "--out", tmp_path)
    assert code == 0 and "has the smallest responses" in out
    assert list(json.loads((tmp_path / "responses.json").read_text())["numbers"]) == ["resnet14", "plain14, untrained"]
    code, out, _ = run_cli("analyze", "lesion", "plain14", "--data", "fashion-sample", "--images", 8, "--out", tmp_path)
    assert code == 0 and "Removing one layer increases the error by" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["responses", "nowhere"], "nowhere"),
        (["responses", "RUN", "RUN"], "the same model is given twice"),
        (["responses", "RUN", "--data", "cifar11"], "no data set or folder called 'cifar11'; did you mean 'cifar10'"),
        (["landscape", "RUN", "--size", 4], "--size 4: must be odd"),
        (["explain", "RUN", "RUN/recipe.json"], "recipe.json"),
        (["explain", "RUN", "RUN/recipe.json", "--class", "Sandel"], "the model has no class 'Sandel'; did you mean 'Sandal'"),
        (["paths", "plain8", "--data", "fashion-sample", "--images", 4], "this network has no shortcuts"),
        (["signal", "densenet-40-12", "--data", "fashion-sample", "--images", 4], "this network has no blocks"),
        (["responses", "vgg11", "--data", "fashion-sample", "--images", 4], "vgg11 cannot take images of 28x28 px"),
        (["signal", "resnet8"], "resnet8 is an untrained network: choose a data set with --data"),
        (["signal", "resnet8", "--data", "fashion-sample", "--fresh"], "is already untrained: leave out --fresh"),
        (["explain", "resnet8", "RUN/recipe.json"], "no model file or run folder called resnet8"),
        (["explain", "RUN", "nowhere.png"], "nowhere.png"),
        (["features", "RUN", "RUN"], "contains no images"),
        (["lesion", "RUN", "--out", "RUN/recipe.json"], "recipe.json is a file"),
        (["lesion", "RUN", "--out", "RUN/recipe.json/deeper"], "recipe.json is a file"),
        (["lesion", "RUN", "--images", 1], "should be greater than or equal to 2"),
    ],
)
def test_errors(words: list[object], line: str, run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "out"
    arguments = [str(word).replace("RUN", str(run)) for word in words]
    code, _, err = run_cli("analyze", *arguments, *([] if "--out" in words else ["--out", out]))
    assert code == 2
    assert line in err and "Traceback" not in err and len(err.splitlines()) == 1
    assert not out.exists() and not (run / "analysis" / "lesion.json").exists()


def test_an_unknown_features_format_is_rejected_before_any_work(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("analyze", "features", run, "fashion-sample", "--out", tmp_path / "f.csv")
    assert code == 2 and "features are saved as .npz or .parquet" in err and not list(tmp_path.iterdir())


def test_deleting_a_block_of_a_trained_net(real_data: Path, tmp_path: Path) -> None:
    """Veit et al., Figure 3: most blocks can be removed; those that halve the size cannot."""
    cost: dict[int, float] = {}
    for depth, file in ((20, "resnet20-12fca82f.th"), (32, "resnet32-d509ac18.th")):
        import_weights(real_data / "weights" / file, out=tmp_path / f"{depth}.safetensors")
        subject = open_subject(tmp_path / f"{depth}.safetensors", "cifar10", 120, 0)
        result = lesion(subject.model, subject.images, subject.labels, draws=1)
        same = [e for name, e in result.single.items() if name not in result.resizing and e is not None]
        halving = [e for name, e in result.single.items() if name in result.resizing and e is not None]
        assert result.whole < 12 and len(same) == (depth - 2) // 2 - 2 and len(halving) == 2
        assert min(same) < result.whole + 15, "at least one block is not important"
        assert min(halving) > median(same) + 8, "blocks that halve the size are"
        cost[depth] = median(same) - result.whole
    assert cost[32] < cost[20] < 30, "one block matters less in a deeper network"
