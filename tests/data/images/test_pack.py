"""reslearn pack: packed sets equal the original ones, interrupted packing resumes, and damage is reported."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reslearn
from command_line import RunCli, run_python, start_python
from drawing import draw_images
from reslearn import UserError, data
from reslearn.data.augment import Draws
from reslearn.data.images import pack as packing
from reslearn.data.images import packed
from reslearn.data.images.files import probe, read
from reslearn.data.images.pack import PackFormat, pack
from reslearn.data.images.stream import Photos
from reslearn.data.preprocess import Preprocessing
from reslearn.training import checkpoint

VIEW = Preprocessing(channels=3, size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train, val and test of two classes: 90x120 images, and one of another size."""
    for split, images in (("train", 5), ("val", 2), ("test", 3)):
        draw_images(tmp_path / "photos" / split, each=images, size=(90, 120))
    Image.new("RGB", (70, 50), "red").save(tmp_path / "photos" / "train" / "a" / "é ,.jpg")
    return tmp_path / "photos"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHARD_IMAGES", 4)


def assert_same_set(a: data.DataSet, b: data.DataSet) -> None:
    assert (a.classes, a.channels, list(a.splits)) == (b.classes, b.channels, list(b.splits))
    for name, split in a.splits.items():
        assert split.names == b.splits[name].names and (split.labels == b.splits[name].labels).all()


@pytest.mark.parametrize("form", [PackFormat(None), PackFormat(90), PackFormat(40), PackFormat(40, 70)])
def test_packed_sets_equal_the_original_ones(folder: Path, tmp_path: Path, form: PackFormat, small_shards: None) -> None:
    pack(folder, tmp_path / "out", form)
    before, after = data.open(folder), data.open(tmp_path / "out")
    assert_same_set(before, after)
    assert after.packed and not before.packed
    for name, split in before.splits.items():
        for old, new in zip(split.files or (), after.splits[name].files or (), strict=True):
            pixels, height, width = read(new, 3), *probe(old)[:2]
            if form.short_side is None or min(height, width) <= form.short_side:
                assert bytes(new.contents()) == old.read_bytes(), "small images are stored unchanged"
            else:
                assert min(pixels.shape[:2]) == form.short_side and pixels.shape[1] == round(width * form.short_side / height)
                assert bytes(new.contents())[:2] == b"\xff\xd8"
    assert not list((tmp_path / "out").glob("shard-*.json")) and len(after.splits["train"]) == 11


def test_batches_of_a_pack_equal_those_of_its_files(folder: Path, tmp_path: Path, small_shards: None) -> None:
    pack(folder, tmp_path / "out", PackFormat(None))
    draws = Draws(0, torch.zeros(11, dtype=torch.int64), torch.arange(11).flip(0))
    for options in ({"direct": True}, {}):
        one, other = (
            Photos(data.open(path).splits["train"], VIEW, flip=True, crop_scale=(0.2, 1.0), **options)
            for path in (folder, tmp_path / "out")
        )
        assert all(torch.equal(a, b) for a, b in zip(one.train_batch(draws), other.train_batch(draws), strict=True))
        assert torch.equal(one.eval_batch(0, 11), other.eval_batch(0, 11))
    split = data.open(tmp_path / "out").splits["train"]
    cached = Photos(split, VIEW, cache=split.files or ())
    assert torch.equal(cached.eval_batch(0, 11), one.eval_batch(0, 11))


def flip_a_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_reported_with_shard_and_image(folder: Path, tmp_path: Path, small_shards: None) -> None:
    out = tmp_path / "out"
    written = pack(folder, out)
    row = 6
    assert written.verify() == []
    flip_a_bit(out / "shard-00001.bin", int(written.index["offset"][row]) + 50)
    opened = data.open(out)
    names = [name for split in opened.splits.values() for name in split.names]
    assert packed.Pack(out).verify() == [f"{out}/shard-00001.bin: {names[row]}"]
    source = Photos(opened.splits["train"], VIEW, direct=True, crop_scale=(0.1, 1.0))
    index = list(opened.splits["train"].names).index(names[row])
    with pytest.raises(UserError, match=r"shard-00001\.bin: .*" + names[row].split("/")[-1] + ".*damaged"):
        source.train_batch(Draws(0, torch.zeros(1, dtype=torch.int64), torch.tensor([index])))
    with pytest.raises(UserError, match=r"shard-00001\.bin: .*damaged"):
        source.eval_batch(0, 11)


