"""Mistakes and situations of the first hour with the program, each with a message that leads on."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import boxed
from command_line import RunCli, run_reslearn
from reslearn import Notice, UserError, export, import_weights, load, train
from reslearn.training import checkpoint

QUICK = ["--set", "schedule.steps=2", "--set", "batch.size=4"]


@pytest.fixture
def unfinished(images: Path, tmp_path: Path) -> Path:
    """A run as it is when it has been killed after its last checkpoint."""
    settings = ["schedule.steps=4", "batch.size=4", "checkpoint.every=2", "evaluate.every=2"]
    run = train(images, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True, device="cpu").folder
    for name in ("model.safetensors", "best.safetensors", "result.json"):
        (run / name).unlink()
    return run


def test_an_unfinished_run_is_used_with_its_best_weights(unfinished: Path, images: Path) -> None:
    note = f"{unfinished} has not finished: using its best weights so far (checkpoint of step 4)"
    with pytest.warns(Notice, match="best weights so far"):
        assert load(unfinished).card.classes == ("a", "b")
    for words in (["predict", unfinished, images], ["eval", unfinished, images, "--json"]):
        done = run_reslearn(*words)
        assert done.code == 0 and done.err.count(note) == 1 and "Warning" not in done.err, done.err
    out = unfinished.parent / "tuned"
    done = run_reslearn("train", images, "--init", unfinished, *QUICK, "--out", out)
    assert done.code == 0 and note in done.err and (out / "model.safetensors").exists(), done.err
    best = next((unfinished / "checkpoints").glob("*4/best.safetensors"))
    best.write_bytes(b"")
    with pytest.warns(Notice), pytest.raises(UserError, match="is not a complete safetensors file"):
        load(unfinished)


def test_a_run_without_a_checkpoint_is_not_used(unfinished: Path) -> None:
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(
        UserError,
        match=r"no model.safetensors in .*\(the run has not finished and has no weights to use yet: resume it with --resume\)",
    ):
        load(unfinished)


def test_an_unfinished_detector_is_used(tmp_path: Path) -> None:
    data = boxed.shapes(boxed.shapes(tmp_path / "set", images=2, split="val"), images=4)
    settings = ["schedule.steps=2", "detector.regions=8", "detector.anchors=[20]", "evaluate.every=1"]
    run = train(data, model="resnet8", settings=settings, task="detect", out=tmp_path / "run", quiet=True, device="cpu").folder
    finished = run_reslearn("detect", "eval", run, data, "--split", "val", "--json")
    for name in ("model.safetensors", "best.safetensors"):
        (run / name).rename(tmp_path / name)
    done = run_reslearn("detect", "eval", run, data, "--split", "val", "--json")
    assert done.code == finished.code == 0 and "best weights so far" in done.err, done.err
    assert len(checkpoint.find(run / "checkpoints")) == 1 and json.loads(done.out)["n"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "DATA", "--weight-decay", "1"],
            "No such option: --weight-decay; to set the recipe key: --set optimizer.weight_decay",
        ),
        (["train", "DATA", "--steps", "9"], "; to set the recipe key: --set schedule.steps=VALUE"),
        (["detect", "train", "DATA", "--kind", "fpn"], "; to set the recipe key: --set detector.kind=VALUE"),
        (["localize", "train", "DATA", "--hidden", "9"], "; to set the recipe key: --set localizer.hidden=VALUE"),
        (["train", "DATA", "--nonsense", "9"], "No such option: --nonsense"),
        (["eval", "DATA", "DATA", "--steps", "9"], "No such option: --steps"),
        (["train", "DATA", "--epochs", "abc"], "Invalid value for '--epochs': must be a valid number"),
        (["train", "DATA", "--set", "schedule.epochs=abc"], "schedule.epochs: must be a number (not 'abc')"),
        (["train", "PARENT"], "if a, b are the classes, use the folder images in it"),
        (["detect", "train", "DATA"], "; to train a classifier on class folders: reslearn train "),
        (["train", "BOXES"], "is a set with boxes: train a detector with reslearn detect train"),
    ],
)
def test_messages_lead_on(words: list[str], message: str, images: Path, tmp_path: Path, run_cli: RunCli) -> None:
    boxes = boxed.shapes(tmp_path / "boxes", images=1) if "BOXES" in words else None
    places = {"DATA": images, "PARENT": tmp_path, "BOXES": boxes}
    code, out, err = run_cli(*(places.get(word, word) for word in words))
    assert code == 2 and not out and message in err and err.count("\n") == 1, err


def test_out_is_checked_before_the_data_is_read(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run_cli("train", "nowhere", "--out", tmp_path / "file" / "run")
    assert code == 2 and f"cannot write {tmp_path}/file/run" in err, err


def test_a_class_with_one_image_is_named(images: Path, tmp_path: Path, run_cli: RunCli) -> None:
    (images / "lone").mkdir()
    shutil.copy(next((images / "a").iterdir()), images / "lone")
    done = run_cli("train", images, "--model", "resnet8", *QUICK, "--out", tmp_path / "run")
    assert done.code == 0 and "warning  one image only: lone: " in done.out


def test_a_huge_photo_cites_one_limit(images: Path, tmp_path: Path, run_cli: RunCli) -> None:
    Image.new("1", (30_000, 20_000)).save(images / "a" / "huge.png")
    code, _, err = run_cli("train", images, "--out", tmp_path / "run")
    assert code == 2 and "huge.png: 600,000,000 pixels exceed the limit of 100,000,000: resize the image;" in err


def test_exports_come_back_with_classes_and_input_size(photos: Path, tmp_path: Path) -> None:
    settings = ["schedule.steps=1", "batch.size=4", "data.size=48"]
    run = train(photos, model="resnet18", settings=settings, out=tmp_path / "run", quiet=True, device="cpu").folder
    card = load(run).card
    back, notes = import_weights(export(run, "timm", tmp_path / "timm"), out=tmp_path / "back.safetensors")
    direct = export(run, "torchvision", tmp_path / "torchvision.safetensors")
    for other in (load(back).card, load(direct).card):
        assert other.classes == card.classes and other.preprocessing.size == (48, 48)
        assert other.preprocessing.mean == pytest.approx(card.preprocessing.mean) and other.net == card.net
    assert "input: 48x48 px, mean and std from config.json" in notes
    config = tmp_path / "timm" / "config.json"
    sound = json.loads(config.read_text())
    broken = {
        json.dumps(sound | {"pretrained_cfg": 3}): "pretrained_cfg: must be a table",
        json.dumps(
            sound | {"architecture": "resnet34"}
        ): "is of resnet34 with 2 classes and 3 channels, the weights are of resnet18",
        json.dumps(sound | {"label_names": ["a", "a"]}): "1 label_names for a head of 2 classes",
        '{"model_type": "bert"}': "architecture: is missing; expected the config of a timm model",
        "{": "config.json",
    }
    for text, message in broken.items():
        config.write_text(text)
        with pytest.raises(UserError, match=message):
            import_weights(tmp_path / "timm", out=tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()
    _, notes = import_weights(tmp_path / "timm" / "model.safetensors", out=tmp_path / "other.safetensors")
    assert any(note.startswith("ignored ") for note in notes), "a file's neighbor may be of another model"
    assert load(tmp_path / "other.safetensors").card.classes == ("class0", "class1")


def test_a_folder_of_boxes_is_not_taken_for_class_folders(tmp_path: Path, run_cli: RunCli) -> None:
    boxed.shapes(tmp_path / "voc", images=1)
    shutil.rmtree(tmp_path / "voc" / "ImageSets")
    code, _, err = run_cli("detect", "train", tmp_path / "voc")
    assert code == 2 and "ImageSets/Main/train.txt" in err and "classifier" not in err


def test_averaged_weights_of_an_unfinished_run_are_not_replaced_by_raw_ones(images: Path, tmp_path: Path) -> None:
    settings = ["schedule.steps=2", "batch.size=4", "ema=0.9", "data.val=0"]
    run = train(images, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True, device="cpu").folder
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights to use yet: resume it with --resume"):
        load(run)
