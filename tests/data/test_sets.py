"""`open` with names, folders and lists; splits; fingerprints."""

import gzip
import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from reslearn.data import download, sets
from reslearn.data.download import OFFICIAL, OfficialSet
from reslearn.data.sets import NAMES, DataSet, Split, open
from reslearn.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_cifar = pytest.mark.skipif(
    not (Path(os.environ.get("RESLEARN_DATA", "/nowhere")) / "cifar-10-batches-bin").is_dir(),
    reason="RESLEARN_DATA does not contain cifar-10-batches-bin/",
)
RANDOM = np.random.default_rng(7)


def picture(path: Path, *shape: int, **options: str) -> np.ndarray:
    pixels = RANDOM.integers(0, 256, shape or (8, 8), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_folder(data: DataSet, root: Path) -> Path:
    """Writes a resident set as root/SPLIT/CLASS/NUMBER.png, or root/CLASS/NUMBER.png for the split "all"."""
    for name, split in data.splits.items():
        for i, label in enumerate(split.labels):
            path = (root if name == "all" else root / name) / data.classes[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert split.pixels is not None
            image = split.pixels[i].permute(1, 2, 0).numpy()
            Image.fromarray(image if data.channels == 3 else image[..., 0]).save(path, compress_level=1)
    return root


def test_a_split_needs_either_pixels_or_files() -> None:
    labels, pixels = np.array([0, 1]), torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for make in (
        lambda: Split(labels, "ab"),
        lambda: Split(labels, "ab", pixels, (Path("a"), Path("b"))),
        lambda: Split(labels, "abc", pixels),
        lambda: Split(labels, "ab", pixels[:1]),
        lambda: Split(labels, "ab", files=(Path("a"),)),
    ):
        with pytest.raises(ValueError, match=r"either pixels or files|labels"):
            make()


@pytest.mark.parametrize("resident", [True, False])
def test_take(resident: bool) -> None:
    pixels = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    files = tuple(Path(str(i)) for i in range(5))
    split = Split(np.arange(5), list("abcde"), pixels if resident else None, None if resident else files)
    mask = np.array([True, False, False, True, False])
    for indices in ([3, 0], np.array([3, 0]), torch.tensor([3, 0]), [-2, 0], range(3, -1, -3), mask, torch.from_numpy(mask)):
        taken = split.take(indices)  # type: ignore[arg-type]
        expected = [0, 3] if len(indices) == 5 else [3, 0]
        assert taken.labels.tolist() == expected and taken.labels.dtype == np.int64
        assert list(taken.names) == ["abcde"[i] for i in expected]
        if taken.pixels is not None:
            assert taken.pixels.flatten().tolist() == expected
        else:
            assert taken.files == tuple(files[i] for i in expected)
    assert len(split.take([])) == 0 and len(split.take([2, 2])) == 2
    with pytest.raises(IndexError):
        split.take([5])


def test_fashion_sample() -> None:
    data = open("fashion-sample")
    assert (data.name, data.channels, data.sizes, data.left_out, data.resident) == ("fashion-sample", 1, (28, 28), {}, True)
    assert data.classes[0] == "T-shirt/top" and data.classes[9] == "Ankle boot" and len(data.classes) == 10
    for name, per_class in (("train", 600), ("test", 100)):
        split = data.splits[name]
        assert split.pixels is not None
        assert split.pixels.shape == (10 * per_class, 1, 28, 28) and split.pixels.dtype == torch.uint8
        assert np.bincount(split.labels).tolist() == [per_class] * 10 and split.labels.dtype == np.int64
        assert split.names[17] == f"fashion-sample/{name}[17]"
    samples = Path(sets.__file__).parent / "samples"
    assert sum(path.stat().st_size for path in samples.iterdir()) < 4 << 20
    assert "Copyright (c) 2017 Zalando SE" in (samples / "LICENSE.fashion-mnist").read_text()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_fashion_sample_is_the_first_of_each_class() -> None:
    data = open("fashion-sample")
    for split, prefix, per_class in (("train", "train", 600), ("test", "t10k", 100)):
        images = gzip.decompress((DEBIAN / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((DEBIAN / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        seen, expected, kept = [0] * 10, hashlib.sha256(), []
        for i, label in enumerate(labels):
            seen[label] += 1
            if seen[label] <= per_class:
                expected.update(images[784 * i : 784 * (i + 1)])
                kept.append(label)
        pixels = data.splits[split].pixels
        assert pixels is not None
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == expected.hexdigest()
        assert data.splits[split].labels.tolist() == kept


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the package dataset-fashion-mnist is not installed")
def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RESLEARN_DATA", raising=False)
    data = open("fashion-mnist")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 60_000, "test": 10_000}
    assert data.splits["train"].labels[:4].tolist() == [9, 0, 0, 3]
    assert data.fingerprint() == open(DEBIAN).fingerprint() != open("fashion-sample").fingerprint()


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def test_other_sets_with_the_file_names_of_fashion_mnist_are_rejected(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(10), [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])  # as MNIST has them
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((60_000, 1, 1))))
    with pytest.raises(UserError, match="incomplete fashion-mnist: missing t10k-images-idx3-ubyte, t10k-labels"):
        open(tmp_path)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(idx(np.zeros(1)))
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: not fashion-mnist, which has 6,000 labels of each"):
        open(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.repeat(np.arange(10), 6000)))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte: .*shape \(60000, 1, 1\) instead of \(60000, 28, 28\)"):
        open(tmp_path)


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RESLEARN_DATA with tiny CIFAR-10 and CIFAR-100 of random images."""
    monkeypatch.setenv("RESLEARN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, limits, images in (("cifar10", [10], 8), ("cifar100", [20, 100], 20)):
        official = OFFICIAL[name]
        files = {file: (images if "test" not in file else 10) * (3072 + len(limits)) for file in official.files}
        monkeypatch.setitem(download.OFFICIAL, name, OfficialSet(official.folder, files, official.sources))
        folder = tmp_path / "data" / official.folder
        folder.mkdir(parents=True)
        for file, size in files.items():
            records = RANDOM.integers(0, 256, (size // (3072 + len(limits)), 3072 + len(limits)), np.uint8)
            records[:, : len(limits)] %= np.array(limits, np.uint8)
            (folder / file).write_bytes(records.tobytes())
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("name", "train", "skip", "some"),
    [("cifar10", 40, 1, {0: "airplane", 9: "truck"}), ("cifar100", 20, 2, {0: "apple", 52: "oak_tree", 99: "worm"})],
)
def test_cifar(name: str, train: int, skip: int, some: dict[int, str], small_cifar: Path) -> None:
    data = open(name)
    folder = small_cifar / OFFICIAL[name].folder
    assert {split: len(data.splits[split]) for split in data.splits} == {"train": train, "test": 10}
    assert all(data.classes[i] == label for i, label in some.items())
    assert len(set(data.classes)) == {"cifar10": 10, "cifar100": 100}[name] and list(data.classes) == sorted(data.classes)
    assert (data.name, data.channels, data.sizes, data.resident, data.left_out) == (name, 3, (32, 32), True, {})
    assert data.splits["train"].names[39 % train] == f"{name}/train[{39 % train}]"
    last = sorted(file for file in OFFICIAL[name].files if "test" not in file)[-1]
    record = np.frombuffer((folder / last).read_bytes(), np.uint8).reshape(-1, 3072 + skip)[-1]
    pixels = data.splits["train"].pixels
    assert pixels is not None and pixels.dtype == torch.uint8
    assert (pixels[-1].numpy() == record[skip:].reshape(3, 32, 32)).all()
    assert data.splits["train"].labels[-1] == record[skip - 1]
    assert open(folder).fingerprint() == data.fingerprint()


def test_a_folder_of_official_files_or_its_parent(small_cifar: Path) -> None:
    with pytest.raises(UserError, match=r"contains cifar10 and cifar100: open .*cifar-10-batches-bin or "):
        open(small_cifar)
    shutil.rmtree(small_cifar / "cifar-100-binary")
    assert open(str(small_cifar)).name == open(small_cifar / "cifar-10-batches-bin").name == "cifar10"
    names = small_cifar / "cifar-10-batches-bin" / "batches.meta.txt"
    names.write_text("\n".join("abcdefghij") + "\n\n")
    assert open("cifar10").classes == tuple("abcdefghij")
    names.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"batches\.meta\.txt: 2 class names instead of 10"):
        open("cifar10")


def test_bad_cifar(small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_cifar / "cifar-10-batches-bin"
    batch = folder / "data_batch_3.bin"
    whole = batch.read_bytes()
    batch.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"data_batch_3\.bin: 24,583 bytes instead of 24,584"):
        open("cifar10")
    batch.write_bytes(whole[:3073] + b"\x0a" + whole[3074:])
    with pytest.raises(UserError, match=r"data_batch_3\.bin: record 1 has label 10, but there are 10 classes"):
        open("cifar10")
    batch.unlink()
    with pytest.raises(UserError, match=r"incomplete cifar10: missing data_batch_3\.bin"):
        open(folder)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network in tests
    with pytest.raises(UserError, match=r"cifar10 is not in .*\(incomplete\).*cannot be downloaded.*set RESLEARN_DATA to"):
        open("cifar10")
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "data_batch_1").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"CIFAR's Python version \(pickles\) is not supported: get the binary version, https://"):
        open(tmp_path / "py")


def test_a_folder_of_small_images_is_resident(tmp_path: Path) -> None:
    expected = {
        f"{split}/{label}/{i}.png": picture(tmp_path / split / label / f"{i}.png", 5, 7, 3)
        for split in ("train", "val", "test")
        for label in ("cat", "dog")
        for i in range(3)
    }
    data = open(tmp_path)
    assert (data.name, data.classes, data.channels, data.sizes) == (tmp_path.name, ("cat", "dog"), 3, (5, 7))
    assert list(data.splits) == ["train", "val", "test"] and data.resident and data.left_out == {}
    for split in data.splits.values():
        assert split.pixels is not None and split.pixels.shape == (6, 3, 5, 7) and split.labels.tolist() == [0, 0, 0, 1, 1, 1]
        for name, image in zip(split.names, split.pixels, strict=True):
            assert (image.permute(1, 2, 0).numpy() == expected[name]).all()


@pytest.mark.parametrize(
    ("shapes", "resident", "channels", "sizes"),
    [
        ([(64, 64)] * 3, True, 1, (64, 64)),
        ([(64, 65)] * 3, False, 1, (64, 65)),
        ([(8, 8), (8, 8, 3), (8, 8)], True, 3, (8, 8)),
        ([(8, 8), (8, 9), (20, 30)], False, 1, (8, 9)),
    ],
)
def test_resident_channels_and_sizes(
    shapes: list[tuple[int, ...]], resident: bool, channels: int, sizes: tuple[int, int], tmp_path: Path
) -> None:
    for i, shape in enumerate(shapes):
        picture(tmp_path / "a" / f"{i}.png", *shape)
    data = open(tmp_path)
    assert (data.resident, data.channels, data.sizes, data.classes, list(data.splits)) == (
        resident,
        channels,
        sizes,
        ("a",),
        ["all"],
    )
    split = data.splits["all"]
    assert split.names == ("a/0.png", "a/1.png", "a/2.png")
    if split.pixels is None:
        assert split.files == tuple(tmp_path / name for name in split.names)
    else:
        assert split.pixels.shape == (3, channels, *sizes)


def test_large_sets_are_not_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        picture(tmp_path / "a" / f"{i}.png", 8, 8)
    monkeypatch.setattr(sets, "_RESIDENT_BYTES", 3 * 64)
    assert open(tmp_path).resident
    monkeypatch.setattr(sets, "_RESIDENT_BYTES", 3 * 64 - 1)
    assert not open(tmp_path).resident


def test_lists(tmp_path: Path) -> None:
    expected = {name: picture(tmp_path / name) for name in ("x.png", "sub/y.png")}
    (tmp_path / "pets.csv").write_text("file,label\nx.png,dog\nsub/y.png,cat\n")
    (tmp_path / "pets.jsonl").write_text('{"file": "x.png", "label": "dog", "split": "test"}')
    data = open(tmp_path / "pets.csv")
    assert (data.name, data.classes, list(data.splits), data.splits["all"].names) == (
        "pets.csv",
        ("cat", "dog"),
        ["all"],
        ("sub/y.png", "x.png"),
    )
    assert data.splits["all"].labels.tolist() == [0, 1]
    pixels = data.splits["all"].pixels
    assert pixels is not None and (pixels[1, 0].numpy() == expected["x.png"]).all()
    assert list(open(str(tmp_path / "pets.jsonl")).splits) == ["test"]


def test_bad_images_are_errors_or_left_out(tmp_path: Path) -> None:
    expected = {
        f"train/{label}/{i}.png": picture(tmp_path / "train" / label / f"{i}.png", 16, 16) for label in "ab" for i in range(3)
    }
    whole = (tmp_path / "train/a/0.png").read_bytes()
    (tmp_path / "train/a/0.png").write_bytes(whole[:150])  # the header is valid, so only decoding fails
    with pytest.raises(UserError, match=r"train/a/0\.png: cannot be decoded.*truncated.*; remove .*--on-bad skip\)$"):
        open(tmp_path)
    (tmp_path / "train/b/2.png").write_bytes(b"<html>")
    (tmp_path / "train/b/1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"train/b/1\.png: .* empty file \(0 bytes\) \(and 1 more images?\); remove"):
        open(tmp_path)
    data = open(tmp_path, on_bad="skip")
    assert data.splits["train"].names == ("train/a/1.png", "train/a/2.png", "train/b/0.png") and data.resident
    assert data.left_out == {"unreadable": 3} and data.splits["train"].labels.tolist() == [0, 0, 1]
    for name, image in zip(data.splits["train"].names, data.splits["train"].pixels, strict=True):  # type: ignore[arg-type]
        assert (image[0].numpy() == expected[name]).all()
    picture(tmp_path / "train/a/large.png", 16, 17)  # images stay files, so the truncated one is not decoded
    data = open(tmp_path, on_bad="skip")
    assert not data.resident and data.left_out == {"unreadable": 2} and len(data.splits["train"]) == 5
    (tmp_path / "train/b/0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of class 'b' in train can be read: .*0\.png: .*\(and 2 more"):
        open(tmp_path, on_bad="skip")


def test_invalid_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, fragment in (
        ("cifra10", "no data set or folder called 'cifra10'; did you mean 'cifar10'"),
        ("/no/where", "no data set or folder called '/no/where'; known: cifar10, cifar100, fashion-mnist, fashion-sample"),
        (Path("cifar10"), "no data set or folder called 'cifar10'"),
        ("gone.csv", "no data set or folder called 'gone.csv'"),
        ("notes.txt", "notes.txt: not a data set: must be a folder, a .csv or .jsonl list, or one of fashion-sample"),
        ("empty", "empty: contains no images or class folders"),
        ("x" * 300, "xxx: cannot be opened: [Errno 36] File name too long"),
        ("~no-such-user/pets", "~no-such-user/pets: cannot be opened: Could not determine home"),
        ("zero\0byte", "no data set or folder called 'zero\\x00byte'"),
    ):
        with pytest.raises(UserError) as caught:
            open(name)
        assert fragment in str(caught.value)
    with pytest.raises(UserError, match="on_bad='ignore': must be error or skip"):
        open(tmp_path, on_bad="ignore")  # type: ignore[arg-type]
    assert set(NAMES) == {"fashion-sample", *OFFICIAL}


def by_hand(count: int, channels: Literal[1, 3] = 3) -> DataSet:
    splits = {}
    for name, n in (("train", count), ("test", count // 5)):
        pixels = torch.from_numpy(RANDOM.integers(0, 256, (n, channels, 32, 32), np.uint8))
        splits[name] = Split(np.arange(n) % 3, tuple(f"by-hand/{name}[{i}]" for i in range(n)), pixels)
    return DataSet("by-hand", ("cat", "dog", "owl"), channels, splits, {}, (32, 32))


@pytest.mark.parametrize("channels", [1, 3])
def test_fingerprint_is_of_the_content(channels: Literal[1, 3], tmp_path: Path) -> None:
    data = by_hand(400, channels)
    same = open(write_folder(data, tmp_path))
    assert same.resident and same.channels == channels
    first = data.fingerprint()
    assert same.fingerprint() == first and len(first) == 64
    order = RANDOM.permutation(400)

    def changed(**splits: Split) -> str:
        return DataSet("x", data.classes, channels, data.splits | splits, {}, (1, 1)).fingerprint()

    train = data.splits["train"]
    assert train.pixels is not None
    assert changed(train=train.take(order)) == first
    pixels = train.pixels.clone()
    pixels[7, 0, 3, 3] ^= 1
    different = [
        changed(train=Split(train.labels, train.names, pixels)),
        changed(train=Split(np.roll(train.labels, 1), train.names, train.pixels)),
        changed(train=Split(train.labels, train.names, train.pixels.reshape(400, channels, 16, 64))),
        changed(train=train.take(range(399))),
        changed(train=train.take([*range(400), 0])),
        changed(train=data.splits["test"], test=train),
        DataSet("x", ("cat", "dog", "emu"), channels, data.splits, {}, (1, 1)).fingerprint(),
    ]
    assert len({first, *different}) == 1 + len(different)


def test_fingerprint_of_files(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "one" / "ab"[i % 2] / f"{i}.png", 8, 8 + i)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = open(tmp_path / "one").fingerprint()
    assert open(tmp_path / "two").fingerprint() == first
    data = open(tmp_path / "two")
    backwards = data.splits["all"].take([3, 2, 1, 0])
    assert DataSet("x", data.classes, 1, {"all": backwards}, {}, (1, 1)).fingerprint() == first
    (tmp_path / "two/a/0.png").rename(tmp_path / "two/a/4.png")
    renamed = open(tmp_path / "two").fingerprint()
    with (tmp_path / "two/b/1.png").open("ab") as file:
        file.write(b"x")
    assert len({first, renamed, open(tmp_path / "two").fingerprint()}) == 3
    with pytest.raises(UserError, match=r"0\.png: deleted since"):
        data.fingerprint()


@needs_cifar
def test_cifar10_as_it_is_and_as_png_files(tmp_path: Path) -> None:
    data = open("cifar10")
    assert {name: np.bincount(split.labels).tolist() for name, split in data.splits.items()} == {
        "train": [5000] * 10,
        "test": [1000] * 10,
    }
    test = DataSet("test", data.classes, 3, {"test": data.splits["test"]}, {}, (32, 32))
    assert open(write_folder(test, tmp_path)).fingerprint() == test.fingerprint() != data.fingerprint()
