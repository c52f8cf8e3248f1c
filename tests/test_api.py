"""What the command line can do, from Python; and how results look in a notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import boxed
import reslearn
from command_line import RunCli
from reslearn import Run, UserError
from reslearn.training.request import SHORTHANDS, parse

QUICK = {"settings": ["log.every=1"], "quiet": True, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("api") / "run"
    return reslearn.train("fashion-sample", model="resnet8", epochs=0.1, batch=32, lr=0.05, out=out, **QUICK)


def test_arguments_set_the_keys_they_stand_for(images: Path) -> None:
    request = parse(images, model="resnet8", epochs=3, size=24, batch=16, lr=0.1, seed=5)
    assert request.settings == {
        "net.name": "resnet8",
        "schedule.epochs": 3,
        "data.size": 24,
        "batch.size": 16,
        "schedule.lr": 0.1,
        "seed": 5,
    }
    assert set(request.settings) < set(SHORTHANDS.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3, "settings": ["schedule.epochs=4"]}, "--epochs 3 and --set schedule.epochs=4: give only one of them"),
        ({"epochs": 3, "settings": ["schedule.steps=4"]}, "--epochs 3 and --set schedule.steps=4: give only one of them"),
        ({"lr": 0.1, "settings": {"schedule.lr": 0.2}}, "--lr 0.1 and --set schedule.lr=0.2"),
        ({"size": 64, "task": "detect"}, "--size does not apply to task 'detect', whose recipes have no key 'data.size'"),
    ],
)
def test_two_values_for_a_key_are_rejected(options: dict, message: str, images: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse(images, **options)


def test_options_of_the_command_line(images: Path, tmp_path: Path, run_cli: RunCli) -> None:
    words = [
        "train",
        images,
        "--model",
        "resnet8",
        "--epochs",
        1,
        "--size",
        8,
        "--batch",
        4,
        "--lr",
        0.01,
        "--out",
        tmp_path / "run",
    ]
    assert run_cli(*words).code == 0
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]
    assert (recipe["schedule"]["epochs"], recipe["data"]["size"], recipe["batch"]["size"], recipe["schedule"]["lr"]) == (
        1,
        8,
        4,
        0.01,
    )


def test_results_look_like_something(run: Run) -> None:
    assert repr(run).startswith(f"Run('{run.folder}', classify: held-out error ") and "<table>" in run._repr_html_()
    model = reslearn.load(run.folder)
    assert "Ankle boot" in model._repr_html_() and "resnet8" in model._repr_html_()
    assert "parameters" in reslearn.create("resnet8")._repr_html_()
    found = reslearn.evaluate(model, "fashion-sample")
    assert "top-1 error" in repr(found) and "accuracy of Bag" in found._repr_html_() and json.dumps(found)
    assert "cifar10-paper" in reslearn.recipe("cifar10-paper")._repr_html_()


def test_predictions_show_their_images(run: Run, tmp_path: Path) -> None:
    (tmp_path / "<b>.png").write_bytes(b"no image")
    clothes = Path(__file__).parents[1] / "examples" / "clothes"
    predictions = reslearn.predict(run.folder, [clothes / "bag.png", tmp_path / "<b>.png"], top=2)
    page = predictions._repr_html_()
    assert page.count("<img ") == 1 and "&lt;b&gt;.png" in page and "<b>.png" not in page
    assert len(reslearn.predict(run.folder, clothes)) == 10, "folders are expanded"
    assert repr(predictions).count("\n") == 1 and "bag.png" in repr(predictions)


def test_a_recipe_object_can_be_changed_and_trained(images: Path, tmp_path: Path) -> None:
    recipe = reslearn.recipe("default", images, model="resnet8")
    recipe = recipe.model_copy(update={"schedule": recipe.schedule.model_copy(update={"epochs": 1.0})})
    done = reslearn.train(images, recipe, out=tmp_path / "run", quiet=True, device="cpu")
    assert json.loads((done.folder / "recipe.json").read_text())["recipe"]["schedule"]["epochs"] == 1
    with pytest.raises(UserError, match="no recipe 'defalt'; did you mean 'default'"):
        reslearn.recipe("defalt")


def test_seeds_and_reports(images: Path, tmp_path: Path) -> None:
    runs = reslearn.train_seeds(
        images, seeds=2, model="resnet8", epochs=0.5, batch=8, out=tmp_path / "two", quiet=True, device="cpu"
    )
    assert [one.folder.name for one in runs] == ["seed-0", "seed-1"] and (tmp_path / "two" / "seeds.json").exists()
    (tmp_path / "two" / "report.html").unlink()
    assert reslearn.write_report(tmp_path / "two") == tmp_path / "two" / "report.html"
    assert reslearn.write_report([one.folder for one in runs], tmp_path / "compare.html").exists()
    with pytest.raises(UserError, match="several runs needs a file"):
        reslearn.write_report([one.folder for one in runs])
    assert [one.folder for one in reslearn.resume_seeds(tmp_path / "two", quiet=True)] == [one.folder for one in runs]


def test_doctor(images: Path, tmp_path: Path) -> None:
    assert reslearn.doctor(images).clean
    next(images.rglob("*.png")).write_bytes(b"")
    diagnosis = reslearn.doctor(images, tmp_path / "clean.csv")
    assert not diagnosis.clean and (tmp_path / "clean.csv").read_text().count("\n") == 24


def test_summary() -> None:
    assert reslearn.summary("resnet20").parameters == 269_722 == sum(row.parameters for row in reslearn.summary("resnet20").rows)
    small, large = (sum(row.macs for row in reslearn.summary("resnet18", (3, side, side)).rows) for side in (64, 128))
    assert 3.5 < large / small < 4.5


def test_features(run: Run) -> None:
    rows = reslearn.features(run.folder, [Path(__file__).parents[1] / "examples" / "clothes"])
    assert rows.shape == (10, 64) and rows.dtype == np.float32 and (rows >= 0).all()
    one = reslearn.features(run.folder, Path(__file__).parents[1] / "examples" / "clothes" / "ankle-boot.png")
    assert one.shape == (1, 64) and np.allclose(one, rows[:1], atol=1e-4)
    with pytest.raises(UserError, match="the model has no card"):
        reslearn.features(reslearn.create("resnet8"), ["a.png"])


def test_detect_objects(tmp_path: Path) -> None:
    from reslearn.detect import create_detector, save_detector

    torch.manual_seed(0)
    boxed.shapes(tmp_path / "set", images=2)
    model = save_detector(create_detector("resnet8", ["a", "b"], min_size=48, max_size=64), tmp_path / "model.safetensors")
    found = reslearn.detect_objects(model, [tmp_path / "set" / "JPEGImages"], score=0.0)
    assert len(found) == 2 and all(one.error is None and one.detections is not None for one in found)
    assert found[0].classes == ("a", "b") and str(found[0].file) in repr(found[0])
    one = reslearn.detect_objects(model, found[0].file, score=0.0)
    assert [image.as_json() for image in one] == [found[0].as_json()]
    with pytest.raises(UserError, match="score=5: must be from 0 to 1"):
        reslearn.detect_objects(model, found[0].file, score=5)


def test_type_checkers_know_the_public_names(tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(
        "import reslearn\n"
        "run = reslearn.train('photos', epochs=3)\n"
        "reveal_type(run)\n"
        "reslearn.train('photos', epoch=3)\n"
        "reslearn.nothing\n"
    )
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "use.py"]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    messages = [(one["range"]["start"]["line"], one["message"]) for one in json.loads(found.stdout)["generalDiagnostics"]]
    assert 'Type of "run" is "Run"' in dict(messages)[2] and {line for line, _ in messages} >= {2, 3, 4}, messages


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish/completions/reslearn.fish")]
)
def test_completion_is_installed(shell: str, file: str, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    reslearn_script = Path(sys.executable).with_name("reslearn")  # the shell completes the installed command
    done = subprocess.run(
        [reslearn_script, "--install-completion", shell], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and f"{shell} completion installed" in done.stdout and (tmp_path / file).is_file(), done.stderr
    variables = {
        "bash": {"COMP_WORDS": "reslearn train --ep", "COMP_CWORD": "2"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "reslearn train --ep"},
        "fish": {"_TYPER_COMPLETE_ARGS": "reslearn train --ep", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }
    asked = os.environ | {"_RESLEARN_COMPLETE": f"complete_{shell}", **variables[shell]}
    assert "--epochs" in subprocess.run([reslearn_script], env=asked, capture_output=True, text=True).stdout
