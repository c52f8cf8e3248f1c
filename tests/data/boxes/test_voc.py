"""VOC annotations: continuous coordinates, and faults reported by file and index."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boxed import SIZE, findings, photo, voc, voc_object, voc_xml
from reslearn.data.boxes.box_set import BadBoxes
from reslearn.data.boxes.read import open_boxes
from reslearn.data.boxes.voc import parse_xml, splits
from reslearn.errors import UserError

GOOD = voc_object((1, 1, 10, 10))


def test_a_split_without_readable_annotations_does_not_define_the_classes(tmp_path: Path) -> None:
    root = voc(tmp_path, {"v": voc_xml(voc_object((5, 5, 20, 20)))}, "val")
    (root / "ImageSets/Main/train.txt").write_text("t\n")
    assert [(f.kind, *f.names) for f in findings(root)] == [("unreadable annotation", "Annotations/t.xml")]


def test_boxes_are_continuous_and_tags_in_any_order(tmp_path: Path) -> None:
    dog = voc_object((1, 2, 60, 40), "dog", "<difficult> 1 </difficult><part><name>head</name><bndbox/></part>")
    root = voc(tmp_path, {"a": voc_xml(dog, GOOD), "empty": voc_xml(), "b": voc_xml(voc_object(("4.5", "6", " 8 ", "9e0")))})
    train = open_boxes(root)["train"]
    assert train.classes == ("cat", "dog") and [image.name for image in train.images] == ["a", "empty", "b"]
    first, empty, last = (image.objects for image in train.images)
    assert first.boxes.tolist() == [[0, 1, 60, 40], [0, 0, 10, 10]] and first.labels.tolist() == [2, 1]
    assert first.difficult.tolist() == [True, False] and first.areas.tolist() == [60 * 39, 100]
    assert len(empty) == 0 and empty.boxes.shape == (0, 4)
    assert last.boxes.tolist() == [[3.5, 5, 8, 9]]
    assert train.counts() == {"cat": 2, "dog": 1} and train.findings == ()


def test_targets(tmp_path: Path) -> None:
    import torch

    hard = voc_object((3, 4, 9, 9), "dog", "<difficult>1</difficult>")
    image = open_boxes(voc(tmp_path, {"a": voc_xml(GOOD, hard)}))["train"].images[0]
    target = image.target()
    assert target["boxes"].dtype == torch.float32 and target["boxes"].tolist() == [[0, 0, 10, 10], [2, 3, 9, 9]]
    assert target["labels"].dtype == torch.int64 and target["labels"].tolist() == [1, 2]
    assert image.target(difficult=False)["labels"].tolist() == [1]
    assert image.pixels().shape == (*SIZE, 3)


def test_the_fingerprint_depends_on_the_objects(tmp_path: Path) -> None:
    def of(name: str, *objects: str) -> str:
        return open_boxes(voc(tmp_path / name, {"a": voc_xml(*objects)}))["train"].fingerprint()

    same = of("one", GOOD)
    assert same == of("two", GOOD)
    others = [
        voc_object((1, 1, 10, 11)),
        voc_object((1, 1, 10, 10), "dog"),
        GOOD.replace("<name>", "<difficult>1</difficult><name>"),
    ]
    assert len({same, *(of(str(i), other) for i, other in enumerate(others))}) == 4


OBJECTS = {
    "no area": voc_object((5, 5, 5, 9)),
    "not finite": voc_object((1, "nan", 9, 9)),
    "outside": voc_object((70, 5, 80, 9)),
    "sticks out": voc_object((50, 5, 70, 9)),
    "box twice": GOOD,
    "unknown class": voc_object((1, 1, 9, 9), "cta"),
    "unreadable object": voc_object((1, "1_0", 9, 9)),
}
MORE = {
    "reversed": ("no area", voc_object((9, 5, 2, 9))),
    "infinite": ("not finite", voc_object((1, 1, "1e999", 9))),
    "zero": ("sticks out", voc_object((0, 5, 7, 9))),
    "no box": ("unreadable object", "<object><name>cat</name></object>"),
    "two boxes": ("unreadable object", GOOD.replace("<name>", "<bndbox><xmin>1</xmin></bndbox><name>")),
    "no name": ("unreadable object", GOOD.replace("<name>cat</name>", "")),
    "empty name": ("unreadable object", GOOD.replace("cat", " ")),
    "two names": ("unreadable object", GOOD.replace("<name>", "<name>dog</name><name>")),
    "difficult": ("unreadable object", voc_object((1, 1, 9, 9), "cat", "<difficult>yes</difficult>")),
}
CASES = [*OBJECTS.items(), *MORE.values()]


@pytest.mark.parametrize(("kind", "bad"), CASES, ids=[*OBJECTS, *MORE])
def test_bad_object(tmp_path: Path, kind: str, bad: str) -> None:
    root = voc(tmp_path, {"first": voc_xml(GOOD), "a": voc_xml(GOOD, bad, voc_object((20, 20, 30, 30)))})
    with pytest.raises(BadBoxes, match=rf"Annotations/a\.xml object 1: {kind}: ") as caught:
        open_boxes(root, classes=["cat", "dog"])
    assert [(f.kind, f.names, f.index) for f in caught.value.findings] == [(kind, ("Annotations/a.xml",), 1)]
    kept = open_boxes(root, bad="drop", classes=["cat", "dog"])["train"]
    assert kept.faults() == {kind: 1} and kept.findings == caught.value.findings
    cut = kind == "sticks out"
    assert kept.images[1].objects.ids.tolist() == ([0, 1, 2] if cut else [0, 2])
    assert (kept.images[1].objects.boxes[:, 2] <= SIZE[1]).all() and (kept.images[1].objects.boxes >= 0).all()


BOMB = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]><annotation><size>&y;</size></annotation>'
FILES = {
    "wrong size: annotated as 60 x 41 .*, but a.jpg has 60 x 40 pixels": voc_xml(GOOD, size=(41, 60)),
    "no <size><height>": "<annotation/>",
    "not XML: unclosed token": voc_xml(GOOD)[:-5],
    "not XML: no element found": "",
    "has a DOCTYPE": BOMB,
    "has a DOCTYPE, which is not allowed": '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
    "root element is <annotations>": "<annotations/>",
    "not XML: unknown encoding": '<?xml version="1.0" encoding="klingon"?><annotation/>',
}


@pytest.mark.parametrize(("text", "document"), FILES.items())
def test_file_faults_raise_under_either_policy(tmp_path: Path, text: str, document: str) -> None:
    root = voc(tmp_path, {"a": document, "b": voc_xml(GOOD, OBJECTS["no area"])})
    for bad, others in (("fail", [("Annotations/b.xml", 1)]), ("drop", [])):
        with pytest.raises(BadBoxes, match=rf"Annotations/a\.xml: .*{text}") as caught:
            open_boxes(root, bad=bad)  # type: ignore[arg-type]
        assert [(*f.names, f.index) for f in caught.value.findings] == [("Annotations/a.xml", None), *others]


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    root = voc(tmp_path, {name: voc_xml(GOOD) for name in "abcd"})
    (root / "JPEGImages" / "a.jpg").unlink()
    (root / "JPEGImages" / "b.jpg").write_bytes(b"no image")
    (root / "Annotations" / "c.xml").unlink()
    photo(root / "JPEGImages" / "d.png")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\nd\na\n")
    kinds = [(f.kind, *f.names) for f in findings(root)]
    assert kinds == [
        ("image twice", "ImageSets/Main/train.txt"),
        ("unreadable annotation", "Annotations/c.xml"),
        ("no such image", "Annotations/a.xml"),
        ("unreadable image", "Annotations/b.xml"),
        ("two images", "Annotations/d.xml"),
    ]


def test_all_faults_are_listed_and_the_first_are_shown(tmp_path: Path) -> None:
    bad = [voc_object((k, 5, k, 9)) for k in range(1, 31)]
    with pytest.raises(BadBoxes, match=r"30 faults: Annotations/a\.xml object 0: no area.*; and 22 more \(fix") as caught:
        open_boxes(voc(tmp_path, {"a": voc_xml(*bad)}))
    assert [finding.index for finding in caught.value.findings] == list(range(30)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objects", "remedy"),
    [
        ([OBJECTS["sticks out"]], 'fix the boxes, or clip them with bad="drop"'),
        ([OBJECTS["sticks out"], OBJECTS["no area"]], 'fix the objects, or leave them out with bad="drop"'),
        ([OBJECTS["no area"]], 'fix the objects, or leave them out with bad="drop"'),
        (None, "to copy the set without them, run reslearn doctor SET --fix COPY"),
    ],
)
def test_errors_name_a_remedy(tmp_path: Path, objects: list[str] | None, remedy: str) -> None:
    root = voc(tmp_path, {"a": voc_xml(GOOD, *objects or ()), "b": voc_xml(GOOD)})
    if objects is None:
        (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(BadBoxes) as caught:
        open_boxes(root)
    assert str(caught.value).endswith(f" ({remedy})")


def test_messages_use_the_coordinates_of_the_file(tmp_path: Path) -> None:
    bad = voc_object((504, 337, 504, 340)), voc_object((50, 5, 70.5, 9))
    no_area, out = findings(voc(tmp_path, {"a": voc_xml(*bad)}))
    assert no_area.detail == "box xmin 504, ymin 337, xmax 504, ymax 340"
    assert out.detail == "box xmin 50, ymin 5, xmax 70.5, ymax 9 exceeds the 60 x 40 image by 10.5 px"


def test_splits(tmp_path: Path) -> None:
    root = voc(tmp_path, {"a": voc_xml(GOOD)})
    for name in ("val", "trainval", "cat_train", "odd_one"):
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("a\n")
    assert splits(root) == ["odd_one", "train", "trainval", "val"]
    assert list(open_boxes(root)) == ["train", "val"] and list(open_boxes(root, only=["trainval"])) == ["trainval"]
    with pytest.raises(UserError, match="no split 'vall'; did you mean 'val'"):
        open_boxes(root, only=["vall"])
    with pytest.raises(UserError, match="must be fail or drop"):
        open_boxes(root, bad="ignore")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no annotations of train, val or test"):
        open_boxes(tmp_path / "JPEGImages")
    (root / "Annotations" / "a.xml").write_text(voc_xml())
    with pytest.raises(UserError, match="split train has no objects"):
        open_boxes(root)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_rotate_with_the_pixels(tmp_path: Path, orientation: int) -> None:
    """A white rectangle, drawn on the stored image, is inside its box on the upright one."""
    from PIL import Image

    from reslearn.data.boxes.masks import turn_box

    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[5:20, 10:50] = 255
    root = voc(tmp_path, {"a": voc_xml(voc_object((11, 6, 50, 20)))})
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(root / "JPEGImages" / "a.jpg", exif=exif, quality=95)
    train = open_boxes(root)["train"]
    image = train.images[0]
    assert (image.height, image.width) == (SIZE if orientation < 5 else SIZE[::-1])
    # orientations 2 to 4 keep the size, so the boxes are assumed upright
    expected = turn_box([10, 5, 50, 20], orientation, *SIZE) if orientation >= 5 else [10, 5, 50, 20]
    assert image.objects.boxes.tolist() == [expected]
    assert train.faults() == ({"orientation": 1} if orientation > 1 else {})
    if orientation >= 5 or orientation == 1:
        rows, columns = np.nonzero(image.pixels()[:, :, 0] > 128)
        assert expected == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    rotated = turn_box([10, 5, 50, 20], orientation, *SIZE)
    rows, columns = np.nonzero(image.pixels()[:, :, 0] > 128)
    assert rotated == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_bccd(real_data: Path) -> None:
    with pytest.raises(BadBoxes, match="2 faults") as caught:
        open_boxes(real_data / "bccd")
    named = sorted((*f.names, f.index, f.kind) for f in caught.value.findings)
    assert named == [("Annotations/BloodImage_00338.xml", 12, "no area"), ("Annotations/BloodImage_00343.xml", 3, "no area")]
    sets = open_boxes(real_data / "bccd", bad="drop")
    assert {name: len(one) for name, one in sets.items()} == {"train": 205, "val": 87, "test": 72}
    totals = [sum(split.counts()[name] for split in sets.values()) for name in ("Platelets", "RBC", "WBC")]
    assert totals == [361, 4153, 372] and sets["test"].classes == ("Platelets", "RBC", "WBC")


CORNER = st.one_of(st.integers(-5, 70), st.floats(-5, 70).map(lambda x: round(x, 2)), st.sampled_from(["nan", "inf", "x", ""]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(boxes=st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER), max_size=6))
def test_every_object_is_kept_or_reported(tmp_path: Path, boxes: list[tuple[object, ...]]) -> None:
    root = voc(tmp_path, {"a": voc_xml(GOOD, *(voc_object(box) for box in boxes))})
    train = open_boxes(root, bad="drop", classes=["cat"])["train"]
    objects = train.images[0].objects
    named = [finding.index for finding in train.findings]
    cut = {finding.index for finding in train.findings if finding.kind == "sticks out"}
    assert sorted({*named} | {*objects.ids.tolist()}) == list(range(len(boxes) + 1)) and len(named) == len({*named})
    assert {*named} & {*objects.ids.tolist()} == cut
    assert ((objects.boxes >= 0) & (objects.boxes <= [60, 40, 60, 40])).all() and (
        objects.boxes[:, 2:] > objects.boxes[:, :2]
    ).all()
    for box, i in zip(objects.boxes.tolist(), objects.ids.tolist(), strict=True):
        if i and i not in cut:
            x1, y1, x2, y2 = (float(value) for value in boxes[i - 1])  # type: ignore[arg-type]
            assert np.allclose(box, [x1 - 1, y1 - 1, x2, y2], atol=0.011)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: f"<annotation>{text}</annotation>".encode())))
def test_any_bytes_are_a_tree_or_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.xml").write_bytes(data)
    try:
        parse_xml(tmp_path / "x.xml")
    except UserError as why:
        assert "x.xml" in str(why)
