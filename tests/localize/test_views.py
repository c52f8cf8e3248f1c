"""Network inputs against painted pixels: training crops, center crops and whole images; and windows cut out of photos."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from boxed import annotation, coco, photo, voc, voc_object, voc_xml
from reslearn import UserError
from reslearn import data as datasets
from reslearn.data.boxes.box_set import Objects
from reslearn.data.boxes.read import open_boxes
from reslearn.data.preprocess import Preprocessing
from reslearn.localize.views import crop_randoms, of_one_kind, training_crop, view_of
from reslearn.localize.windows import cut_out, window
from reslearn.training.request import parse
from reslearn.training.run import prepare


def painted(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image


def extent(view: np.ndarray) -> np.ndarray:
    """The bounding box of the bright pixels."""
    rows, columns = np.where(view[:, :, 0] > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)


@pytest.mark.parametrize("box", [(40, 20, 70, 45), (0, 0, 12, 90), (5, 5, 119, 89)], ids=["inside", "edge", "larger"])
def test_a_training_crop_contains_its_object(box: tuple[int, int, int, int]) -> None:
    image = painted(90, 120, box)
    numbers = np.random.default_rng(0)
    mirrored, sides, whole = 0, set(), box[2] < 119
    for _ in range(60):
        randoms = numbers.uniform(size=5)
        crop, boxes = training_crop(image, np.array([box], float), (48, 48), (50, 100), randoms)
        assert crop.shape == (48, 48, 3) and boxes.shape == (1, 4)
        np.testing.assert_allclose(boxes[0], extent(crop), atol=1.01)
        sides.add(round(boxes[0, 2] - boxes[0, 0]))
        if whole:
            h, w = boxes[0, 3] - boxes[0, 1], boxes[0, 2] - boxes[0, 0]
            assert (h / w) == pytest.approx((box[3] - box[1]) / (box[2] - box[0]), rel=0.12)
        mirrored += randoms[4] < 0.5
    assert len(sides) > 3 or box[0] != 40
    assert 10 < mirrored < 50


def test_mirroring_and_other_objects() -> None:
    image = painted(60, 60, (10, 20, 20, 30))
    boxes = np.array([[10.0, 20, 20, 30], [30, 20, 60, 30]])
    one, first = training_crop(image, boxes, (40, 40), (60, 60), np.array([0, 0.1, 0.5, 0.0, 0.9]))
    two, second = training_crop(image, boxes, (40, 40), (60, 60), np.array([0, 0.1, 0.5, 0.0, 0.1]))
    np.testing.assert_array_equal(one[:, ::-1], two)
    assert first.tolist() == [[10 - 0, first[0, 1], 20, first[0, 1] + 10]], "a third of the other box is visible: dropped"
    assert second[0, 0] == 40 - first[0, 2] and second[0, 2] == 40 - first[0, 0]
    _, both = training_crop(image, boxes, (40, 40), (60, 60), np.array([0, 0.1, 0.5, 0.999, 0.9]))
    assert len(both) == 2 and both[1, 2] == 40, "clipped to the crop"


def test_crop_randoms_depend_on_seed_epoch_and_image() -> None:
    epochs, indices = torch.tensor([0, 1, 1]), torch.tensor([4, 4, 5])
    randoms = crop_randoms(7, epochs, indices)
    assert randoms.shape == (3, 5) and len(np.unique(randoms)) == 15 and (randoms >= 0).all() and (randoms < 1).all()
    np.testing.assert_array_equal(crop_randoms(7, epochs[1:2], indices[1:2])[0], randoms[1])
    assert not np.array_equal(crop_randoms(8, epochs, indices), randoms)


@pytest.mark.parametrize("scale", [None, 32, 48])
def test_boxes_of_a_view_are_converted_to_the_image(scale: int | None) -> None:
    preprocessing = Preprocessing(channels=3, size=(32, 32), crop_ratio=0.8, mean=(0.0,) * 3, std=(1.0,) * 3)
    image = painted(90, 120, (50, 40, 74, 60))
    view, back = view_of(image, preprocessing, scale)
    assert view.shape[:2] == ((32, 32) if scale is None else (scale, round(scale * 4 / 3)))
    if scale is None:
        np.testing.assert_array_equal(torch.from_numpy(view.copy()).permute(2, 0, 1), preprocessing.fit(image))
    found = ((extent(view).reshape(2, 2) + back[:2]) * back[2:]).reshape(4)
    np.testing.assert_allclose(found, [50, 40, 74, 60], atol=90 / (scale or 40) + 0.01)


def test_each_image_needs_objects_of_one_class(tmp_path: Path) -> None:
    documents = {"one": voc_xml(voc_object([5, 6, 20, 30], "cat"), voc_object([30, 6, 50, 30], "cat"))}
    single = of_one_kind(open_boxes(voc(tmp_path / "good", documents))["train"])
    assert single.labels.tolist() == [0] and single.boxes[0].tolist() == [[4, 5, 20, 30], [29, 5, 50, 30]]
    documents["two"] = voc_xml(voc_object([5, 6, 20, 30], "cat"), voc_object([30, 6, 50, 30], "dog"))
    with pytest.raises(UserError, match=r"two\.jpg: has cat and dog: each image needs objects of one class"):
        of_one_kind(open_boxes(voc(tmp_path / "bad", documents))["train"])
    path = coco(tmp_path, [annotation(1, 1, 3), annotation(2, 1, 7, (20, 20, 9, 9), iscrowd=1), annotation(3, 2, 3)])
    crowd = {"size": [40, 60], "counts": [0, 2400]}
    document = json.loads(path.read_text())
    document["annotations"][1]["segmentation"] = crowd
    path.write_text(json.dumps(document))
    assert [len(boxes) for boxes in of_one_kind(open_boxes(path)["all"]).boxes] == [1, 1], "crowds are left out"


def test_a_window_contains_one_whole_object() -> None:
    objects = Objects.of([[40, 40, 60, 60], [64, 40, 84, 60], [100, 0, 120, 119]], [1, 1, 2])
    numbers = np.random.default_rng(0)
    sides, places = set(), set()
    for _ in range(40):
        square = window(objects, 0, 120, 160, numbers)
        assert square is not None
        x1, y1, x2, y2 = square.tolist()
        assert 0 <= x1 <= 40 and x2 >= 60 and 0 <= y1 <= 40 and 60 <= y2 <= 120 and x2 - x1 == y2 - y1
        assert 24 <= x2 - x1 <= 51
        assert max(0, min(x2, 84) - 64) < 10, "less than half of the neighbor's width"
        sides.add(x2 - x1)
        places.add((x1, y1))
    assert len(sides) > 8 and len(places) > 20
    assert window(objects, 2, 120, 160, numbers) is None, "no square within the image contains it"


def test_cut_out_makes_a_set_for_localization_and_classification(tmp_path: Path) -> None:
    both = voc_xml(voc_object([5, 6, 15, 16], "cat"), voc_object([31, 11, 41, 21], "dog"))
    root = voc(tmp_path / "many", {"a": both, "b": voc_xml(voc_object([8, 8, 20, 18]))})
    Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)).save(root / "JPEGImages" / "a.png")
    (root / "JPEGImages" / "a.jpg").unlink()
    (root / "ImageSets" / "Main" / "test.txt").write_text("b\n")
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    assert cut_out(root, tmp_path / "out", per_class=5) == {"train": {"cat": 5, "dog": 5}, "test": {"cat": 1, "dog": 0}}
    sets = open_boxes(tmp_path / "out")
    assert of_one_kind(sets["train"]).labels.tolist() == [0] * 5 + [1] * 5
    source = open_boxes(root)["train"].images[0]
    for image, label in zip(sets["train"].images, of_one_kind(sets["train"]).labels, strict=True):
        x1, y1, x2, y2 = source.objects.boxes[label].astype(int)
        own = image.objects.boxes[0].astype(int)
        np.testing.assert_array_equal(image.pixels()[own[1] : own[3], own[0] : own[2]], source.pixels()[y1:y2, x1:x2])
    opened = datasets.open(str(tmp_path / "out" / "train"))
    assert opened.classes == ("cat", "dog") and len(opened.splits["all"]) == 10
    request = parse(tmp_path / "out", model="resnet8", settings=["data.val=2", "data.size=32"], device="cpu", quiet=True)
    assert len(prepare(request).sources.train) == 8, "valid for classification"
    with pytest.raises(UserError, match="already exists"):
        cut_out(root, tmp_path / "out")
    twice = cut_out(root, tmp_path / "again", per_class=5)
    assert twice["train"]["cat"] == 5
    for file in sorted((tmp_path / "out").rglob("*.png")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "out")).read_bytes(), "the same seed"


def test_windows_of_a_single_file_and_of_images_in_folders(tmp_path: Path) -> None:
    photo(tmp_path / "in" / "sub" / "a.jpg")
    images = [{"id": 1, "file_name": "sub/a.jpg", "height": 40, "width": 60}]
    both = [annotation(), annotation(id=2, category=7, bbox=(35, 20, 9, 8))]
    assert cut_out(coco(tmp_path / "in", both, images=images), tmp_path / "out", per_class=3) == {"train": {"cat": 3, "dog": 3}}
    assert len(open_boxes(tmp_path / "out")["train"]) == 6
    file = coco(tmp_path / "in", [annotation()], images=images, categories=[{"id": 3, "name": "../cat"}])
    with pytest.raises(UserError, match=r"class '\.\./cat' is not a valid folder name"):
        cut_out(file, tmp_path / "other")


def test_a_class_without_windows_is_rejected(tmp_path: Path) -> None:
    root = voc(tmp_path / "many", {"a": voc_xml(voc_object([1, 1, 60, 40], "cat"), voc_object([31, 11, 41, 21], "dog"))})
    with pytest.raises(UserError, match="no window contains an object of class 'cat' alone"):
        cut_out(root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["many"]
