"""reslearn pack: what comes out is what went in; stopped at any moment it goes on; damage is named."""

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
    """train, val and test of two classes; 90x120 and, one, of another size."""
    for part, each in (("train", 5), ("val", 2), ("test", 3)):
        draw_images(tmp_path / "photos" / part, each=each, size=(90, 120))
    Image.new("RGB", (70, 50), "red").save(tmp_path / "photos" / "train" / "a" / "é ,.jpg")
    return tmp_path / "photos"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHARD_IMAGES", 4)


def same_set(a: data.DataSet, b: data.DataSet) -> None:
    assert (a.classes, a.channels, list(a.splits)) == (b.classes, b.channels, list(b.splits))
    for name, split in a.splits.items():
        assert split.names == b.splits[name].names and (split.labels == b.splits[name].labels).all()


@pytest.mark.parametrize("form", [PackFormat(None), PackFormat(90), PackFormat(40), PackFormat(40, 70)])
def test_what_is_packed_is_what_was_there(folder: Path, tmp_path: Path, form: PackFormat, small_shards: None) -> None:
    pack(folder, tmp_path / "out", form)
    before, after = data.open(folder), data.open(tmp_path / "out")
    same_set(before, after)
    assert after.packed and not before.packed
    for name, split in before.splits.items():
        for old, new in zip(split.files or (), after.splits[name].files or (), strict=True):
            pixels, height, width = read(new, 3), *probe(old)[:2]
            if form.short_side is None or min(height, width) <= form.short_side:
                assert bytes(new.contents()) == old.read_bytes(), "small ones keep their bytes"
            else:
                assert min(pixels.shape[:2]) == form.short_side and pixels.shape[1] == round(width * form.short_side / height)
                assert bytes(new.contents())[:2] == b"\xff\xd8"
    assert not list((tmp_path / "out").glob("shard-*.json")) and len(after.splits["train"]) == 11


def test_training_on_a_pack_is_training_on_its_files(folder: Path, tmp_path: Path, small_shards: None) -> None:
    pack(folder, tmp_path / "out", PackFormat(None))
    draws = Draws(0, torch.zeros(11, dtype=torch.int64), torch.arange(11).flip(0))
    for options in ({"direct": True}, {}):
        one, other = (
            Photos(data.open(each).splits["train"], VIEW, flip=True, crop_scale=(0.2, 1.0), **options)
            for each in (folder, tmp_path / "out")
        )
        assert all(torch.equal(a, b) for a, b in zip(one.train_batch(draws), other.train_batch(draws), strict=True))
        assert torch.equal(one.eval_batch(0, 11), other.eval_batch(0, 11))
    split = data.open(tmp_path / "out").splits["train"]
    cached = Photos(split, VIEW, cache=split.files or ())
    assert torch.equal(cached.eval_batch(0, 11), one.eval_batch(0, 11))


def flip_a_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_names_shard_and_image(folder: Path, tmp_path: Path, small_shards: None) -> None:
    out = tmp_path / "out"
    made = pack(folder, out)
    row = 6
    assert made.verify() == []
    flip_a_bit(out / "shard-00001.bin", int(made.index["offset"][row]) + 50)
    opened = data.open(out)
    names = [name for split in opened.splits.values() for name in split.names]
    assert packed.Pack(out).verify() == [f"{out}/shard-00001.bin: {names[row]}"]
    source = Photos(opened.splits["train"], VIEW, direct=True, crop_scale=(0.1, 1.0))
    place = list(opened.splits["train"].names).index(names[row]) if names[row] in opened.splits["train"].names else None
    assert place is not None
    with pytest.raises(UserError, match=r"shard-00001\.bin: .*" + names[row].split("/")[-1] + ".*damaged"):
        source.train_batch(Draws(0, torch.zeros(1, dtype=torch.int64), torch.tensor([place])))
    with pytest.raises(UserError, match=r"shard-00001\.bin: .*damaged"):
        source.eval_batch(0, 11)


@pytest.mark.parametrize("file", ["index.npy", "names.json", "pack.json", "shard-00000.bin"])
@pytest.mark.parametrize("damage", ["cut", "missing", "bit"])
def test_other_damage_is_named(folder: Path, tmp_path: Path, file: str, damage: str) -> None:
    if (file, damage) == ("shard-00000.bin", "bit"):
        pytest.skip("it is seen when the image is read")
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


def test_what_pack_json_says_is_what_was_written(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "pack.json"
    pack(folder, path.parent)
    said = json.loads(path.read_text())
    changed = [{k: v for k, v in said.items() if k != key} for key in said] + [
        said | {"classes": ["a", "c"]},
        said | {"bytes": 3},
        [1],
    ]
    for wrong in changed:
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"pack\.json: damaged"):
            data.open(path.parent)
    path.write_text(json.dumps(said | {"version": 1}))
    with pytest.raises(UserError, match="of version 1, not 2: pack the images again"):
        data.open(path.parent)
    path.write_text(json.dumps(said))
    assert len(data.open(path.parent).splits["train"]) == 11


