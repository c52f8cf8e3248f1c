"""Invalid input: a one-line error, exit code 2, and no files written."""

import json
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock

import reslearn
from command_line import RunCli
from drawing import draw_images
from reslearn.data.preprocess import Preprocessing
from reslearn.training import checkpoint

Argv = list[str]
QUICK = ["--model", "resnet8", "--set", "schedule.steps=2", "--set", "batch.size=4"]


def tree(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.name != "lock"}


def png(height: int, width: int) -> bytes:
    """A valid PNG of black pixels in a few bytes, for any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(b"\0" * (1 + width // 8)) for _ in range(height)) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def put(path: Path, content: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def train_on(make: Callable[[Path], object], *more: str) -> Callable[[Path], Argv]:
    """A case that creates data and trains on it."""

    def case(tmp: Path) -> Argv:
        made = make(tmp / "data")
        return ["train", str(made if isinstance(made, Path) else tmp / "data"), "--out", str(tmp / "run"), *QUICK, *more]

    return case


def good_folder_with(*more: str) -> Callable[[Path], Argv]:
    return train_on(lambda data: draw_images(data), *more)


def with_file(name: str, content: bytes | str, size: tuple[int, int] = (16, 16)) -> Callable[[Path], Argv]:
    return train_on(lambda data: (draw_images(data, size=size), put(data / name, content)))


def listed(name: str, text: str) -> Callable[[Path], Argv]:
    def make(data: Path) -> Path:
        draw_images(data)
        return put(data / name, text)

    return train_on(make)


def truncated_photo(data: Path) -> None:
    draw_images(data, size=(90, 120))
    whole = (data / "a" / "0.png").read_bytes()
    put(data / "a" / "0.png", whole[: len(whole) // 2])


def finished(tmp: Path) -> Path:
    """A finished run in tmp/run, on tmp/data."""
    draw_images(tmp / "data")
    settings = ["schedule.steps=4", "batch.size=4", "checkpoint.every=2"]
    reslearn.train(tmp / "data", model="resnet8", settings=settings, out=tmp / "run", quiet=True)
    return tmp / "run"


def interrupted(tmp: Path, spoil: Callable[[Path], object]) -> Argv:
    """Resume an unfinished run whose folder was changed."""
    run = finished(tmp)
    (run / "result.json").unlink()
    shutil.copytree(newest(run), run / "checkpoints" / "step-00000002")  # the previous one, which is deleted at the end of a run
    spoil(run)
    return ["train", "--resume", str(run)]


def newest(run: Path) -> Path:
    return checkpoint.find(run / "checkpoints")[-1]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def other_shapes(run: Path) -> None:
    """Replace the checkpoint by a valid one of another network."""
    saved = checkpoint.load(newest(run))
    saved.model["fc.weight"] = torch.zeros(3, 64)
    step = int(newest(run).name.split("-")[1])
    for old in checkpoint.find(run / "checkpoints"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    checkpoint.save(run / "checkpoints", step, saved)


def changed_images(run: Path) -> None:
    (run.parent / "data" / "a" / "0.png").unlink()


def model(tmp: Path, classes: tuple[str, ...] = ("a", "b")) -> Path:
    view = Preprocessing(channels=3, size=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3)
    card = reslearn.Card(net="resnet8", classes=classes, preprocessing=view)
    return reslearn.save(reslearn.create("resnet8", len(classes)), tmp / "model.safetensors", card)


def no_card(tmp: Path) -> Path:
    path = tmp / "bare.safetensors"
    safetensors.torch.save_file(reslearn.create("resnet8").state_dict(), path)
    return path


def full_run_folder(tmp: Path) -> Argv:
    put(tmp / "run" / "notes.txt", "mine")
    return good_folder_with()(tmp)


def empty_file_for_run(tmp: Path) -> Argv:
    put(tmp / "run")
    return good_folder_with()(tmp)


def cut_cifar(tmp: Path) -> Argv:
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        put(tmp / "cifar-10-batches-bin" / name, b"\0" * 3073)
    return ["train", str(tmp / "cifar-10-batches-bin"), "--out", str(tmp / "run")]


CASES: dict[str, tuple[Callable[[Path], Argv], str]] = {
    # the data
    "missing path": (lambda t: ["train", str(t / "none")], "no data set or folder called"),
    "misspelt data set": (lambda t: ["train", "cifar01"], "did you mean 'cifar10'"),
    "empty folder": (train_on(lambda d: d.mkdir()), "data"),
    "images without class folders": (train_on(lambda d: put(d / "1.png", png(9, 9)).parent), "class"),
    "one class": (train_on(lambda d: draw_images(d, classes="a")), "images of one class only (a)"),
    "one image": (train_on(lambda d: draw_images(d, classes="a", each=1)), "images of one class only (a)"),
    "a class only in test": (train_on(lambda d: (draw_images(d / "train"), draw_images(d / "test", classes="abc"))), "'c'"),
    "a class folder without images": (train_on(lambda d: (draw_images(d), put(d / "c" / "notes.txt"))), "data/c"),
    "flat validation images without a list": (
        train_on(lambda d: (draw_images(d / "train"), put(d / "val" / "1.png", png(9, 9)))),
        "ImageNet's flat validation images need a list of labels beside them: val.csv",
    ),
    "a flat validation image that its list does not name": (
        train_on(lambda d: (draw_images(d / "train"), put(d / "val" / "1.png", png(9, 9)), put(d / "val.csv", "2.png,a\n"))),
        "val.csv: no class for 1.png",
    ),
    "only a test folder": (train_on(lambda d: draw_images(d / "test").parent), "has no training images"),
    "an empty image": (with_file("a/x.png", b""), "x.png"),
    "html saved as jpeg": (with_file("a/x.jpg", "<!DOCTYPE html><html>"), "x.jpg"),
    "random bytes as png": (with_file("a/x.png", bytes(range(256))), "x.png"),
    "a truncated small image": (with_file("a/x.png", png(16, 16)[:45]), "x.png"),
    "a truncated photo": (train_on(truncated_photo), "0.png"),
    "a 12000x12000 bomb": (with_file("a/x.png", png(12_000, 12_000)), "x.png"),
    "a text file as data": (train_on(lambda d: put(d / "x.txt", "hello")), "x.txt"),
    "a list without labels": (listed("l.csv", "file\na/0.png\n"), "label"),
    "a list with an unknown column": (listed("l.csv", "file,label,splt\na/0.png,a,train\n"), "did you mean 'split'"),
    "a list with a missing file": (listed("l.csv", "file,label\na/0.png,a\na/none.png,b\n"), "none.png"),
    "a list with an unknown split": (listed("l.csv", "file,label,split\na/0.png,a,trian\n"), "trian"),
    "an empty list": (listed("l.csv", "file,label\n"), "l.csv"),
    "a list that names a file twice": (listed("l.csv", "file,label\na/0.png,a\na/0.png,b\n"), "0.png"),
    "a broken line in a list": (listed("l.jsonl", '{"file": "a/0.png", "label": "a"}\n{"file"\n'), "2"),
    "an unknown key in a list": (listed("l.jsonl", '{"file": "a/0.png", "lable": "a"}\n'), "did you mean 'label'"),
    "CIFAR files cut short": (cut_cifar, "data_batch_1.bin"),
    # the recipe
    "unknown model": (good_folder_with("--model", "resnt20"), "did you mean 'resnet20'"),
    "unknown recipe": (good_folder_with("--recipe", "defualt"), "did you mean 'default'"),
    "missing recipe file": (good_folder_with("--recipe", "none.toml"), "none.toml"),
    "unknown key": (good_folder_with("--set", "schedule.epoch=3"), "did you mean 'schedule.epochs'"),
    "a key without a value": (good_folder_with("--set", "schedule.epochs"), "key=value"),
    "a value of the wrong kind": (good_folder_with("--set", "batch.size=big"), "batch.size"),
    "a value out of range": (good_folder_with("--set", "schedule.lr=0"), "schedule.lr"),
    "a misspelt value": (good_folder_with("--set", "schedule.shape=cosinus"), "did you mean 'cosine'"),
    "an option for photos": (good_folder_with("--set", "data.crop_scale=[0.5,1]"), "applies to photos"),
    "an option for small images": (
        train_on(lambda d: draw_images(d, size=(90, 99)), "--set", "data.pad=4"),
        "applies to small images",
    ),
    "more held out than there is": (good_folder_with("--set", "data.test=24"), "24 of 24 images"),
    "a share of what is divided already": (
        train_on(lambda d: (draw_images(d / "train"), draw_images(d / "val"))[0].parent, "--set", "data.val=0.2"),
        "has its own val images",
    ),
    "a recipe for other images": (good_folder_with("--recipe", "cifar10-paper"), "is for 32x32 color images"),
    "a net that shrinks too much": (good_folder_with("--model", "resnet18"), "use a CIFAR net"),
    "a negative seed": (good_folder_with("--seed", "-1"), "seed"),
    "a seed that is no number": (good_folder_with("--seed", "x"), "--seed"),
    # the command line
    "unknown command": (lambda t: ["trian"], "Did you mean 'train'"),
    "unknown option": (lambda t: ["train", "x", "--modle", "y"], "--model"),
    "nothing to train on": (lambda t: ["train", "--seed", "1"], "reslearn train DATA"),
    "unknown device": (good_folder_with("--device", "gpu"), "no device 'gpu'"),
    "a device that is not there": (good_folder_with("--device", "cuda"), "is not available; available: "),
    # run folders
    "a run in the same folder": (lambda t: (finished(t), good_folder_with()(t))[1], "already contains a run"),
    "a folder with other things": (full_run_folder, "not an empty folder"),
    "a file instead of a folder": (empty_file_for_run, "not an empty folder"),
    "resume with a recipe": (lambda t: ["train", "--resume", str(t), "--seed", "0"], "--seed"),
    "resume a folder that is not there": (lambda t: ["train", "--resume", str(t / "none")], "is not a run folder"),
    "resume what is no run": (lambda t: ["train", "--resume", str(t)], "is not a run folder"),
    "a damaged recipe": (lambda t: interrupted(t, lambda r: put(r / "recipe.json", "{")), "is damaged"),
    "other images than before": (lambda t: interrupted(t, changed_images), "has changed"),
    "a flipped bit in the weights": (
        lambda t: interrupted(t, lambda r: flip_bit(newest(r) / "model.safetensors")),
        "to resume from step-00000002",
    ),
    "a flipped bit in the state": (lambda t: interrupted(t, lambda r: flip_bit(newest(r) / "state.json")), "is damaged"),
    "a checkpoint file gone": (lambda t: interrupted(t, lambda r: (newest(r) / "state.safetensors").unlink()), "is missing"),
    "a manifest that is no JSON": (
        lambda t: interrupted(t, lambda r: put(newest(r) / "manifest.json", "[")),
        "manifest.json is damaged",
    ),
    "wrong shapes in a checkpoint": (lambda t: interrupted(t, other_shapes), "'fc.weight' has shape (3, 64), not (2, 64)"),
    # using a model
    "evaluate what is not there": (lambda t: ["eval", str(t / "none"), "cifar10"], "no model file or run folder"),
    "evaluate an unfinished run": (lambda t: ["eval", str(put(t / "r" / "recipe.json").parent), "x"], "has not finished"),
    "evaluate classes it does not know": (
        lambda t: ["eval", str(model(t)), str(draw_images(t / "d", classes="abc"))],
        "has no class 'c'",
    ),
    "evaluate a split that is not there": (
        lambda t: ["eval", str(model(t)), str(draw_images(t / "d")), "--split", "test"],
        "has no split 'test'",
    ),
    "a model without a card": (lambda t: ["predict", str(no_card(t)), str(t)], "no reslearn card"),
    "a model cut short": (
        lambda t: ["predict", str(put(t / "cut.safetensors", model(t).read_bytes()[:-9])), str(t)],
        "not a complete safetensors file",
    ),
    "predict a file that is not there": (lambda t: ["predict", str(model(t)), str(t / "no.png")], "there is no such file"),
    "predict a folder without images": (lambda t: ["predict", str(model(t)), str(put(t / "d" / "x.txt").parent)], "no images in"),
    "a set with boxes": (
        lambda t: ["eval", str(model(t)), str(put(t / "d" / "annotations" / "instances_test.json").parents[1])],
        "/d is a set with boxes: evaluate a detector on it with reslearn detect eval",
    ),
    "two formats at once": (lambda t: ["predict", str(model(t)), str(t), "--json", "--csv"], "choose --json or --csv"),
    "no class at all": (lambda t: ["predict", str(model(t)), str(t), "--top", "0"], "--top"),
    "a net that is not deeper": (
        lambda t: ["deepen", str(model(t)), "plain20", "-o", str(t / "o.safetensors")],
        "is not a deeper 'resnet8': it differs in block",
    ),
    "a network that is none": (lambda t: ["summary", "resnt50"], "did you mean 'resnet50'"),
    "an input that is none": (lambda t: ["summary", "resnet20", "--input", "32x32"], "CHANNELSxHEIGHTxWIDTH"),
    "an input that does not fit": (lambda t: ["summary", "vgg11", "--input", "3x8x8"], "does not support an input of 3x8x8"),
    "a pattern that matches nothing": (lambda t: ["models", "resnext*"], "no network matches 'resnext*'"),
    "report what is no run": (lambda t: ["report", str(t)], "recipe.json"),
    "report several runs nowhere": (lambda t: ["report", str(t), str(t)], "-o PAGE.html"),
}


@pytest.fixture
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


@pytest.mark.usefixtures("_in_tmp")
@pytest.mark.parametrize("case", CASES)
def test_invalid_input_gives_a_one_line_error_and_writes_nothing(case: str, tmp_path: Path, run_cli: RunCli) -> None:
    make, said = CASES[case]
    argv = make(tmp_path)
    before = tree(tmp_path)
    code, _, err = run_cli(*argv)
    assert code == 2
    assert err.count("\n") == 1 and err.startswith("reslearn: "), err
    assert said in err
    assert tree(tmp_path) == before


def test_a_locked_run(tmp_path: Path, run_cli: RunCli) -> None:
    argv = interrupted(tmp_path, lambda run: None)
    with FileLock(tmp_path / "run" / "lock"):
        code, _, err = run_cli(*argv)
    assert code == 2 and "another process is using" in err


def test_a_disk_that_fills_up_during_a_run(small_disk: Path, tmp_path: Path, run_cli: RunCli) -> None:
    data = draw_images(tmp_path / "data")
    settings = ["--set", "schedule.steps=9", "--set", "checkpoint.every=1", "--set", "batch.size=4"]
    code, _, err = run_cli("train", str(data), "--model", "resnet14", "--out", str(small_disk / "run"), *settings)
    assert code == 2 and err.count("\n") == 1 and "the disk is full" in err
    for path in checkpoint.find(small_disk / "run" / "checkpoints"):
        checkpoint.load(path)
    assert not [p for p in small_disk.rglob("*") if "partial" in p.name]


def test_a_disk_that_cannot_be_written(small_disk: Path, tmp_path: Path, run_cli: RunCli) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, _, err = run_cli(*good_folder_with("--out", str(small_disk / "run"))(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "read-only" in err


def test_predict_reports_a_broken_file_and_predicts_the_others(tmp_path: Path, run_cli: RunCli) -> None:
    folder = draw_images(tmp_path / "d", each=2)
    put(folder / "a" / "x.png", "<html>")
    path = model(tmp_path)
    code, out, err = run_cli("predict", path, folder, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 2 and "1 of 1 " not in err and "could not be read" in err
    assert [Path(line["file"]).name for line in lines if "error" in line] == ["x.png"]
    assert sum("predictions" in line for line in lines) == 4


def test_a_non_finite_loss_stops_the_run_before_the_update(tmp_path: Path, run_cli: RunCli) -> None:
    argv = good_folder_with("--set", "schedule.lr=1e30", "--set", "schedule.steps=50", "--set", "checkpoint.every=1")(tmp_path)
    code, _, err = run_cli(*argv)
    assert code == 2 and err.count("\n") == 1
    record = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert f"step {record['step']}:" in err and record["batch"][0] in err and len(record["batch"]) == 4
    saved = checkpoint.load(newest(tmp_path / "run"))
    assert saved.facts["step"] == record["step"] - 1
    assert all(tensor.isfinite().all() for tensor in saved.model.values() if tensor.is_floating_point())
