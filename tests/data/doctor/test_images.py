"""Every planted fault is found, and nothing else; a clean set stays clean; the numbers are numpy's."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import run_python
from planting import FAULTS, NOTES, as_png, clean, copy, encoded, photo, write
from reslearn.data import open as open_data
from reslearn.data.doctor import images as doctor
from reslearn.data.doctor import look
from reslearn.data.doctor.diagnosis import KINDS, Diagnosis
from reslearn.data.doctor.images import examine
from reslearn.data.doctor.repair import check_source, mend
from reslearn.data.images.files import read
from reslearn.data.images.pack import Form, pack
from reslearn.errors import UserError


@pytest.fixture(scope="module")
def spotless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clean(tmp_path_factory.mktemp("clean") / "photos")


@pytest.fixture
def photos(spotless: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(spotless, tmp_path / "photos"))


def kinds(found: Diagnosis) -> dict[str, set[str]]:
    every: dict[str, set[str]] = {}
    for finding in found.findings:
        every.setdefault(finding.kind, set()).update(finding.names)
    return every


def test_a_clean_set_is_clean(spotless: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = examine(spotless, lambda what, done, total: seen.append((done, total)))
    assert found.clean and found.findings == () and seen[-1] == (22, 22)
    assert found.images == {"train": {"cat": 6, "dog": 6}, "val": {"cat": 5, "dog": 5}}
    assert (found.formats, found.modes) == ({"JPEG": 22}, {"RGB": 22})
    assert (found.height, found.width, found.aspect) == ((48, 48, 48), (64, 64, 64), (1.3333, 1.3333, 1.3333))
    assert found.bytes == sum(file.stat().st_size for file in spotless.rglob("*.jpg"))
    assert len(found.kept) == 22 and all(kept.suffix == ".jpg" for kept in found.kept)


@pytest.mark.parametrize("name", [*FAULTS, *NOTES])
def test_each_planted_fault_is_found_alone_and_mended(name: str, photos: Path, tmp_path: Path) -> None:
    plant, expected = (FAULTS | NOTES)[name]
    plant(photos)
    found = examine(photos)
    assert kinds(found) == expected
    assert found.clean == (name in NOTES) and all(KINDS[kind].fault == (name in FAULTS) for kind in expected if kind != "gray")
    for target in (tmp_path / "clean.csv", tmp_path / "copy"):
        mend(found, target)
        assert len({entry.file for entry, _ in found.kept}) == sum(map(len, open_data(target).splits.values()))
        again = set(kinds(examine(target)))
        left = {kind for kind in expected if not KINDS[kind].mended} | (
            {"wrong suffix", "colliding names"} if target.suffix else set()
        )
        assert again <= left


def test_there_are_twenty_kinds_of_faults_and_each_row_is_planted(photos: Path) -> None:
    planted = {kind for _, expected in (FAULTS | NOTES).values() for kind in expected}
    assert len(planted & {kind for kind, row in KINDS.items() if row.fault}) >= 20
    elsewhere = {"missing file", "listed twice", "without a class"}  # of lists, and of ImageNet
    assert planted | elsewhere == set(KINDS)


def test_lists_are_examined_to_the_end(photos: Path) -> None:
    lines = ["file,label", "train/cat/0.jpg,cat", "train/cat/0.jpg,dog", "no.jpg,cat", "nor.jpg,dog"]
    lines += [f"train/{label}/{i}.jpg,{label}" for label in ("cat", "dog") for i in range(1, 6)]
    (photos / "list.csv").write_text("\n".join(lines))
    found = examine(photos / "list.csv")
    assert kinds(found) == {
        "missing file": {"no.jpg", "nor.jpg"},
        "listed twice": {"train/cat/0.jpg"},
        "contradiction": {"train/cat/0.jpg"},
    }
    assert len(found.kept) == 10


def test_what_is_kept_of_copies(photos: Path, tmp_path: Path) -> None:
    for plant in (copy("train/cat/0.jpg", "test/cat/a.jpg"), copy("train/cat/0.jpg", "val/cat/a.jpg")):
        plant(photos)
    for plant in (copy("train/cat/1.jpg", "val/dog/b.jpg"), copy("train/dog/2.jpg", "train/dog/c.jpg")):
        plant(photos)
    found = examine(photos)
    gone = {entry.name for entry in open_names(photos)} - {entry.name for entry, _ in found.kept}
    assert gone == {"train/cat/0.jpg", "val/cat/a.jpg", "train/cat/1.jpg", "val/dog/b.jpg", "train/dog/c.jpg"}
    assert "class missing" in kinds(found), "test has no dog"


def open_names(root: Path) -> list[Path]:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    return [Named(file.relative_to(root).as_posix()) for file in root.rglob("*.jpg")]  # type: ignore[misc]


def test_a_class_that_loses_all_its_training_images_is_left_out(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(f"{split}/cow/1.jpg", b"<html>")(photos)
    write("val/cow/2.jpg", encoded(photo(1000), "JPEG"))(photos)
    found = examine(photos)
    assert {entry.label for entry, _ in found.kept} == {"cat", "dog"}
    mend(found, tmp_path / "clean.csv")
    assert open_data(tmp_path / "clean.csv").classes == ("cat", "dog")


def test_statistics_are_numpys(photos: Path) -> None:
    write("train/cat/long.jpg", encoded(photo(1, (60, 90)), "JPEG"))(photos)
    pixels = [read(file, 3).reshape(-1, 3) / 255 for file in sorted((photos / "train").rglob("*.jpg"))]
    weights = np.concatenate([np.full(len(one), 1 / len(one)) for one in pixels])  # each image counts the same
    whole = np.concatenate(pixels)
    covariance = np.cov(whole.T, aweights=weights, ddof=0)
    found = examine(photos, workers=3)
    np.testing.assert_allclose(found.mean, np.average(whole, axis=0, weights=weights), atol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(covariance.diagonal()), atol=1e-6)
    vectors = np.array(found.eigenvectors)
    np.testing.assert_allclose(vectors @ np.diag(found.eigenvalues) @ vectors.T, covariance, atol=1e-6)
    assert list(found.eigenvalues) == sorted(found.eigenvalues, reverse=True) and (vectors[0] > 0).all()
    assert examine(photos, workers=1) == found, "whatever the number of threads"


def test_large_images_are_sampled(monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    whole = examine(photos)
    monkeypatch.setattr(look, "SAMPLE", 500)
    monkeypatch.setattr(look, "LARGE", 1)
    np.testing.assert_allclose(examine(photos).mean, whole.mean, atol=0.01)


def test_gray_sets(tmp_path: Path) -> None:
    for i in range(10):
        write(f"{'ab'[i % 2]}/{i}.png", encoded(photo(i).convert("L"), "PNG"))(tmp_path)
    found = examine(tmp_path)
    assert found.findings == () and len(found.mean) == len(found.std) == 1 and found.eigenvectors == ()


def test_a_set_known_by_name(tmp_path: Path) -> None:
    found = examine("fashion-sample")
    assert {split: sum(n.values()) for split, n in found.images.items()} == {"train": 6000, "test": 1000}
    assert set(kinds(found)) <= {"contradiction", "leak", "duplicate", "blank"} and len(found.mean) == 1
    with pytest.raises(UserError, match="nothing to write: none of its images is worth keeping, or they are no files"):
        mend(found, tmp_path / "x.csv")
    with pytest.raises(UserError, match="a set known by name, which has no files"):
        check_source("fashion-sample")


def test_a_packed_set(photos: Path, tmp_path: Path) -> None:
    Image.fromarray(read(photos / "val" / "dog" / "0.jpg", 3)).save(photos / "train" / "cat" / "again.png")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)  # of another size: others stay in memory
    Image.fromarray(pixels).save(photos / "train" / "dog" / "larger.jpg")
    before, out = examine(photos), tmp_path / "packed"
    made = pack(photos, out, Form(None))
    found = examine(out)
    assert kinds(found) == kinds(before) == {k: {"train/cat/again.png", "val/dog/0.jpg"} for k in ("leak", "contradiction")}
    for what in ("name", "images", "bytes", "formats", "height", "width", "mean", "std", "eigenvectors"):
        assert getattr(found, what) == getattr(before, what), what
    assert found.kept == ()
    content = bytearray((out / "shard-00000.bin").read_bytes())
    content[int(made.index["offset"][3]) + 100] ^= 1
    (out / "shard-00000.bin").write_bytes(content)
    assert kinds(examine(out)) == kinds(before) | {"damaged": {made.names[3]}}
    with pytest.raises(UserError, match="packed: mend the images that it was made of"):
        check_source(out)
    assert not check_source(photos)


def test_the_sample_of_imagenet(real_data: Path) -> None:
    found = examine(real_data / "imagenet-sample")
    assert set(kinds(found)) <= {"few images", "gray", "color space", "rotated", "elongated"}
    assert {"gray", "few images"} >= {kind for kind in kinds(found) if not KINDS[kind].fault}
    # AlexNet's axes (facts: the first is brightness, the second red against blue), up to their signs
    published = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    np.testing.assert_allclose(np.abs(np.array(found.eigenvectors).T @ published), np.eye(3), atol=0.1)


def test_an_empty_folder_and_unreadable_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no class folders, but no images"):
        examine(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images that have a class"):
        examine(tmp_path)
    write("train/cat/1.jpg", b"<html>")(tmp_path)
    found = examine(tmp_path)
    assert set(kinds(found)) == {"not an image", "one class", "few images"}
    assert (found.mean, found.height, found.kept) == ((), (), ())
    with pytest.raises(UserError, match="none of its images is worth keeping"):
        mend(found, tmp_path / "clean.csv")
    assert not (tmp_path / "clean.csv").exists()


def test_what_mend_refuses(photos: Path, tmp_path: Path) -> None:
    found = examine(photos)
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "there").mkdir()
    (tmp_path / "broken.csv").symlink_to("nowhere")
    for target in ("there.csv", "there", "broken.csv"):
        with pytest.raises(UserError, match="is there already"):
            mend(found, tmp_path / target)
    with pytest.raises(UserError, match=r"a clean list ends in \.csv"):
        mend(found, tmp_path / "clean.jsonl")
    with pytest.raises(UserError, match="there is no folder"):
        mend(found, tmp_path / "no" / "clean.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    names = {f"{label}/{i}.jpg": label for label in ("cat", "dog") for i in range(6)}
    for bad in ("..", "a/b", "train", "."):
        lines = [f"train/{name},{bad if label == 'cat' else label}" for name, label in names.items()]
        (photos / "list.csv").write_text("file,label\n" + "\n".join(lines))
        with pytest.raises(UserError, match="cannot be the name of a folder"):
            mend(examine(photos / "list.csv"), tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.csv", "photos", "there", "there.csv"]


def test_a_copy_that_fails_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    found = examine(photos)
    (photos / "val" / "dog" / "4.jpg").unlink()
    with pytest.raises(UserError, match=r"copy: No such file"):
        mend(found, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_copy_has_the_same_bytes_under_right_names(photos: Path, tmp_path: Path) -> None:
    as_png("train/cat/0.jpg", "train/cat/new.png")(photos)
    (photos / "train/cat/0.jpg").unlink()
    (photos / "train/cat/new.png").rename(photos / "train/cat/0.jpg")
    (photos / "train/cat/deep").mkdir()
    Image.open(photos / "val/cat/0.jpg").rotate(180).save(photos / "train/cat/deep/1.JPG")
    mend(examine(photos), tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy/train/cat").iterdir()) == [
        *("0.png", "1-2.JPG", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg")
    ]
    assert (tmp_path / "copy/train/cat/0.png").read_bytes() == (photos / "train/cat/0.jpg").read_bytes()


def test_memory_does_not_grow_with_the_pixels(tmp_path: Path) -> None:
    """Pixels of 800 images would be 1.4 GB; links to one file make them quickly."""
    write("a/0.png", encoded(Image.new("RGB", (768, 768), "red"), "PNG"))(tmp_path)
    write("b/0.png", encoded(Image.new("RGB", (768, 768), "blue"), "PNG"))(tmp_path)
    for i in range(1, 400):
        for label in "ab":
            os.link(tmp_path / label / "0.png", tmp_path / label / f"{i}.png")
    code = (
        "import resource, sys\nfrom reslearn.data.doctor.images import examine\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nfound = examine(sys.argv[1], workers=4)\n"
        "assert [len(f.names) for f in found.findings if f.kind == 'duplicate'] == [400, 400]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    assert int(run_python("-c", code, tmp_path).out) < 200_000, "kilobytes"


def test_findings_are_in_the_tables_order(photos: Path) -> None:
    for name in ("a line break in a name", "no bytes", "twice"):
        FAULTS[name][0](photos)
    order = list(KINDS)
    found = [order.index(finding.kind) for finding in examine(photos).findings]
    assert found == sorted(found) and doctor.KINDS is KINDS
