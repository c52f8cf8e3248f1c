"""A VOCdevkit with VOC2007 and VOC2012 is one set."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from boxed import findings, voc, voc_object, voc_xml
from boxed import photo as gray
from planting import photo
from reslearn.data.boxes.box_set import BadBoxes
from reslearn.data.boxes.read import holds_boxes, open_boxes, split_names
from reslearn.data.doctor.boxes import examine_boxes
from reslearn.data.doctor.repair_boxes import count_named, repair_boxes
from reslearn.errors import UserError

CAT, DOG, TRAIN = voc_object((5, 6, 24, 30)), voc_object((30, 5, 55, 35), "dog"), voc_object((7, 3, 50, 30), "train")
LISTS = {
    "VOC2007": {
        "train": {"000005": [CAT, DOG], "1": [DOG]},
        "val": {"000007": [DOG]},
        "test": {"000001": [CAT], "2": [TRAIN, DOG]},
    },
    "VOC2012": {"train": {"2008_000008": [TRAIN, DOG], "1": [CAT]}, "val": {"2008_000002": [TRAIN, CAT]}},
}


def devkit(root: Path) -> Path:
    """The unpacked trainval archives of both years and the test archive of 2007, with lists by class and of other tasks."""
    seed = 0
    for year, lists in LISTS.items():
        for split, images in lists.items():
            voc(root / year, {stem: voc_xml(*objects) for stem, objects in images.items()}, split)
            for stem in images:
                seed += 1
                photo(seed, (40, 60)).save(root / year / "JPEGImages" / f"{stem}.jpg", quality=95)
        main = root / year / "ImageSets" / "Main"
        (main / "trainval.txt").write_text((main / "train.txt").read_text() + (main / "val.txt").read_text())
        (main / "cat_train.txt").write_text("000005  1\n")
        (root / year / "ImageSets" / "Layout").mkdir()
    (root / "VOCcode").mkdir()
    (root / "VOC2006").mkdir()  # another format
    return root


def with_test_of_2012(root: Path, annotated: int = 0) -> Path:
    """Adds the test archive of 2012: images and their list."""
    for i in range(3):
        gray(root / f"VOC2012/JPEGImages/2010_00000{i}.jpg")
        if i < annotated:
            (root / f"VOC2012/Annotations/2010_00000{i}.xml").write_text(voc_xml(CAT))
    (root / "VOC2012/ImageSets/Main/test.txt").write_text("2010_000000\n2010_000001\n")
    return root


def names(root: Path, split: str) -> list[str]:
    return [image.name for image in open_boxes(root, bad="drop", only=[split])[split].images]


def test_a_split_contains_all_years(tmp_path: Path) -> None:
    root = devkit(tmp_path / "VOCdevkit")
    assert holds_boxes(root) and split_names(root) == ["train", "val", "test"]
    sets = open_boxes(root)
    assert {name: len(one) for name, one in sets.items()} == {"train": 4, "val": 2, "test": 2}
    assert all(split.classes == ("cat", "dog", "train") and split.findings == () for split in sets.values())
    assert names(root, "train") == ["VOC2007/000005", "VOC2007/1", "VOC2012/2008_000008", "VOC2012/1"]
    assert sorted(names(root, "trainval")) == sorted(names(root, "train") + names(root, "val"))
    assert sets["test"].name == "VOCdevkit/test" and names(root, "test") == ["VOC2007/000001", "VOC2007/2"]


def test_images_are_the_same_in_the_devkit_and_in_a_single_year(tmp_path: Path) -> None:
    root = devkit(tmp_path / "VOCdevkit")
    (root / "VOC2012/JPEGImages/1.jpg").rename(root / "VOC2012/JPEGImages/1.jpeg")  # 2007 has 1.jpg
    devkit_images = {image.name: image for image in open_boxes(root, only=["trainval"])["trainval"].images}
    for year in LISTS:
        for image in open_boxes(root / year, only=["trainval"], classes=["cat", "dog", "train"])["trainval"].images:
            twin = devkit_images.pop(f"{year}/{image.name}")
            assert twin.path == image.path and np.array_equal(twin.pixels(), image.pixels())
            for field in ("boxes", "labels", "ids", "areas"):
                assert np.array_equal(getattr(twin.objects, field), getattr(image.objects, field))
    assert not devkit_images


def test_findings_name_paths_relative_to_the_devkit(tmp_path: Path) -> None:
    root = devkit(tmp_path / "VOCdevkit")
    (root / "VOC2012/Annotations/1.xml").write_text(voc_xml(CAT, voc_object((9, 9, 9, 30))))
    (root / "VOC2007/JPEGImages/000007.jpg").unlink()
    with (root / "VOC2012/ImageSets/Main/train.txt").open("a") as file:
        file.write("1\n")
    with pytest.raises(BadBoxes, match=r"VOC2012/Annotations/1\.xml object 1: no area: "):
        open_boxes(root)
    assert [(f.kind, *f.names, f.index) for f in findings(root)] == [
        ("image twice", "VOC2012/ImageSets/Main/train.txt", None),
        ("no area", "VOC2012/Annotations/1.xml", 1),
        ("no such image", "VOC2007/Annotations/000007.xml", None),
    ]


def test_a_test_list_without_annotations_is_left_out_with_a_note(tmp_path: Path) -> None:
    root = with_test_of_2012(devkit(tmp_path / "VOCdevkit"))
    sets = open_boxes(root)
    assert len(sets["test"]) == 2 and [str(f) for f in sets["train"].findings] == [
        "VOC2012/ImageSets/Main/test.txt: not annotated: none of its 2 images has a file in Annotations: left out"
    ]
    assert open_boxes(root, only=["test"])["test"].faults() == {"not annotated": 1}
    shutil.rmtree(root / "VOC2007")
    assert list(open_boxes(root)) == ["train", "val"]
    with pytest.raises(UserError, match=r"no split 'test': the images of VOC2012/ImageSets/Main/test\.txt have no annotations"):
        open_boxes(root, only=["test"])


def test_a_test_list_without_annotations_is_left_out_in_a_single_folder(tmp_path: Path) -> None:
    root = with_test_of_2012(devkit(tmp_path / "VOCdevkit")) / "VOC2012"
    sets = open_boxes(root)
    assert list(sets) == ["train", "val"] and sets["train"].faults() == {"not annotated": 1}


def test_an_unreadable_test_list_is_an_error_only_if_it_is_opened(tmp_path: Path) -> None:
    root = devkit(tmp_path / "VOCdevkit") / "VOC2012"
    (root / "ImageSets/Main/test.txt").write_text("")
    assert list(open_boxes(root, only=["val"])) == ["val"]
    with pytest.raises(UserError, match=r"test\.txt: lists no images"):
        open_boxes(root)


def test_a_test_list_with_some_annotations_needs_all_of_them(tmp_path: Path) -> None:
    root = with_test_of_2012(devkit(tmp_path / "VOCdevkit"), annotated=1)
    with pytest.raises(BadBoxes, match=r"1 fault: VOC2012/Annotations/2010_000001\.xml: unreadable annotation: .*no such file"):
        open_boxes(root)
    with_test_of_2012(root, annotated=2)
    assert len(open_boxes(root)["test"]) == 4


def test_the_fingerprint_depends_on_the_year(tmp_path: Path) -> None:
    root = devkit(tmp_path / "VOCdevkit")
    before = open_boxes(root)["train"].fingerprint()
    assert (
        devkit(tmp_path / "other" / "VOCdevkit") and open_boxes(tmp_path / "other" / "VOCdevkit")["train"].fingerprint() == before
    )
    (root / "VOC2007").rename(root / "VOC2004")
    assert open_boxes(root)["train"].fingerprint() != before


def copy_as(year: str) -> Callable[[Path], object]:
    return lambda root: shutil.copytree(root / "VOC2012", root / year)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (copy_as("VOC2010"), "VOC2010 and VOC2012 have images in common, .*keep one of them, or open .*VOCdevkit/VOC2012"),
        (lambda root: shutil.rmtree(root / "VOC2012/ImageSets/Main"), r"VOCdevkit/VOC2012: no image lists in ImageSets/Main"),
        (
            lambda root: shutil.rmtree(root / "VOC2012/Annotations"),
            r"VOC2012/Annotations/2008_000008\.xml: .*there is no such file",
        ),
        (
            lambda root: (root / "VOC2012/ImageSets/Main/train.txt").write_text(""),
            "VOC2012/ImageSets/Main/train.txt: lists no images",
        ),
    ],
)
def test_invalid_devkits(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    root = devkit(tmp_path / "VOCdevkit")
    change(root)
    assert holds_boxes(root)
    with pytest.raises(UserError, match=message) as caught:
        open_boxes(root)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no split 'trainvall'; did you mean 'trainval'"):
        open_boxes(devkit(tmp_path / "good"), only=["trainvall"])


def test_a_copy_of_a_devkit_is_a_devkit(tmp_path: Path) -> None:
    root = with_test_of_2012(devkit(tmp_path / "VOCdevkit"))
    diagnosis = examine_boxes(root)
    assert diagnosis.clean and [(f.kind, f.names) for f in diagnosis.findings if f.kind == "not annotated"] == [
        ("not annotated", ("VOC2012/ImageSets/Main/test.txt",))
    ]
    outside = voc_object((50, 5, 70, 9))
    (root / "VOC2012/Annotations/1.xml").write_text(voc_xml(voc_object((9, 9, 9, 30)), CAT, outside))
    (root / "VOC2007/JPEGImages/000007.jpg").write_bytes((root / "VOC2007/JPEGImages/1.jpg").read_bytes())  # a leak
    diagnosis = examine_boxes(root)
    assert [(f.kind, f.names, f.index) for f in diagnosis.findings if f.fault] == [
        ("leak", ("VOC2007/JPEGImages/1.jpg", "VOC2007/JPEGImages/000007.jpg"), None),
        ("no area", ("VOC2012/Annotations/1.xml",), 0),
        ("sticks out", ("VOC2012/Annotations/1.xml",), 2),
    ]
    assert count_named(root) == (8, 14)
    repair_boxes(diagnosis, root, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert not any(f.fault for f in findings(copy)) and sorted(p.name for p in copy.iterdir()) == ["VOC2007", "VOC2012"]
    assert names(copy, "train") == ["VOC2007/000005", "VOC2012/2008_000008", "VOC2012/1"]
    assert (copy / "VOC2007/ImageSets/Main/cat_train.txt").read_text() == "000005  1\n"
    assert names(copy, "trainval") == [name for name in names(root, "trainval") if name != "VOC2007/1"]
    repaired = {image.name: image for image in open_boxes(copy)["train"].images}["VOC2012/1"]
    assert repaired.objects.boxes.tolist() == [[4, 5, 24, 30], [49, 4, 60, 9]]
    assert names(copy, "test") == names(root, "test") and names(copy, "val") == names(root, "val")
    assert repaired.path.read_bytes() == (root / "VOC2012/JPEGImages/1.jpg").read_bytes()
