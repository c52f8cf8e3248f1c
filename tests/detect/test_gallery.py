"""Pictures of mistakes: files and positions of boxes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boxed import photo
from reslearn.data.boxes.box_set import BoxImage, Objects
from reslearn.detect.gallery import FOUND, TRUTH, save_gallery
from reslearn.evaluation.matching import match

TRUE, SEEN, LOST = (20, 20, 100, 100), (150, 20, 230, 100), (20, 120, 60, 150)


def images(folder: Path) -> list[BoxImage]:
    made = []
    for name, boxes in (("a", [TRUE, LOST]), ("b", [])):
        path = photo(folder / f"{name}.png", (160, 240))
        made.append(BoxImage(path, name, 160, 240, Objects.of(boxes, [1] * len(boxes))))
    return made


def near(picture: Image.Image, x: float, y: float, color: tuple[int, int, int]) -> bool:
    """Whether a pixel within 2 of (x, y) has about this color."""
    array = np.asarray(picture.convert("RGB")).astype(int)
    part = array[max(0, round(y) - 2) : round(y) + 3, max(0, round(x) - 2) : round(x) + 3]
    return bool((np.abs(part - color).max(axis=2) < 60).any())


def test_a_gallery_shows_each_mistake_at_its_position(tmp_path: Path) -> None:
    some = images(tmp_path)
    given = [
        {"boxes": [TRUE, SEEN], "labels": [1, 1], "scores": [0.9, 0.95]},
        {"boxes": np.zeros((0, 4)), "labels": [], "scores": []},
    ]
    matches = match([image.objects for image in some], given, ["cell"])
    rows = save_gallery(tmp_path / "run", some, matches)
    assert [(row["image"], row["kind"]) for row in rows] == [
        ("images/alarm-00.jpg", "background"),
        ("images/missed-00.jpg", "missed"),
        ("images/image-00.jpg", "image"),
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "images").iterdir()) == sorted(row["image"][7:] for row in rows)
    assert rows[0] | {"image": ""} == {
        "image": "", "kind": "background", "name": "a", "label": "cell", "truth": None, "score": 0.95, "iou": None,
        "box": list(SEEN), "object": None,
    }  # fmt: skip
    assert rows[2]["objects"] == 2 and rows[2]["detections"] == 2 and rows[2]["mistakes"]["missed"] == 1
    whole = Image.open(tmp_path / "run" / rows[2]["image"])
    assert whole.size == (720, 480)
    for (x1, y1, x2, y2), color in ((SEEN, FOUND), (LOST, TRUTH)):
        for x, y in ((x1, (y1 + y2) / 2), (x2, (y1 + y2) / 2), ((x1 + x2) / 2, y1), ((x1 + x2) / 2, y2)):
            assert near(whole, 3 * x, 3 * y, color), (x, y)
        assert not near(whole, 3 * (x1 + x2) / 2, 3 * (y1 + y2) / 2, color)
    crop = Image.open(tmp_path / "run" / rows[0]["image"])  # twice the box, moved to stay inside: x 80 to 240, y 0 to 160
    assert crop.size == (320, 320)
    assert near(crop, 2 * (SEEN[0] - 80), 2 * 60, FOUND) and near(crop, 2 * (TRUE[2] - 80), 2 * 60, TRUTH)


def test_a_gallery_without_mistakes_is_empty(tmp_path: Path) -> None:
    some = images(tmp_path)[1:]
    matches = match([some[0].objects], [{"boxes": np.zeros((0, 4)), "labels": [], "scores": []}], ["cell"])
    assert save_gallery(tmp_path / "run", some, matches) == []
    with pytest.raises(ValueError, match="2 images, but matches of 1"):
        save_gallery(tmp_path / "run", some * 2, matches)


def test_boxes_across_the_border_and_points_are_drawn(tmp_path: Path) -> None:
    some = images(tmp_path)[1:]
    given = {"boxes": [(230, 150, 240, 160), (0, 0, 0, 0)], "labels": [1, 1], "scores": [0.5, 0.5]}
    some = [BoxImage(some[0].path, "b", 160, 240, Objects.of([(230, 150, 240, 160)], [1]))]
    matches = match([some[0].objects], [given], ["cell"])
    rows = save_gallery(tmp_path / "run", some, matches)
    assert [row["kind"] for row in rows] == ["background", "image"]
    assert all((tmp_path / "run" / row["image"]).stat().st_size > 500 for row in rows)
