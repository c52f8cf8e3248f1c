"""The command line and the Python functions, end to end."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import reslearn
from command_line import RunCli, run_reslearn
from drawing import draw_images

COMMANDS = ["train", "eval", "ensemble", "predict", "report", "pack", "doctor", "models", "summary", "deepen", "import", "export"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, data): a short run on two classes that are easy to tell apart."""
    folder = tmp_path_factory.mktemp("cli")
    data = draw_images(folder / "data", each=40)
    done = run_reslearn("train", data, "--model", "resnet8", "--out", folder / "run", "--set", "schedule.epochs=12")
    assert done.code == 0, done.err
    assert "test error 0.00%" in done.out and f"report   {folder / 'run' / 'report.html'}" in done.out
    return folder / "run", data


def test_contents_of_a_run_folder(trained: tuple[Path, Path]) -> None:
    run, _ = trained
    names = {p.name for p in run.iterdir()}
    assert names >= {"recipe.json", "metrics.jsonl", "result.json", "split.json", "report.html", "model.safetensors"}
    assert names >= {"best.safetensors", "checkpoints", "images"}
    facts = json.loads((run / "recipe.json").read_text())
    assert facts["recipe"]["schedule"]["epochs"] == 12 and facts["data"]["n"] == {"train": 60, "val": 8, "test": 12}
    assert facts["versions"]["reslearn"] == reslearn.__version__
    split = json.loads((run / "split.json").read_text())
    assert (len(split["val"]), len(split["test"])) == (8, 12) and not set(split["val"]) & set(split["test"])
    assert sum(name.startswith("a/") for name in split["test"]) == 6, "stratified"
    with Image.open(run / "images" / "augmented.png") as sheet:
        assert sheet.size == (12 * 18, 4 * 18)


def test_eval_uses_the_held_out_images_of_the_run(trained: tuple[Path, Path], run_cli: RunCli) -> None:
    run, data = trained
    result = json.loads(run_cli("eval", run, data, "--json").out)
    last = json.loads((run / "result.json").read_text())["last"]["test"]
    assert (result["split"], result["n"], result["top1_error"]) == ("test", 12, 0.0)
    assert result["loss"] == pytest.approx(last["loss"], rel=1e-5) and result["confusion"] == last["confusion"]
    assert "top5_error" not in result, "two classes have no top five"
    assert json.loads(run_cli("eval", run, data, "--json", "--split", "all").out)["n"] == 80
    shown = run_cli("eval", run / "best.safetensors", data).out
    assert "top-1 error" in shown and "accuracy by class" in shown


def test_predict_prints_a_table_json_or_csv(trained: tuple[Path, Path], run_cli: RunCli) -> None:
    run, data = trained
    file = data / "b" / "0.png"
    table = run_cli("predict", run, file).out
    assert str(file) in table and "b " in table
    line = json.loads(run_cli("predict", run, file, "--json").out)
    assert line["predictions"][0]["class"] == "b"
    assert sum(p["probability"] for p in line["predictions"]) == pytest.approx(1, abs=1e-5)
    rows = list(csv.DictReader(run_cli("predict", run, data, "--csv", "--top", "1").out.splitlines()))
    assert len(rows) == 80 and {row["rank"] for row in rows} == {"1"}
    with file.open("rb") as stdin:
        piped = json.loads(run_reslearn("predict", run, "-", "--json", stdin=stdin).out)
    assert piped["predictions"] == line["predictions"]


def test_deepen_writes_a_deeper_model_that_predicts_the_same(trained: tuple[Path, Path], tmp_path: Path, run_cli: RunCli) -> None:
    run, data = trained
    done = run_cli("deepen", run, "resnet20", "-o", tmp_path / "deep.safetensors", "--data", data)
    assert done.code == 0, done.err
    assert "80 images" in done.out and ": 0; 0 predictions differ" in done.out
    deep, shallow = reslearn.load(tmp_path / "deep.safetensors"), reslearn.load(run)
    assert deep.card.net == "resnet20" and deep.card.classes == shallow.card.classes
    files = sorted(data.rglob("*.png"))
    assert [p.classes for p in reslearn.predict(deep, files)] == [p.classes for p in reslearn.predict(shallow, files)]


def test_python_functions(trained: tuple[Path, Path]) -> None:
    run, data = trained
    model = reslearn.load(run)
    (prediction,) = reslearn.predict(model, data / "a" / "3.png")
    assert prediction.classes[0][0] == "a"
    several = reslearn.predict(model, [data / "a" / "3.png", data / "none.png"])
    assert several[0].classes == prediction.classes and "none.png" in (several[1].error or "")
    assert reslearn.evaluate(model, data, "all")["n"] == 80


def test_a_finished_run_is_not_trained_again(trained: tuple[Path, Path], run_cli: RunCli) -> None:
    run, _ = trained
    before = (run / "model.safetensors").read_bytes()
    done = run_cli("train", "--resume", run)
    assert done.code == 0 and "is complete" in done.out
    assert (run / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(command: str, run_cli: RunCli) -> None:
    code, out, _ = run_cli(command, "--help")
    assert code == 0
    assert f"reslearn {command} " in out.split("Examples:")[1]


def test_photos_train_evaluate_and_predict(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "photos", each=24, size=(90, 120))
    settings = ["schedule.steps=3", "data.size=64"]
    run = reslearn.train(data, model="resnet18", settings=settings, out=tmp_path / "run", quiet=True)
    assert run.result["last"]["test"]["n"] == 7
    assert reslearn.evaluate(run.folder, data)["confusion"] == run.result["last"]["test"]["confusion"]
    (prediction,) = reslearn.predict(reslearn.load(run.folder), data / "a" / "0.png")
    assert {name for name, _ in prediction.classes} == {"a", "b"}


def test_one_image_per_class(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "d", classes="abcdefgh", each=1)
    run = reslearn.train(data, model="resnet8", settings=["schedule.steps=3"], out=tmp_path / "run", quiet=True)
    assert run.result["last"]["train"]["n"] == 8 and "val" not in run.result["last"]
    assert run.result["last"]["train"]["top5_error"] <= run.result["last"]["train"]["top1_error"]
