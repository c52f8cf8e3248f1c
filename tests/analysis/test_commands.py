"""reslearn analyze, as it is called: files, pictures, lines, errors; on real data where it is there."""

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
    """A residual net that has hardly been trained."""
    return train(
        "fashion-sample", model="resnet14", settings=SHORT, out=tmp_path_factory.mktemp("runs") / "residual", quiet=True
    ).folder


CASES = {
    "responses": (["--images", 20], "13 layers"),
    "signal": (["--images", 20, "--fresh"], "came through the shortcuts alone"),
    "lesion": (["--images", 20, "--draws", 1], "The block that is missed most is layer"),
    "paths": (["--images", 20, "--draws", 2], "6 blocks make 2^6 paths"),
    "landscape": (["--images", 10, "--size", 3], "in the middle"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_writes_numbers_and_a_picture(name: str, run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    options, line = CASES[name]
    code, said, _ = run_cli("analyze", name, run, *options, "--out", tmp_path)
    assert code == 0
    assert line in said
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["findings"] and all(finding in said for finding in result["findings"])
    assert result["command"].startswith(f"reslearn analyze {name}") and result["numbers"]
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 300
    first = (tmp_path / f"{name}.json").read_bytes()
    assert run_cli("analyze", name, run, *options, "--out", tmp_path).code == 0
    assert (tmp_path / f"{name}.json").read_bytes() == first, "the same seed, the same numbers"


def test_features_and_explain(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    assert run_cli("analyze", "features", run, "fashion-sample", "--images", 30).code == 0
    with np.load(run / "analysis" / "features.npz") as found:
        assert found["features"].shape == (30, 64) and len(found["names"]) == 30 and set(found["labels"]) <= set(range(10))
    picture = tmp_path / "one.png"
    Image.effect_noise((40, 30), 60).save(picture)
    code, printed, _ = run_cli("analyze", "explain", run, picture, "--class", "Sandal", "--json", "--out", tmp_path / "x")
    assert code == 0
    result = json.loads(printed[printed.index("{") :])
    heat = np.array(result["numbers"]["heat"])
    assert result["numbers"]["class"] == "Sandal" and heat.shape == (28, 28) and heat.min() >= 0 and heat.max() <= 1
    assert (tmp_path / "x" / f"explain-{tmp_path.name}-one-Sandal.png").exists()


def test_features_go_to_the_file_that_is_named(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("analyze", "features", run, "fashion-sample", "--images", 9, "--out", tmp_path / "new" / "mine.npz")
    assert code == 0 and "mine.npz: 9 images of fashion-sample, 64 numbers each" in out
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["mine.json", "mine.npz", "mine.png"]


def test_a_networks_name_stands_for_it_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli("analyze", "signal", "preact-resnet14", "--data", "fashion-sample", "--images", 8)
    assert code == 0 and "of its size (rounding); of the gradient" in out
    result = json.loads((tmp_path / "analysis" / "preact-resnet14" / "signal.json").read_text())
    facts = result["models"]["preact-resnet14, untrained"]
    assert facts["trained"] is False and facts["images"] == 8 and facts["split"] == "test" and result["seed"] == 0
    assert set(result["versions"]) >= {"reslearn", "torch"}


def test_several_nets_are_drawn_together(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("analyze", "responses", run, "plain14", "--data", "fashion-sample", "--images", 8, "--out", tmp_path)
    assert code == 0 and "responds least" in out
    assert list(json.loads((tmp_path / "responses.json").read_text())["numbers"]) == ["resnet14", "plain14, untrained"]
    code, out, _ = run_cli("analyze", "lesion", "plain14", "--data", "fashion-sample", "--images", 8, "--out", tmp_path)
    assert code == 0 and "Without one layer the error grows by" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["responses", "nowhere"], "nowhere"),
        (["responses", "RUN", "RUN"], "a model is given twice"),
        (["responses", "RUN", "--data", "cifar11"], "no data set or folder called 'cifar11'; did you mean 'cifar10'"),
        (["landscape", "RUN", "--size", 4], "--size 4: must be odd"),
        (["explain", "RUN", "RUN/recipe.json"], "recipe.json"),
        (["explain", "RUN", "RUN/recipe.json", "--class", "Sandel"], "the model has no class 'Sandel'; did you mean 'Sandal'"),
        (["paths", "plain8", "--data", "fashion-sample", "--images", 4], "this network is plain: it has no shortcuts"),
        (
            ["signal", "densenet-40-12", "--data", "fashion-sample", "--images", 4],
            "this network has no blocks: take a residual or a plain one",
        ),
        (
            ["responses", "vgg11", "--data", "fashion-sample", "--images", 4],
            "vgg11 cannot take images of 28x28 px: they are too small",
        ),
        (["signal", "resnet8"], "resnet8 is a network before training: say with --data which images it shall see"),
        (["signal", "resnet8", "--data", "fashion-sample", "--fresh"], "is a network before training already"),
        (["explain", "resnet8", "RUN/recipe.json"], "no model file or run folder called resnet8"),
        (["explain", "RUN", "nowhere.png"], "nowhere.png"),
        (["features", "RUN", "RUN"], "holds no images"),
        (["lesion", "RUN", "--out", "RUN/recipe.json"], "recipe.json is a file"),
        (["lesion", "RUN", "--out", "RUN/recipe.json/deeper"], "recipe.json is a file"),
        (["lesion", "RUN", "--images", 1], "should be greater than or equal to 2"),
    ],
)
def test_errors(words: list[object], line: str, run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    out = tmp_path / "out"
    given = [str(word).replace("RUN", str(run)) for word in words]
    code, _, said = run_cli("analyze", *given, *([] if "--out" in words else ["--out", out]))
    assert code == 2
    assert line in said and "Traceback" not in said and len(said.splitlines()) == 1
    assert not out.exists() and not (run / "analysis" / "lesion.json").exists()


def test_a_features_file_of_another_kind_is_refused_before_any_work(run: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("analyze", "features", run, "fashion-sample", "--out", tmp_path / "f.csv")
    assert code == 2 and "features are written as .npz or .parquet" in err and not list(tmp_path.iterdir())


def test_deleting_a_block_of_a_trained_net(real_data: Path, tmp_path: Path) -> None:
    """Veit et al., Figure 3: most blocks can be left out, those that halve the size cannot."""
    cost: dict[int, float] = {}
    for depth, file in ((20, "resnet20-12fca82f.th"), (32, "resnet32-d509ac18.th")):
        import_weights(real_data / "weights" / file, out=tmp_path / f"{depth}.safetensors")
        subject = open_subject(tmp_path / f"{depth}.safetensors", "cifar10", 120, 0)
        found = lesion(subject.model, subject.images, subject.labels, draws=1)
        kept = [e for name, e in found.single.items() if name not in found.resizing and e is not None]
        lost = [e for name, e in found.single.items() if name in found.resizing and e is not None]
        assert found.whole < 12 and len(kept) == (depth - 2) // 2 - 2 and len(lost) == 2
        assert min(kept) < found.whole + 15, "one block at least is not missed much"
        assert min(lost) > median(kept) + 8, "those that halve the size are"
        cost[depth] = median(kept) - found.whole
    assert cost[32] < cost[20] < 30, "and the less, the more blocks there are"
