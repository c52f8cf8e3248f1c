"""COCO annotations: ids with gaps, masks, crowds, and faults reported by file and index."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boxed import SIZE, annotation, coco, findings, photo
from reslearn.data.boxes.box_set import BadBoxes
from reslearn.data.boxes.masks import Runs
from reslearn.data.boxes.read import open_boxes
from reslearn.errors import UserError

TRIANGLE = [[10, 10, 30, 10, 10, 30]]


def test_boxes_masks_and_ids_with_gaps(tmp_path: Path) -> None:
    runs = {"counts": [0, 400, 2000], "size": list(SIZE)}
    file = coco(
        tmp_path,
        [
            annotation(9, image=2, category=7, bbox=(1.5, 2, 3, 4), area=7.5, segmentation=TRIANGLE),
            annotation(4, image=2, iscrowd=1, segmentation=runs),
            annotation(5, image=2, segmentation=[]),
        ],
    )
    split = open_boxes(file)["all"]
    assert split.classes == ("cat", "dog") and split.category_ids == (3, 7)
    assert [(image.name, image.id, len(image.objects)) for image in split.images] == [("a.jpg", 1, 0), ("b.jpg", 2, 3)]
    objects = split.images[1].objects
    assert objects.boxes.tolist() == [[1.5, 2, 4.5, 6], [5, 6, 12, 14], [5, 6, 12, 14]]
    assert objects.labels.tolist() == [2, 1, 1] and objects.ids.tolist() == [9, 4, 5]
    assert objects.areas.tolist() == [7.5, 56, 56] and objects.crowd.tolist() == [False, True, False]
    polygons, crowd, nothing = objects.segmentations or ()
    assert isinstance(polygons, tuple) and polygons[0].tolist() == [[10, 10], [30, 10], [10, 30]]
    assert isinstance(crowd, Runs) and crowd.counts.tolist() == [0, 400, 2000] and nothing is None
    assert open_boxes(file, classes=["dog", "cow", "cat"])["all"].images[1].objects.labels.tolist() == [1, 3, 3]


def test_targets_with_masks(tmp_path: Path) -> None:
    import torch

    everything = [annotation(1, segmentation=TRIANGLE), annotation(2, bbox=(1, 1, 4, 4)), annotation(3, iscrowd=1)]
    image = open_boxes(coco(tmp_path, everything))["all"].images[0]
    assert image.target()["boxes"].shape == (2, 4) and "masks" not in image.target()
    target = image.target(masks=True)
    assert target["masks"].shape == (1, *SIZE) and target["masks"].dtype == torch.uint8 and len(target["boxes"]) == 1
    assert int(target["masks"].sum()) == pytest.approx(200, abs=20)


OBJECTS: dict[str, tuple[str, Any]] = {
    "no area": ("no area", annotation(2, bbox=(5, 6, 0, 8))),
    "negative": ("no area", annotation(2, bbox=(5, 6, -3, 8))),
    "NaN": ("not finite", annotation(2, bbox=(5, float("nan"), 7, 8))),
    "infinite": ("not finite", annotation(2, bbox=(5, 6, float("inf"), 8))),
    "outside": ("outside", annotation(2, bbox=(60, 6, 7, 8))),
    "sticks out": ("sticks out", annotation(2, bbox=(55, 6, 7, 8))),
    "box twice": ("box twice", annotation(2)),
    "gap": ("unknown class", annotation(2, category=5)),
    "id 0": ("unknown class", annotation(2, category=0)),
    "no such image": ("unknown image", annotation(2, image=3)),
    "id twice": ("duplicate id", annotation(1, bbox=(1, 1, 2, 2))),
    "id of text": ("unreadable object", annotation("2")),  # type: ignore[arg-type]
    "three numbers": ("unreadable object", annotation(2, bbox=[1, 2, 3])),
    "text in the box": ("unreadable object", annotation(2, bbox=[1, 2, "3", 4])),
    "true in the box": ("unreadable object", annotation(2, bbox=[1, 2, True, 4])),
    "a huge whole number": ("unreadable object", annotation(2, bbox=[1, 2, 10**400, 4])),
    "no box": ("unreadable object", {"id": 2, "image_id": 1, "category_id": 3}),
    "no object": ("unreadable object", [1, 2]),
    "crowd": ("unreadable object", annotation(2, iscrowd=2)),
    "crowd of a list": ("unreadable object", annotation(2, iscrowd=[])),
    "area": ("unreadable object", annotation(2, area=-1)),
    "area NaN": ("unreadable object", annotation(2, area=float("nan"))),
    "odd polygon": ("bad segmentation", annotation(2, segmentation=[[1, 2, 3, 4, 5, 6, 7]])),
    "two points": ("bad segmentation", annotation(2, segmentation=[[1, 2, 3, 4]])),
    "flat polygon": ("bad segmentation", annotation(2, segmentation=[[1, 2, 3, 2, 5, 2]])),
    "polygon NaN": ("bad segmentation", annotation(2, segmentation=[[1, 2, 3, float("nan"), 5, 6]])),
    "polygon elsewhere": ("bad segmentation", annotation(2, segmentation=[[100, 100, 120, 100, 100, 120]])),
    "polygon of text": ("bad segmentation", annotation(2, segmentation=[["1", 2, 3, 4, 5, 6]])),
    "text": ("bad segmentation", annotation(2, segmentation="polygon")),
    "short runs": ("bad segmentation", annotation(2, segmentation={"counts": [3, 5], "size": list(SIZE)})),
    "runs of another size": ("bad segmentation", annotation(2, segmentation={"counts": [0, 2400], "size": [60, 40]})),
    "negative runs": ("bad segmentation", annotation(2, segmentation={"counts": [-1, 2401], "size": list(SIZE)})),
    "packed runs": ("bad segmentation", annotation(2, segmentation={"counts": "~~", "size": list(SIZE)})),
    "runs of nothing": ("bad segmentation", annotation(2, segmentation={"counts": [2400], "size": list(SIZE)})),
    "runs without size": ("bad segmentation", annotation(2, segmentation={"counts": [2400]})),
}


@pytest.mark.parametrize(("kind", "bad"), OBJECTS.values(), ids=OBJECTS)
def test_bad_object(tmp_path: Path, kind: str, bad: Any) -> None:
    file = coco(tmp_path, [annotation(), bad, annotation(3, bbox=(20, 20, 9, 9))])
    with pytest.raises(BadBoxes, match=rf"set\.json object 1: {kind}: ") as caught:
        open_boxes(file)
    assert [(f.kind, f.names, f.index) for f in caught.value.findings] == [(kind, ("set.json",), 1)]
    kept = open_boxes(file, bad="drop")["all"]
    assert kept.faults() == {kind: 1}
    assert kept.images[0].objects.ids.tolist() == ([1, 2, 3] if kind == "sticks out" else [1, 3])


def entries(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]} | changes]


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "missing image": ("no such image", {"images": entries(file_name="c.jpg")}),
    "wrong size": ("wrong size", {"images": entries(height=60, width=40)}),
    "no size": ("unreadable image entry", {"images": [{"id": 1, "file_name": "a.jpg"}]}),
    "size of text": ("unreadable image entry", {"images": entries(height="40")}),
    "no name": ("unreadable image entry", {"images": entries(file_name=None)}),
    "image id twice": ("duplicate id", {"images": entries() + entries(file_name="b.jpg")}),
    "image twice": ("image twice", {"images": entries() + entries(id=2)}),
    "category id twice": ("duplicate id", {"categories": [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]}),
    "category twice": ("category twice", {"categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "cat"}]}),
    "category without a name": ("unreadable category", {"categories": [{"id": 3, "name": "cat"}, {"id": 4}]}),
    "category of text": ("unreadable category", {"categories": [{"id": 3, "name": "cat"}, "dog"]}),
}


@pytest.mark.parametrize(("kind", "changes"), FILES.values(), ids=FILES)
def test_file_faults_raise_under_either_policy(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    file = coco(tmp_path, [annotation()], **changes)
    for bad in ("fail", "drop"):
        with pytest.raises(BadBoxes, match=kind) as caught:
            open_boxes(file, bad=bad)  # type: ignore[arg-type]
        assert (caught.value.findings[0].index, caught.value.findings[0].kind) == (None, kind)
    assert kind in {finding.kind for finding in findings(file)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": {}, "categories": []}', "no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
    ],
)
def test_invalid_coco_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=rf"x\.json: .*{message}"):
        open_boxes(tmp_path / "x.json")


def test_the_fingerprint_depends_on_masks(tmp_path: Path) -> None:
    def of(**more: Any) -> str:
        return open_boxes(coco(tmp_path, [annotation(area=30, **more)]))["all"].fingerprint()

    square, other = [5, 6, 12, 6, 12, 14, 5, 14], [5, 6, 11, 6, 12, 14, 5, 14]
    runs = {"size": [40, 60], "counts": [2, 3, 2395]}
    masks = [square], [other], [square, other], runs, {**runs, "counts": [3, 3, 2394]}
    fingerprints = [of(), *(of(segmentation=mask) for mask in masks)]
    assert len(set(fingerprints)) == 6 and of(segmentation=[square]) == fingerprints[1]
    assert fingerprints[0] == of(segmentation=[]), "empty segmentations count as none"


def test_layouts_and_common_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        coco(tmp_path / split, [annotation()]).rename(tmp_path / split / "_annotations.coco.json")
    assert list(open_boxes(tmp_path)) == ["train", "val"]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split / "_annotations.coco.json").rename(tmp_path / "annotations" / f"instances_{split}2017.json")
        (tmp_path / split).rename(tmp_path / f"{split}2017")
    assert [split.images[0].path.parent.name for split in open_boxes(tmp_path).values()] == ["train2017", "val2017"]
    val = tmp_path / "annotations" / "instances_val2017.json"
    document = json.loads(val.read_text().replace('"dog"', '"dgo"'))
    val.write_text(json.dumps(document))
    assert open_boxes(tmp_path)["val"].faults() == {"unknown category": 1}, "unused categories are only noted"
    document["annotations"].append(annotation(2, category=7))
    val.write_text(json.dumps(document))
    words = r"1 fault: instances_val2017\.json object 1: unknown class: 'dgo' is not one of the 2 classes; did you mean 'dog'\? \("
    with pytest.raises(BadBoxes, match=words + r"fix the objects, or leave them out with bad=\"drop\"\)"):
        open_boxes(tmp_path)
    assert open_boxes(tmp_path, bad="drop")["val"].counts() == {"cat": 1, "dog": 0}


def test_ambiguous_splits_are_rejected(tmp_path: Path) -> None:
    """COCO's files of 2014 and 2017 in one folder: the folder is rejected, but each file can be opened."""
    (tmp_path / "annotations").mkdir()
    for name, n in (("train2014", 1), ("train2017", 2), ("val2017", 3)):
        (tmp_path / name).mkdir()
        file = coco(tmp_path / name, [annotation(k, bbox=(1 + k, 2, 20, 20)) for k in range(n)])
        file.rename(tmp_path / "annotations" / f"instances_{name}.json")
    both = "annotations/instances_train2014.json and annotations/instances_train2017.json are both the train split: remove one"
    for read in (open_boxes, findings):
        with pytest.raises(UserError, match=f"{tmp_path}: {both}, or open the .json file directly"):
            read(tmp_path)
    assert list(open_boxes(tmp_path, only=["val"])) == ["val"]
    for name, n in (("train2014", 1), ("train2017", 2)):
        (image, _) = open_boxes(tmp_path / "annotations" / f"instances_{name}.json")["all"].images
        assert image.path == tmp_path / name / "a.jpg" and len(image.objects) == n
    # A file with the plain name takes precedence.
    photo(tmp_path / "train" / "a.jpg")
    photo(tmp_path / "train" / "b.jpg")
    text = (tmp_path / "annotations" / "instances_train2017.json").read_text()
    (tmp_path / "annotations" / "instances_train.json").write_text(text)
    split = open_boxes(tmp_path)["train"]
    assert len(split.images[0].objects) == 2 and split.images[0].path == tmp_path / "train" / "a.jpg"
    (tmp_path / "train" / "_annotations.coco.json").write_text(text)
    with pytest.raises(UserError, match=r"instances_train\.json and train/_annotations\.coco\.json are both the train split"):
        open_boxes(tmp_path)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_masks_rotate_with_the_pixels(tmp_path: Path, orientation: int) -> None:
    box = [[10, 5, 50, 5, 50, 20, 10, 20]]
    file = coco(tmp_path, [annotation(bbox=(10, 5, 40, 15), segmentation=box)])
    photo(tmp_path / "a.jpg", SIZE, orientation)
    split = open_boxes(file)["all"]
    image = split.images[0]
    (segmentation,) = image.objects.segmentations or ()
    assert isinstance(segmentation, tuple) and (image.height, image.width) == SIZE[::-1] and split.faults() == {"orientation": 1}
    assert [*segmentation[0].min(0), *segmentation[0].max(0)] == image.objects.boxes[0].tolist()


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 80) | st.floats(-5, 80) | st.just(float("nan")) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["counts", "size", "id", "x"]), inner, max_size=2),
    max_leaves=8,
)
KEYS = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), ANY), max_size=4))
def test_every_annotation_is_kept_or_reported(tmp_path: Path, changes: list[tuple[str, Any]]) -> None:
    bad = [annotation(10 + i, bbox=(i, 2, 5, 5)) | {key: value} for i, (key, value) in enumerate(changes)]
    split = open_boxes(coco(tmp_path, [annotation(), *bad]), bad="drop")["all"]
    kept = {i for image in split.images for i in image.objects.ids.tolist()}
    clipped = sum(finding.kind == "sticks out" for finding in split.findings)
    assert len(kept) == sum(len(image.objects) for image in split.images) == len(bad) + 1 - len(split.findings) + clipped
    for image in split.images:
        assert np.isfinite(image.objects.boxes).all() and np.isfinite(image.objects.areas).all()
        assert (image.objects.boxes[:, 2:] > image.objects.boxes[:, :2]).all()
        for segmentation in image.objects.segmentations or ():
            assert segmentation is not None or image.objects.segmentations


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=ANY | st.fixed_dictionaries(dict.fromkeys(["images", "annotations", "categories"], st.lists(ANY, max_size=3))))
def test_any_json_is_a_set_or_one_line(tmp_path: Path, document: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"x\.json"):
        open_boxes(tmp_path / "x.json")
