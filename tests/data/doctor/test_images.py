"""The doctor on class folders and lists: planted faults are found and repaired; statistics match NumPy."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import run_python
from planting import FAULTS, NOTES, as_png, clean, copy, encoded, photo, write
from reslearn.data import open as open_data
from reslearn.data.doctor import inspection
from reslearn.data.doctor.classes import examine_classes
from reslearn.data.doctor.diagnosis import Diagnosis
from reslearn.data.doctor.repair_classes import check_source, repair_classes
from reslearn.data.findings import CLASS_KINDS, KINDS
from reslearn.data.images.files import read
from reslearn.data.images.pack import PackFormat, pack
from reslearn.errors import UserError


@pytest.fixture(scope="module")
def spotless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean(tmp_path_factory.mktemp("clean") / "photos")


@pytest.fixture
def photos(spotless: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spotless, tmp_path / "photos"))


def kinds(diagnosis: Diagnosis) -> dict[str, set[str]]:
    names: dict[str, set[str]] = {}
    for finding in diagnosis.findings:
        names.setdefault(finding.kind, set()).update(finding.names)
    return names


def test_a_clean_set_is_clean(spotless: Path) -> None:
    seen: list[tuple[int, int]] = []
    diagnosis = examine_classes(spotless, lambda what, done, total: seen.append((done, total)))
    assert diagnosis.clean and diagnosis.findings == () and seen[-1] == (22, 22)
    assert diagnosis.per_class == {"train": {"cat": 6, "dog": 6}, "val": {"cat": 5, "dog": 5}}
    assert (diagnosis.pixels.formats, diagnosis.pixels.modes) == ({"JPEG": 22}, {"RGB": 22})
    assert (diagnosis.pixels.height, diagnosis.pixels.width, diagnosis.pixels.aspect) == (
        (48, 48, 48),
        (64, 64, 64),
        (1.3333, 1.3333, 1.3333),
    )
    assert diagnosis.pixels.bytes == sum(file.stat().st_size for file in spotless.rglob("*.jpg"))
    assert len(diagnosis.entries) == 22 and diagnosis.suffixes == {}


@pytest.mark.parametrize("name", [*FAULTS, *NOTES])
def test_each_planted_fault_is_found_and_repaired(name: str, photos: Path, tmp_path: Path) -> None:
    plant, expected = (FAULTS | NOTES)[name]
    plant(photos)
    diagnosis = examine_classes(photos)
    assert kinds(diagnosis) == expected
    assert diagnosis.clean == (name in NOTES) and all(KINDS[kind].fault == (name in FAULTS) for kind in expected if kind != "gray")
    for target in (tmp_path / "clean.csv", tmp_path / "copy"):
        repair_classes(diagnosis, target)
        assert len({entry.file for entry in diagnosis.entries}) == sum(map(len, open_data(target).splits.values()))
        again = set(kinds(examine_classes(target)))
        left = {kind for kind in expected if not KINDS[kind].fix} | (
            {"wrong suffix", "colliding names"} if target.suffix else set()
        )
        assert again <= left


def test_every_kind_is_planted() -> None:
    planted = {kind for _, expected in (FAULTS | NOTES).values() for kind in expected}
    elsewhere = {"missing file", "listed twice", "without a class"}  # in lists and in ImageNet
    assert planted | elsewhere == set(CLASS_KINDS)


def test_all_problems_of_a_list_are_reported(photos: Path) -> None:
    lines = ["file,label", "train/cat/0.jpg,cat", "train/cat/0.jpg,dog", "no.jpg,cat", "nor.jpg,dog"]
    lines += [f"train/{label}/{i}.jpg,{label}" for label in ("cat", "dog") for i in range(1, 6)]
    (photos / "list.csv").write_text("\n".join(lines))
    diagnosis = examine_classes(photos / "list.csv")
    assert kinds(diagnosis) == {
        "missing file": {"no.jpg", "nor.jpg"},
        "listed twice": {"train/cat/0.jpg"},
        "contradiction": {"train/cat/0.jpg"},
    }
    assert len(diagnosis.entries) == 10


def test_which_duplicate_is_kept(photos: Path) -> None:
    for plant in (copy("train/cat/0.jpg", "test/cat/a.jpg"), copy("train/cat/0.jpg", "val/cat/a.jpg")):
        plant(photos)
    for plant in (copy("train/cat/1.jpg", "val/dog/b.jpg"), copy("train/dog/2.jpg", "train/dog/c.jpg")):
        plant(photos)
    diagnosis = examine_classes(photos)
    dropped = {file.relative_to(photos).as_posix() for file in photos.rglob("*.jpg")} - {entry.name for entry in diagnosis.entries}
    assert dropped == {"train/cat/0.jpg", "val/cat/a.jpg", "train/cat/1.jpg", "val/dog/b.jpg", "train/dog/c.jpg"}
    assert "class missing" in kinds(diagnosis), "test has no dog"


def test_a_class_without_usable_training_images_is_left_out(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(f"{split}/cow/1.jpg", b"<html>")(photos)
    write("val/cow/2.jpg", encoded(photo(1000), "JPEG"))(photos)
    diagnosis = examine_classes(photos)
    assert {entry.label for entry in diagnosis.entries} == {"cat", "dog"}
    repair_classes(diagnosis, tmp_path / "clean.csv")
    assert open_data(tmp_path / "clean.csv").classes == ("cat", "dog")


def test_statistics_match_numpy(photos: Path) -> None:
    write("train/cat/long.jpg", encoded(photo(1, (60, 90)), "JPEG"))(photos)
    pixels = [read(file, 3).reshape(-1, 3) / 255 for file in sorted((photos / "train").rglob("*.jpg"))]
    weights = np.concatenate([np.full(len(one), 1 / len(one)) for one in pixels])  # each image counts the same
    whole = np.concatenate(pixels)
    covariance = np.cov(whole.T, aweights=weights, ddof=0)
    diagnosis = examine_classes(photos, workers=3)
    np.testing.assert_allclose(diagnosis.pixels.mean, np.average(whole, axis=0, weights=weights), atol=1e-6)
    np.testing.assert_allclose(diagnosis.pixels.std, np.sqrt(covariance.diagonal()), atol=1e-6)
    vectors = np.array(diagnosis.pixels.eigenvectors)
    np.testing.assert_allclose(vectors @ np.diag(diagnosis.pixels.eigenvalues) @ vectors.T, covariance, atol=1e-6)
    assert list(diagnosis.pixels.eigenvalues) == sorted(diagnosis.pixels.eigenvalues, reverse=True) and (vectors[0] > 0).all()
    assert examine_classes(photos, workers=1) == diagnosis, "independent of the number of threads"


def test_large_images_are_sampled(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    whole = examine_classes(photos)
    monkeypatch.setattr(inspection, "SAMPLE", 500)
    monkeypatch.setattr(inspection, "LARGE", 1)
    np.testing.assert_allclose(examine_classes(photos).pixels.mean, whole.pixels.mean, atol=0.01)


def test_gray_sets(tmp_path: Path) -> None:
    for i in range(10):
        write(f"{'ab'[i % 2]}/{i}.png", encoded(photo(i).convert("L"), "PNG"))(tmp_path)
    diagnosis = examine_classes(tmp_path)
    assert (
        diagnosis.findings == ()
        and len(diagnosis.pixels.mean) == len(diagnosis.pixels.std) == 1
        and diagnosis.pixels.eigenvectors == ()
    )


def test_a_named_set(tmp_path: Path) -> None:
    diagnosis = examine_classes("fashion-sample")
    assert {split: sum(n.values()) for split, n in diagnosis.per_class.items()} == {"train": 6000, "test": 1000}
    assert set(kinds(diagnosis)) <= {"contradiction", "leak", "duplicate", "blank"} and len(diagnosis.pixels.mean) == 1
    with pytest.raises(UserError, match="nothing to write: no image is usable, or the images are not files"):
        repair_classes(diagnosis, tmp_path / "x.csv")
    with pytest.raises(UserError, match="a named data set has no image files"):
        check_source("fashion-sample")


def test_a_packed_set(photos: Path, tmp_path: Path) -> None:
    Image.fromarray(read(photos / "val" / "dog" / "0.jpg", 3)).save(photos / "train" / "cat" / "again.png")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)  # of another size, so that images stay files
    Image.fromarray(pixels).save(photos / "train" / "dog" / "larger.jpg")
    before, out = examine_classes(photos), tmp_path / "packed"
    written = pack(photos, out, PackFormat(None))
    diagnosis = examine_classes(out)
    assert kinds(diagnosis) == kinds(before) == {k: {"train/cat/again.png", "val/dog/0.jpg"} for k in ("leak", "contradiction")}
    assert (diagnosis.name, diagnosis.per_class, diagnosis.pixels) == (before.name, before.per_class, before.pixels)
    assert diagnosis.entries == ()
    content = bytearray((out / "shard-00000.bin").read_bytes())
    content[int(written.index["offset"][3]) + 100] ^= 1
    (out / "shard-00000.bin").write_bytes(content)
    assert kinds(examine_classes(out)) == kinds(before) | {"damaged": {written.names[3]}}
    with pytest.raises(UserError, match="a packed set: fix the original images"):
        check_source(out)
    assert not check_source(photos)


def test_the_imagenet_sample(real_data: Path) -> None:
    diagnosis = examine_classes(real_data / "imagenet-sample")
    assert set(kinds(diagnosis)) <= {"few images", "gray", "color space", "rotated", "elongated"}
    assert {"gray", "few images"} >= {kind for kind in kinds(diagnosis) if not KINDS[kind].fault}
    # AlexNet's published eigenvectors, up to sign
    published = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    np.testing.assert_allclose(np.abs(np.array(diagnosis.pixels.eigenvectors).T @ published), np.eye(3), atol=0.1)


def test_empty_folders_and_unreadable_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no images or class folders"):
        examine_classes(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="contains no images with a class"):
        examine_classes(tmp_path)
    write("train/cat/1.jpg", b"<html>")(tmp_path)
    diagnosis = examine_classes(tmp_path)
    assert set(kinds(diagnosis)) == {"not an image", "one class", "few images"}
    assert (diagnosis.pixels.mean, diagnosis.pixels.height, diagnosis.entries) == ((), (), ())
    with pytest.raises(UserError, match="no image is usable"):
        repair_classes(diagnosis, tmp_path / "clean.csv")
    assert not (tmp_path / "clean.csv").exists()


def test_invalid_targets_are_rejected(photos: Path, tmp_path: Path) -> None:
    diagnosis = examine_classes(photos)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.csv").symlink_to("nowhere")
    for target in ("there.csv", "there", "broken.csv"):
        with pytest.raises(UserError, match="already exists"):
            repair_classes(diagnosis, tmp_path / target)
    with pytest.raises(UserError, match=r"must be a \.csv list, or a folder"):
        repair_classes(diagnosis, tmp_path / "clean.jsonl")
    with pytest.raises(UserError, match="no does not exist"):
        repair_classes(diagnosis, tmp_path / "no" / "clean.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    names = {f"{label}/{i}.jpg": label for label in ("cat", "dog") for i in range(6)}
    for bad in ("..", "a/b", "train", "."):
        lines = [f"train/{name},{bad if label == 'cat' else label}" for name, label in names.items()]
        (photos / "list.csv").write_text("file,label\n" + "\n".join(lines))
        with pytest.raises(UserError, match="cannot be a folder name"):
            repair_classes(examine_classes(photos / "list.csv"), tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.csv", "photos", "there", "there.csv"]


def test_a_failed_copy_leaves_no_files(photos: Path, tmp_path: Path) -> None:
    diagnosis = examine_classes(photos)
    (photos / "val" / "dog" / "4.jpg").unlink()
    with pytest.raises(UserError, match=r"copy: No such file"):
        repair_classes(diagnosis, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_copy_keeps_the_bytes_and_corrects_the_names(photos: Path, tmp_path: Path) -> None:
    as_png("train/cat/0.jpg", "train/cat/new.png")(photos)
    (photos / "train/cat/0.jpg").unlink()
    (photos / "train/cat/new.png").rename(photos / "train/cat/0.jpg")
    (photos / "train/cat/deep").mkdir()
    Image.open(photos / "val/cat/0.jpg").rotate(180).save(photos / "train/cat/deep/1.JPG")
    repair_classes(examine_classes(photos), tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy/train/cat").iterdir()) == [
        *("0.png", "1-2.JPG", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg")
    ]
    assert (tmp_path / "copy/train/cat/0.png").read_bytes() == (photos / "train/cat/0.jpg").read_bytes()


def test_memory_does_not_grow_with_the_pixels(tmp_path: Path) -> None:
    """The pixels of 300 images would take 530 MB; hard links create them quickly."""
    write("a/0.png", encoded(Image.new("RGB", (768, 768), "red"), "PNG"))(tmp_path)
    write("b/0.png", encoded(Image.new("RGB", (768, 768), "blue"), "PNG"))(tmp_path)
    for i in range(1, 150):
        for label in "ab":
            os.link(tmp_path / label / "0.png", tmp_path / label / f"{i}.png")
    code = (
        "import resource, sys\nfrom reslearn.data.doctor import examine\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\ndiagnosis = examine(sys.argv[1])\n"
        "assert [len(f.names) for f in diagnosis.findings if f.kind == 'duplicate'] == [150, 150]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    assert int(run_python("-c", code, tmp_path).out) < 200_000, "kilobytes"


def test_findings_are_in_the_order_of_kinds(photos: Path) -> None:
    for name in ("a line break in a name", "no bytes", "twice"):
        FAULTS[name][0](photos)
    kinds = [finding.kind for finding in examine_classes(photos).findings]
    assert kinds == sorted(kinds, key=list(KINDS).index)