def test_it_goes_on_only_with_the_same(folder: Path, tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    first = pack(folder, out)
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    again = pack(folder, out)
    assert first.about == again.about and stamps == {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    with pytest.raises(UserError, match="begun with --short-side 256 --quality 90"):
        pack(folder, out, PackFormat(128))
    (folder / "train" / "a" / "0.png").unlink()
    with pytest.raises(UserError, match="are not those it was begun with"):
        pack(folder, out)
    with pytest.raises(UserError, match="holds a: choose a new folder"):
        pack(folder, images)
    with pytest.raises(UserError, match="nothing to pack"):
        pack(images, tmp_path / "new")
    with pytest.raises(UserError, match="packed already"):
        pack(out, tmp_path / "new")


def test_an_image_that_cannot_be_read_is_named_or_left_out(folder: Path, tmp_path: Path) -> None:
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


def test_a_shard_whose_images_are_all_bad_is_passed_over(folder: Path, tmp_path: Path, small_shards: None) -> None:
    names = [name for split in data.open(folder).splits.values() for name in split.names]
    for name in names[8:12]:
        (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    made = pack(folder, tmp_path / "out", on_bad="skip")
    assert made.about["bytes"]["shard-00002.bin"] == 0 and list(made.names) == names[:8] + names[12:] and made.verify() == []
    split = data.open(tmp_path / "out").splits["train"]
    assert [read(file, 3).shape for file in split.files or ()] == [read(folder / name, 3).shape for name in split.names]


def test_one_that_is_too_long_for_a_jpeg_keeps_its_bytes(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (67_000, 80), "red").save(folder / "train" / "a" / "long.png")
    made = pack(folder, tmp_path / "out", PackFormat(79))
    row = made.names.index("train/a/long.png")
    assert bytes(made.contents(row)) == (folder / "train" / "a" / "long.png").read_bytes()
    record = made.index[row]
    assert (record["height"], record["width"]) == (80, 67_000)


def test_a_pack_among_its_own_images_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (folder, folder / "packed", Path("photos/train/a/../packed")):
        with pytest.raises(UserError, match="lies among the images of"):
            pack(folder, out)
    assert sorted(path.name for path in folder.rglob("*") if path.is_dir()) == [
        "a",
        "a",
        "a",
        "b",
        "b",
        "b",
        "test",
        "train",
        "val",
    ]


def test_killed_at_any_moment_it_goes_on(folder: Path, tmp_path: Path) -> None:
    """kill -9 of real processes, later and later, until one comes through; the result is that of an undisturbed one."""
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
    alone = tmp_path / "alone"
    assert run_python("-c", code, folder, alone).code == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in alone.iterdir())
    for path in alone.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_the_command(folder: Path, tmp_path: Path, run_cli: RunCli) -> None:
    def run(*words: str) -> tuple[int, str]:
        code, out, err = run_cli("pack", *words)
        return code, out + err

    out = str(tmp_path / "out")
    assert run(str(folder), out, "--short-side", "64")[1].startswith("packed")
    assert run(out, "--verify") == (0, f"{out}: 21 images in 1 shards, no damage\n")
    flip_a_bit(Path(out) / "shard-00000.bin", 99)
    code, said = run(out, "--verify")
    assert code == 2 and "shard-00000.bin: train/a/0.png: damaged" in said
    for words, why in (
        ((str(folder), "--verify"), "not a packed folder"),
        ((out, "--verify", "--quality", "50"), "--quality cannot be combined with --verify"),
        ((str(folder),), "OUT is missing"),
        ((str(folder), out, "--as-is", "--quality", "50"), "--quality cannot be combined with --as-is"),
        ((str(folder), out, "--on-bad", "ignore"), "is not one of 'error', 'skip'"),
    ):
        code, said = run(*words)
        assert code == 2 and why in said


def test_an_index_is_as_it_is_said_to_be(folder: Path, tmp_path: Path) -> None:
    made = pack(folder, tmp_path / "out", PackFormat(64))
    assert made.index.dtype == packed.INDEX and len(made.index) == len(made.names) == 21
    ends = made.index["offset"] + made.index["bytes"]
    assert (made.index["offset"][1:] == ends[:-1]).all() and ends[-1] == made.about["bytes"]["shard-00000.bin"]
    assert np.minimum(made.index["height"], made.index["width"]).max() == 64


def test_a_run_on_a_pack_is_stopped_and_resumed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_images(tmp_path / "photos", size=(90, 120))
    pack(tmp_path / "photos", tmp_path / "out", PackFormat(48))
    settings = ["schedule.steps=6", "data.size=32", "batch.size=8", "execution=eager", "checkpoint.every=2"]
    first = reslearn.train(tmp_path / "out", model="resnet8", settings=settings, out=tmp_path / "first", quiet=True)
    monkeypatch.setattr(checkpoint, "prune", lambda folder, keep: None)  # of a finished run, one checkpoint is left
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