@pytest.mark.parametrize("file", ["index.npy", "names.json", "pack.json", "shard-00000.bin"])
@pytest.mark.parametrize("damage", ["cut", "missing", "bit"])
def test_other_damage_is_reported(folder: Path, tmp_path: Path, file: str, damage: str) -> None:
    if (file, damage) == ("shard-00000.bin", "bit"):
        pytest.skip("detected when the image is read")
    path = tmp_path / "out" / file
    pack(folder, tmp_path / "out")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "missing":
        path.unlink()
    else:
        flip_a_bit(path, path.stat().st_size - 3)
    with pytest.raises(UserError, match="not finished" if (file, damage) == ("pack.json", "missing") else file.replace(".", r"\.")):
        data.open(tmp_path / "out")


def test_changes_to_pack_json_are_detected(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "pack.json"
    pack(folder, path.parent)
    content = json.loads(path.read_text())
    changes = [{k: v for k, v in content.items() if k != key} for key in content]
    for changed in [*changes, content | {"classes": ["a", "c"]}, content | {"bytes": 3}, [1]]:
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"pack\.json: damaged"):
            data.open(path.parent)
    path.write_text(json.dumps(content | {"version": 1}))
    with pytest.raises(UserError, match="pack version 1, not 2: pack the images again"):
        data.open(path.parent)
    path.write_text(json.dumps(content))
    assert len(data.open(path.parent).splits["train"]) == 11


