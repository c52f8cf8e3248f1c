"""The doctor on sets with boxes: every planted fault is found and repaired."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boxed import annotation, coco, voc, voc_object, voc_xml
from planting import encoded, photo
from reslearn.data.boxes.read import holds_boxes, open_boxes, survey
from reslearn.data.doctor.boxes import examine_boxes, parse_size
from reslearn.data.doctor.diagnosis import Diagnosis
from reslearn.data.doctor.repair_boxes import count_named, repair_boxes
from reslearn.data.findings import KINDS
from reslearn.errors import UserError

CAT, DOG = voc_object((5, 6, 24, 30)), voc_object((30, 5, 55, 35), "dog")
NAMES = [f"a{i}" for i in range(6)]


def clean_voc(root: Path) -> Path:
    """Six training, four validation images of 60 x 40 pixels, each with a cat and a dog."""
    seed = 0
    for split, names in (("train", NAMES), ("val", ["v0", "v1", "v2", "v3"])):
        voc(root, {name: voc_xml(CAT, DOG) for name in names}, split)
        for name in names:
            seed += 1
            photo(seed, (40, 60)).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    return root


def clean_coco(root: Path) -> Path:
    """Two splits of two images each."""
    for split, seed in (("train", 10), ("val", 20)):
        (root / split).mkdir(parents=True)
        path = coco(root / split, [annotation(k, 1 + k % 2, 3 + 4 * (k % 2), (k, 6, 20, 20)) for k in range(10)])
        for i, name in enumerate("ab"):
            photo(seed + i, (40, 60)).save(root / split / f"{name}.jpg", quality=95)
        (root / "annotations").mkdir(exist_ok=True)
        path.rename(root / "annotations" / f"instances_{split}.json")
    return root


def xml(name: str, document: str) -> Callable[[Path], Any]:
    return lambda root: (root / "Annotations" / f"{name}.xml").write_text(document)


def image(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda root: (root / "JPEGImages" / name).write_bytes(data)


def copied(source: str, target: str) -> Callable[[Path], Any]:
    return lambda root: (root / "JPEGImages" / target).write_bytes((root / "JPEGImages" / source).read_bytes())


def listed(name: str, split: str) -> Callable[[Path], Any]:
    def plant(root: Path) -> None:
        with (root / "ImageSets" / "Main" / f"{split}.txt").open("a") as file:
            file.write(f"{name}\n")

    return plant


def relabeled(root: Path) -> None:
    for path in (root / "Annotations").glob("v*.xml"):
        path.write_text(voc_xml(CAT))


JPEG = encoded(photo(99, (40, 60)), "JPEG")
A = "Annotations/a0.xml"
# name: (function that plants the fault into a VOC set, the expected finding: kind, names, index)
VOC = {
    "no area": (xml("a0", voc_xml(CAT, DOG, voc_object((9, 9, 9, 20)))), ("no area", (A,), 2)),
    "NaN": (xml("a0", voc_xml(voc_object((1, "nan", 9, 9)), CAT, DOG)), ("not finite", (A,), 0)),
    "outside": (xml("a0", voc_xml(CAT, voc_object((70, 5, 80, 9)), DOG)), ("outside", (A,), 1)),
    "sticks out": (xml("a0", voc_xml(CAT, DOG, voc_object((40, 10, 70, 90)))), ("sticks out", (A,), 2)),
    "twice": (xml("a0", voc_xml(CAT, DOG, CAT)), ("box twice", (A,), 2)),
    "no number": (xml("a0", voc_xml(CAT, DOG, voc_object((1, "x", 9, 9)))), ("unreadable object", (A,), 2)),
    "nearly twice": (xml("a0", voc_xml(CAT, DOG, voc_object((5, 6, 24, 31)))), ("nearly twice", ("a0",), None)),
    "two classes": (xml("a0", voc_xml(CAT, DOG, voc_object((5, 6, 24, 30), "dog"))), ("two classes", ("a0",), None)),
    "wrong size": (xml("a0", voc_xml(CAT, DOG, size=(60, 40))), ("wrong size", (A,), None)),
    "no xml": (xml("a0", "<annotation>"), ("unreadable annotation", (A,), None)),
    "image gone": (lambda root: (root / "JPEGImages/a0.jpg").unlink(), ("no such image", (A,), None)),
    "no image": (image("a0.jpg", b"<html>"), ("unreadable image", (A,), None)),
    "cut short": (image("a0.jpg", JPEG[: len(JPEG) * 3 // 4]), ("truncated", ("JPEGImages/a0.jpg",), None)),
    "two images": (image("a0.png", encoded(photo(99, (40, 60)), "PNG")), ("two images", (A,), None)),
    "misnamed": (image("a0.jpg", encoded(photo(99, (40, 60)), "PNG")), ("wrong suffix", ("JPEGImages/a0.jpg",), None)),
    "twice in a split": (copied("a0.jpg", "a1.jpg"), ("duplicate", ("JPEGImages/a0.jpg", "JPEGImages/a1.jpg"), None)),
    "leak": (copied("a0.jpg", "v1.jpg"), ("leak", ("JPEGImages/a0.jpg", "JPEGImages/v1.jpg"), None)),
    "in both lists": (listed("a0", "val"), ("leak", ("JPEGImages/a0.jpg",), None)),
    "listed twice": (listed("a0", "train"), ("image twice", ("ImageSets/Main/train.txt",), None)),
    "in no list": (image("b9.jpg", JPEG), ("not listed", ("JPEGImages/b9.jpg",), None)),
    "class missing": (relabeled, ("class missing", ("dog",), None)),
}  # fmt: skip


@pytest.mark.parametrize(("plant", "expected"), VOC.values(), ids=list(VOC))
def test_every_planted_fault_is_found_and_repaired(
    tmp_path: Path, plant: Callable[[Path], Any], expected: tuple[str, tuple[str, ...], int | None]
) -> None:
    root = clean_voc(tmp_path / "set")
    plant(root)
    diagnosis = examine_boxes(root, workers=2)
    assert [(f.kind, f.names, f.index) for f in diagnosis.findings] == [expected]
    kind = KINDS[expected[0]]
    assert diagnosis.clean == (not kind.fault) and json.loads(json.dumps(diagnosis.as_json()))["counts"] == {expected[0]: 1}
    repair_boxes(diagnosis, root, tmp_path / "copy")
    again = examine_boxes(tmp_path / "copy", workers=2)
    assert again.clean == bool(kind.fix or not kind.fault)
    if kind.fix:
        assert again.findings == () and 9 <= sum(again.images.values()) <= 10


def test_voc_copies_keep_all_lists_without_the_dropped_images(tmp_path: Path) -> None:
    """A leaked image is kept in test and removed from trainval; lists by class keep their second column."""
    root = clean_voc(tmp_path / "set")
    voc(root, {name: voc_xml(CAT, DOG) for name in ("t0", "t1", "t2")}, "test")
    for seed in range(3):
        photo(40 + seed, (40, 60)).save(root / "JPEGImages" / f"t{seed}.jpg", quality=95)
    main, copy = root / "ImageSets" / "Main", tmp_path / "copy" / "ImageSets" / "Main"
    (main / "trainval.txt").write_text("".join(f"{name}\n" for name in ["v0", *NAMES, "v1", "v2", "v3", "t1"]))
    (main / "everything.txt").write_text("".join(f"{name}\n" for name in ["t0", "t1", "t2", *NAMES, "v0", "v1", "v2", "v3"]))
    (main / "some.txt").write_text("a0\nv1\nt2\n")
    (main / "cat_trainval.txt").write_text("".join(f"{name} {k % 3 - 1:2d}\n" for k, name in enumerate(["v0", "v1", "t1", *NAMES])))
    (main / "later.txt").write_text("a1\nelsewhere\n")
    listed("t1", "train")(root)
    image("a0.jpg", JPEG[: len(JPEG) * 3 // 4])(root)
    copied("t0.jpg", "v1.jpg")(root)
    diagnosis = examine_boxes(root)
    kinds = [(f.kind, f.names, f.detail) for f in diagnosis.findings if f.kind not in ("truncated", "leak")]
    assert kinds == [("list of others", ("ImageSets/Main/later.txt",), "1 of 2 images")]
    repair_boxes(diagnosis, root, tmp_path / "copy")
    texts = {path.stem: path.read_text().splitlines() for path in copy.iterdir()}
    rest = ["a1", "a2", "a3", "a4", "a5"]
    assert texts == {
        "train": rest, "val": ["v0", "v2", "v3"], "test": ["t0", "t1", "t2"], "trainval": ["v0", *rest, "v2", "v3"],
        "everything": ["t0", "t1", "t2", *rest, "v0", "v2", "v3"], "some": ["t2"], "later": ["a1"],
        "cat_trainval": ["v0 -1", "a1  0", "a2  1", "a3 -1", "a4  0", "a5  1"],
    }  # fmt: skip
    again = open_boxes(tmp_path / "copy", only=["trainval", "everything"])
    assert [len(f) for f in again.values()] == [8, 11] and examine_boxes(tmp_path / "copy").findings == ()


def summary(diagnosis: Diagnosis) -> dict[str, Any]:
    aside = ("name", "bytes", "mean", "std")
    return {key: value for key, value in diagnosis.as_json().items() if key not in aside}


@pytest.mark.parametrize("make", [clean_voc, clean_coco])
def test_a_clean_set_has_no_findings_and_an_identical_copy(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    diagnosis = examine_boxes(make(tmp_path / "set"))
    assert diagnosis.findings == () and diagnosis.clean
    repair_boxes(diagnosis, tmp_path / "set", tmp_path / "copy")
    assert summary(examine_boxes(tmp_path / "copy")) == summary(diagnosis)
    for one, other in zip(survey(tmp_path / "set").values(), survey(tmp_path / "copy").values(), strict=True):
        for image, twin in zip(one.images, other.images, strict=True):
            assert image.path.read_bytes() == twin.path.read_bytes() and image.name == twin.name
            for name in ("boxes", "labels", "ids", "difficult", "areas"):
                assert np.array_equal(getattr(image.objects, name), getattr(twin.objects, name))
    with pytest.raises(UserError, match="already exists"):
        repair_boxes(diagnosis, tmp_path / "set", tmp_path / "copy")
    with pytest.raises(UserError, match="sets with boxes are copied to a folder"):
        repair_boxes(diagnosis, tmp_path / "set", tmp_path / "list.csv")


def test_statistics(tmp_path: Path) -> None:
    root = clean_voc(tmp_path / "set")
    xml("a0", voc_xml())(root)
    xml("a1", voc_xml(CAT, voc_object((1, 1, 59, 39), "dog", "<difficult>1</difficult>")))(root)
    diagnosis = examine_boxes(root)
    objects, pixels = diagnosis.objects, diagnosis.pixels
    assert objects is not None and diagnosis.images == {"train": 6, "val": 4} and objects.without_objects == {"train": 1, "val": 0}
    assert diagnosis.per_class == {"train": {"cat": 5, "dog": 5}, "val": {"cat": 4, "dog": 4}}
    assert objects.by_size == {"cat": {"small": 9, "medium": 0, "large": 0}, "dog": {"small": 8, "medium": 1, "large": 0}}
    assert objects.side["cat"] == (22.3607,) * 3 and objects.aspect["cat"] == (0.8,) * 3  # 20 x 25
    assert objects.per_image == (0, 2, 2) and objects.difficult == 1 and (pixels.height, pixels.width) == ((40,) * 3, (60,) * 3)


def test_faults_of_coco_are_named_by_index_and_repaired(tmp_path: Path) -> None:
    root = clean_coco(tmp_path / "set")
    file = root / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"] += [
        annotation(20, bbox=(1, 1, 0, 5)),
        annotation(21, image=9),
        annotation(22, category=5),
        annotation(3),
        annotation(24, bbox=(50, 30, 20, 20)),
        annotation(25, bbox=(30, 20, 9, 9), segmentation=[[1, 2, 3]]),
        annotation(26, bbox=(30, 20, 10, 9), segmentation=[[30, 20, 40, 20, 40, 29]], keywords=["kept"]),
        annotation(27, bbox="wide"),
    ]
    document["images"] += [{"id": 7, "file_name": "gone.jpg", "height": 4, "width": 4}, {"id": 1, "file_name": "c.jpg"}]
    document["images"] += [{"id": 1, "file_name": "c.jpg", "height": 4, "width": 4}]
    document["categories"] += [{"id": 9, "name": "cat"}]
    file.write_text(json.dumps(document))
    diagnosis = examine_boxes(root)
    indices = [(f.kind, f.index) for f in diagnosis.findings if f.names == ("instances_train.json",)]
    assert indices == [
        ("unreadable image entry", None), ("category twice", None), ("duplicate id", None), ("duplicate id", 13),
        ("unknown class", 12), ("unknown image", 11), ("unreadable object", 17), ("no area", 10),
        ("sticks out", 14), ("bad segmentation", 15),
    ]  # fmt: skip
    assert [f.names for f in diagnosis.findings if f.kind == "no such image"] == [("instances_train.json image gone.jpg",)]
    repair_boxes(diagnosis, root, tmp_path / "copy")
    assert examine_boxes(tmp_path / "copy").findings == ()
    train = open_boxes(tmp_path / "copy")["train"]
    assert sum(len(image.objects) for image in train.images) == 12
    assert [50, 30, 60, 40] in np.concatenate([image.objects.boxes for image in train.images]).tolist()
    assert count_named(root) == (7, 28) and count_named(tmp_path / "copy") == (4, 22)
    copied = json.loads((tmp_path / "copy" / "annotations" / "instances_train.json").read_text())
    assert [entry["id"] for entry in copied["images"]] == [1, 2] and copied["annotations"][-1] == document["annotations"][-2]
    assert [entry["id"] for entry in copied["categories"]] == [7, 3]


def test_unused_files_and_images_are_noted(tmp_path: Path) -> None:
    root = clean_coco(tmp_path / "set")
    file = root / "annotations" / "instances_train.json"
    other = root / "annotations" / "instances_val.json"
    other.write_text(other.read_text().replace('"a.jpg"', '"../val/a.jpg"'))
    shutil.copy(file, file.with_name("instances_train2.json"))
    for name in ("train/c.png", "val/a.jpeg", "c.jpg"):  # the last is outside the image folders
        (root / name).write_bytes(JPEG)
    (root / "train" / "notes.txt").write_text("no image")
    diagnosis = examine_boxes(root)
    assert diagnosis.clean and [(f.kind, f.names) for f in diagnosis.findings] == [
        ("file aside", ("instances_train2.json",)),
        ("not listed", ("train/c.png", "val/a.jpeg")),
    ]
    voc_root = clean_voc(tmp_path / "voc")
    (voc_root / "ImageSets/Main/test.txt").write_text("my dog\n")
    (voc_root / "JPEGImages/my dog.jpg").write_bytes(JPEG)
    assert [(f.kind, f.names) for f in examine_boxes(voc_root).findings] == [("not annotated", ("ImageSets/Main/test.txt",))]
    second = examine_boxes(file.with_name("instances_train2.json"))
    assert second.images == {"all": 2} and [f.kind for f in second.findings] == ["not listed"]
    alone = examine_boxes(file)
    assert [(f.kind, f.names) for f in alone.findings] == [("not listed", (f"{root / 'train/c.png'}",))]


def test_segmentations_that_do_not_match_their_boxes_are_noted(tmp_path: Path) -> None:
    root = clean_coco(tmp_path / "set")
    file = root / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    elsewhere, inside = [[40, 10, 60, 10, 60, 30]], [[0, 6, 20, 6, -5, 26]]
    runs = {"size": [40, 60], "counts": [0, 40 * 60]}
    for one, outline in zip(document["annotations"], (inside, elsewhere, runs), strict=False):
        one["segmentation"] = outline
    file.write_text(json.dumps(document))
    diagnosis = examine_boxes(root)
    assert diagnosis.clean and [(f.kind, f.names, f.detail) for f in diagnosis.findings] == [
        ("outline elsewhere", ("a.jpg",), "object 2: segmentation bounds 0, 0, 60, 40; box 2, 6, 22, 26; IoU 0.17"),
        ("outline elsewhere", ("b.jpg",), "object 1: segmentation bounds 40, 10, 60, 30; box 1, 6, 21, 26; IoU 0.00"),
    ]
    assert all(len(split) == 2 for split in open_boxes(root).values()), "the set can still be opened"


@pytest.mark.parametrize(("split", "name", "kind"), [("val", "star", "unknown category"), ("train", "cat", "category twice")])
def test_objects_of_a_dropped_category_are_dropped(tmp_path: Path, split: str, name: str, kind: str) -> None:
    root = clean_coco(tmp_path / "set")
    file = root / "annotations" / f"instances_{split}.json"
    document = json.loads(file.read_text())
    document["categories"].append({"id": 9, "name": name})
    document["annotations"].append(annotation(50, 1, 9, (30, 5, 20, 20)))
    file.write_text(json.dumps(document))
    diagnosis = examine_boxes(root)
    assert {(f.kind, f.index) for f in diagnosis.findings} == {(kind, None), ("unknown class", 10)}
    repair_boxes(diagnosis, root, tmp_path / "copy")
    assert examine_boxes(tmp_path / "copy").findings == () and count_named(tmp_path / "copy") == (4, 20)
    assert open_boxes(tmp_path / "copy")["train"].classes == ("cat", "dog")


def test_counts_include_unreadable_images_and_objects(tmp_path: Path) -> None:
    root = clean_voc(tmp_path / "set")
    for plant in (VOC["image gone"][0], VOC["listed twice"][0], xml("v0", voc_xml(CAT, voc_object((9, 9, 9, 20)), DOG))):
        plant(root)
    assert count_named(root) == (10, 21)
    assert count_named(repair_boxes(examine_boxes(root), root, tmp_path / "copy")) == (9, 18)


def test_a_single_file_is_copied_beside_its_images(tmp_path: Path) -> None:
    path = coco(
        tmp_path / "set", [annotation(k, 1 + k % 2, bbox=(k, 6, 20, 20)) for k in range(6)] + [annotation(9, bbox=(1, 1, 0, 0))]
    )
    for i, name in enumerate("ab"):
        photo(i, (40, 60)).save(path.parent / f"{name}.jpg")
    diagnosis = examine_boxes(path)
    assert [(f.kind, f.index) for f in diagnosis.findings] == [("no area", 6)]
    assert count_named(path) == (2, 7) and count_named(repair_boxes(diagnosis, path, tmp_path / "copy")) == (2, 6)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["a.jpg", "b.jpg", "set.json"]
    document = json.loads(path.read_text())
    (path.parent.parent / "b.jpg").write_bytes((path.parent / "b.jpg").read_bytes())
    document["images"][0]["file_name"] = "../b.jpg"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"image \.\./b\.jpg is outside the image folder"):
        repair_boxes(examine_boxes(path), path, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jpg", "copy", "set"]


def test_anchors(tmp_path: Path) -> None:
    diagnosis = examine_boxes(clean_voc(tmp_path / "set"), size=(40, 60))
    by_name = {row.name: row for row in diagnosis.objects.anchors}
    assert by_name["C4"].recall == 0 and by_name["C4"].anchors == (128, 256, 512)
    assert by_name["C4, suggested"].recall > 90 and max(by_name["C4, suggested"].anchors) < 40
    assert by_name["C4, suggested"].by_class.keys() == {"cat", "dog"}
    assert [parse_size(text) for text in ("600", "600,1000", "240,400", None)] == [(600, 1000), (600, 1000), (240, 400), None]
    for text in ("x", "600,", "1000,600", "8", "1,2,3", "5000"):
        with pytest.raises(UserError, match="must be SHORTER or SHORTER,LONGEST in px"):
            parse_size(text)


def test_low_anchor_recall_is_a_fault_with_a_sufficient_size(tmp_path: Path) -> None:
    root = clean_voc(tmp_path / "set")
    diagnosis = examine_boxes(root, size=(16, 24))
    (fault,) = diagnosis.findings
    assert (fault.kind, set(fault.names)) == ("out of reach", {"cat", "dog"}) and not diagnosis.clean
    assert fault.detail.startswith("best anchor recall ")
    assert ") at a shorter side of 16 px; use 240 px (--size 240; " in fault.detail
    assert examine_boxes(root, size=(240, 360)).clean
    # A box of 4 px in 1,200 px, between the anchors' centers: no size is sufficient.
    tiny = voc_object((601, 601, 604, 604), "dog")
    root = voc(
        tmp_path / "tiny", {f"a{i}": voc_xml(voc_object((101 + i, 101, 900, 900)), tiny, size=(1200, 1200)) for i in range(5)}
    )
    for i in range(5):
        photo(i, (1200, 1200)).save(root / "JPEGImages" / f"a{i}.jpg")
    (fault,) = examine_boxes(root).findings
    assert (fault.kind, fault.names) == ("out of reach", ("dog",))
    assert fault.detail.startswith(
        "best anchor recall 0.0% at a shorter side of 600 or 800 px; objects are too small or thin even at 1,200 px"
    )


def test_sets_with_boxes_are_recognized(tmp_path: Path) -> None:
    assert holds_boxes(clean_voc(tmp_path / "voc")) and holds_boxes(clean_coco(tmp_path / "coco")) and holds_boxes("some.json")
    (tmp_path / "photos" / "Annotations").mkdir(parents=True)  # a class of that name
    for path in ("fashion-sample", tmp_path / "photos", tmp_path / "none", "x" * 5000, "~nobody-at-all/x"):
        assert not holds_boxes(path)


def test_the_two_boxes_without_area_in_bccd_are_reported(real_data: Path) -> None:
    diagnosis = examine_boxes(real_data / "bccd")
    assert [(f.kind, f.names, f.index) for f in diagnosis.findings if f.fault] == [
        ("no area", ("Annotations/BloodImage_00338.xml",), 12),
        ("no area", ("Annotations/BloodImage_00343.xml",), 3),
    ]
    assert (
        diagnosis.images == {"train": 205, "val": 87, "test": 72}
        and sum(map(sum, (of.values() for of in diagnosis.per_class.values()))) == 4886
    )