def test_packing_resumes_only_with_the_same_images_and_options(folder: Path, tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    first = pack(folder, out)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    again = pack(folder, out)
    assert first.about == again.about and stamps == {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    with pytest.raises(UserError, match="started with --short-side 256 --quality 90"):
        pack(folder, out, PackFormat(128))
    (folder / "train" / "a" / "0.png").unlink()
    with pytest.raises(UserError, match="have changed since it was started"):
        pack(folder, out)
    with pytest.raises(UserError, match="contains a: choose a new folder"):
        pack(folder, images)
    with pytest.raises(UserError, match="nothing to pack"):
        pack(images, tmp_path / "new")
    with pytest.raises(UserError, match="already packed"):
        pack(out, tmp_path / "new")


def test_unreadable_images_are_reported_or_left_out(folder: Path, tmp_path: Path) -> None:
    path = folder / "train" / "b" / "2.png"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"b/2\.png"):
        pack(folder, tmp_path / "one")
    with pytest.raises(UserError, match="not finished"):
        data.open(tmp_path / "one")
    pack(folder, tmp_path / "two", on_bad="skip")
    opened = data.open(tmp_path / "two")
    assert opened.left_out == {"unreadable": 1} and len(opened.splits["train"]) == 10
    assert "train/b/2.png" not in opened.splits["train"].names


def test_a_shard_without_readable_images_is_empty(folder: Path, tmp_path: Path, small_shards: None) -> None:
    names = [name for split in data.open(folder).splits.values() for name in split.names]
    for name in names[8:12]:
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    written = pack(folder, tmp_path / "out", on_bad="skip")
    assert written.about["bytes"]["shard-00002.bin"] == 0 and written.verify() == []
    assert list(written.names) == names[:8] + names[12:]
    split = data.open(tmp_path / "out").splits["train"]
    assert [read(file, 3).shape for file in split.files or ()] == [read(folder / name, 3).shape for name in split.names]


def test_images_too_long_for_a_jpeg_are_stored_unchanged(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (67_000, 80), "red").save(folder / "train" / "a" / "long.png")
    written = pack(folder, tmp_path / "out", PackFormat(79))
    row = written.names.index("train/a/long.png")
    assert bytes(written.contents(row)) == (folder / "train" / "a" / "long.png").read_bytes()
    record = written.index[row]
    assert (record["height"], record["width"]) == (80, 67_000)


def test_packing_into_the_image_folder_is_rejected(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (folder, folder / "packed", Path("photos/train/a/../packed")):
        with pytest.raises(UserError, match=r"is inside .*, where it would count as a class"):
            pack(folder, out)
    folders = sorted(path.name for path in folder.rglob("*") if path.is_dir())
    assert folders == [*"aaabbb", "test", "train", "val"]


def test_packing_resumes_after_being_killed(folder: Path, tmp_path: Path) -> None:
    """Kills processes later and later until one completes. The result equals an uninterrupted one."""
    code = "import sys; from pathlib import Path; from reslearn.data.images import pack as p; p.SHARD_IMAGES = 3\n"
    code += "p.pack(sys.argv[1], Path(sys.argv[2]), p.PackFormat(64), workers=1, progress=lambda *a: print(a[1], flush=True))"
    out, killed = tmp_path / "out", 0
    for stop_at in range(2, 99, 4):
        process = start_python("-c", code, folder, out, stderr=None)
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= stop_at:
                time.sleep(0.002 * (stop_at % 3))
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        if process.wait() == 0:
            break
        killed += 1
        if not (out / "pack.json").exists():
            with pytest.raises(UserError, match="not finished"):
                data.open(out)
    assert killed >= 3 and packed.Pack(out).verify() == []
    uninterrupted = tmp_path / "uninterrupted"
    assert run_python("-c", code, folder, uninterrupted).code == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in uninterrupted.iterdir())
    for path in uninterrupted.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_the_command(folder: Path, tmp_path: Path, run_cli: RunCli) -> None:
    def run(*words: str) -> tuple[int, str]:
        code, out, err = run_cli("pack", *words)
        return code, out + err

    out = str(tmp_path / "out")
    assert run(str(folder), out, "--short-side", "64")[1].startswith("packed")
    assert run(out, "--verify") == (0, f"{out}: 21 images in 1 shards, no damage\n")
    flip_a_bit(Path(out) / "shard-00000.bin", 99)
    code, output = run(out, "--verify")
    assert code == 2 and "shard-00000.bin: train/a/0.png: damaged" in output
    for words, why in (
        ((str(folder), "--verify"), "not a packed folder"),
        ((out, "--verify", "--quality", "50"), "--quality cannot be combined with --verify"),
        ((str(folder),), "OUT is missing"),
        ((str(folder), out, "--as-is", "--quality", "50"), "--quality cannot be combined with --as-is"),
        ((str(folder), out, "--on-bad", "ignore"), "is not one of 'error', 'skip'"),
    ):
        code, output = run(*words)
        assert code == 2 and why in output


def test_the_index(folder: Path, tmp_path: Path) -> None:
    written = pack(folder, tmp_path / "out", PackFormat(64))
    index = written.index
    assert index.dtype == packed.INDEX and len(index) == len(written.names) == 21
    ends = index["offset"] + index["bytes"]
    assert (index["offset"][1:] == ends[:-1]).all() and ends[-1] == written.about["bytes"]["shard-00000.bin"]
    assert np.minimum(index["height"], index["width"]).max() == 64


def test_a_run_on_a_pack_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_images(tmp_path / "photos", size=(90, 120))
    pack(tmp_path / "photos", tmp_path / "out", PackFormat(48))
    settings = ["schedule.steps=6", "data.size=32", "batch.size=8", "execution=eager", "checkpoint.every=2"]
    first = reslearn.train(tmp_path / "out", model="resnet8", settings=settings, out=tmp_path / "first", quiet=True)
    monkeypatch.setattr(checkpoint, "prune", lambda folder, keep: None)  # a finished run keeps only one checkpoint
    again = reslearn.train(tmp_path / "out", model="resnet8", settings=settings, out=tmp_path / "again", quiet=True)
    for name in ("result.json", "model.safetensors"):
        (again.folder / name).unlink()
    saved = sorted((again.folder / "checkpoints").iterdir())
    assert len(saved) > 1
    for later in saved[1:]:
        shutil.rmtree(later)
    resumed = reslearn.resume(again.folder, quiet=True)
    weights = [reslearn.load(run.folder).state_dict() for run in (first, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert reslearn.evaluate(first.folder, tmp_path / "out")["n"] == first.result["last"]["test"]["n"]
