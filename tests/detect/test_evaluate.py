"""Evaluation on a set with boxes, against calling the detector image by image; and incompatible sets."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from boxed import annotation, coco, voc, voc_object, voc_xml
from detect.small import detector
from drawing import draw_images
from reslearn import UserError
from reslearn.data.boxes import read as annotated
from reslearn.data.boxes.box_set import BadBoxes, BoxImage, BoxSet, Objects
from reslearn.data.boxes.masks import draw, parse
from reslearn.detect import detect, save_detector
from reslearn.detect.evaluate import (
    TestOptions,
    find,
    matches,
    numbers,
    open_detectors,
    open_split,
    run_held_out,
    run_policy,
    run_trained_on,
)
from reslearn.detect.results import categories, results


@pytest.fixture
def data(tmp_path: Path) -> BoxSet:
    """Three images, the second without objects; ids 5, 6, 7."""
    folder = draw_images(tmp_path / "photos", classes="a", each=3, size=(8, 10))
    images = []
    for i, objects in enumerate(([[4, 4, 20, 30], [20, 8, 50, 40]], [], [[1, 1, 60, 50]])):
        path = folder / "a" / f"{i}.png"
        Image.open(path).resize((80, 64)).save(path)
        images.append(BoxImage(path, path.name, 64, 80, Objects.of(objects, [1 + i] * len(objects)), i + 5))
    return BoxSet("photos", ("class 1", "class 2", "class 3"), tuple(images), category_ids=(11, 12, 90))


def test_find_equals_detect_image_by_image(data: BoxSet) -> None:
    one, other = detector(masks=True), detector(seed=1, masks=True)
    ways = [TestOptions((one,)), TestOptions((one, other), True, (32, 48))]
    calls: list[tuple[str, int, int]] = []
    found = find(data.images, ways, lambda *call: calls.append(call))
    assert calls == [("images", 1, 3), ("images", 2, 3), ("images", 3, 3)] and len(found) == 2
    for way, own in zip(ways, found, strict=True):
        assert own.seconds > 0 and sum(len(each["labels"]) for each in own.detections) > 3
        for image, each in zip(data.images, own.detections, strict=True):
            pixels = torch.tensor(np.asarray(Image.open(image.path))).permute(2, 0, 1) / 255
            direct = detect(way.models, [pixels], refinement=way.refinement, scales=way.scales)[0]
            np.testing.assert_allclose(each["boxes"], direct["boxes"].double().numpy(), atol=1e-5)
            np.testing.assert_allclose(each["scores"], direct["scores"].double().numpy(), atol=1e-6)
            assert each["labels"].tolist() == direct["labels"].tolist()
            for mask, drawn in zip(each["masks"], direct["masks"], strict=True):
                assert (draw(mask, 64, 80) == (drawn[0] > 0.5).numpy()).all()


def test_perfect_detections_have_perfect_metrics(data: BoxSet) -> None:
    """Masks are evaluated only if the objects have masks."""
    (found,) = find(data.images, [TestOptions((detector(masks=True),))])
    for each, image in zip(found.detections, data.images, strict=True):
        n = len(image.objects)
        each |= {"boxes": image.objects.boxes, "labels": image.objects.labels, "scores": np.ones(n), "masks": each["masks"][:n]}
    made = numbers(found, data)
    assert made["AP"] == made["VOC07"] == 100 and made["mistakes"]["missed"] == 0
    assert made["n"] == 3 and made["objects"] == 3 and made["data"] == "photos" and "masks" not in made
    json.dumps(made)
    assert matches(found.detections, data).hit.shape[0] == 3


def test_coco_results_have_the_sets_ids_and_compressed_masks(data: BoxSet) -> None:
    (found,) = find(data.images, [TestOptions((detector(masks=True),))])
    rows = iter(json.loads(json.dumps(results(found.detections, data))))
    for each, id in zip(found.detections, (5, 6, 7), strict=True):
        for (x1, y1, x2, y2), label, score, mask in zip(*(each[k] for k in ("boxes", "labels", "scores", "masks")), strict=True):
            row = next(rows)
            assert row["image_id"] == id and row["category_id"] == (11, 12, 90)[label - 1] and row["score"] == score
            assert row["bbox"] == [x1, y1, x2 - x1, y2 - y1] and "file_name" not in row
            if mask.counts[1::2].sum():
                assert (draw(parse(row["segmentation"], 64, 80), 64, 80) == draw(mask, 64, 80)).all()  # type: ignore[arg-type]
    assert next(rows, None) is None
    plain = BoxSet("voc", data.classes, tuple(BoxImage(i.path, i.name, 64, 80, i.objects) for i in data.images))
    rows = results(found.detections, plain)
    assert {row["image_id"] for row in rows} <= {1, 2, 3} and rows[0]["file_name"] == "0.png"
    with pytest.raises(UserError, match="has no category for some of the classes class 1, class 2"):
        categories(BoxSet("photos", data.classes, data.images))


def test_a_split_is_opened_with_the_detectors_classes(tmp_path: Path) -> None:
    document = {"a": voc_xml(voc_object((5, 6, 20, 30))), "b": voc_xml()}
    voc(tmp_path / "set", document, "train")
    voc(tmp_path / "set", {"c": voc_xml(voc_object((5, 6, 20, 30), "dog"))}, "val")
    assert open_split(tmp_path / "set", ["dog", "cat"]).name == "set/val"
    train = open_split(tmp_path / "set", ["dog", "cat"], "train")
    assert train.images[0].objects.labels.tolist() == [2] and len(train.images[1].objects) == 0
    with pytest.raises(UserError, match=r"unknown class: .*'dog' is not one of .*; the detector's classes are cat, cow"):
        open_split(tmp_path / "set", ["cat", "cow"])
    with pytest.raises(UserError, match="no split 'tests'"):
        open_split(tmp_path / "set", ["dog", "cat"], "tests")
    voc(tmp_path / "set", {"d": voc_xml(voc_object((5, 6, 5, 30)), voc_object((5, 6, 20, 30)))}, "trainval")
    with pytest.raises(BadBoxes, match="no area"):
        open_split(tmp_path / "set", ["dog", "cat"], "trainval")
    assert open_split(tmp_path / "set", ["dog", "cat"], "trainval", "drop").faults() == {"no area": 1}
    with pytest.raises(UserError, match="no split 'val'; did you mean 'all'"):
        open_split(coco(tmp_path / "coco", [annotation()]), ["dog", "cat"], "val")


def test_a_run_is_tested_on_its_held_out_images(tmp_path: Path) -> None:
    data, run = voc(tmp_path / "set", {name: voc_xml(voc_object((5, 6, 20, 30))) for name in "abcd"}), tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text(json.dumps({"source": str(data)}))
    (run / "split.json").write_text('{"val": ["d", "b"]}')
    assert run_held_out(run, tmp_path / "other") == run_held_out(tmp_path, data) == []
    held = run_held_out(run, data)
    for split in (None, "val"):
        found = open_split(data, ["cat"], split, held_out=held)
        assert [image.name for image in found.images] == ["b", "d"] and found.name == "set/train, held out"
    assert len(open_split(data, ["cat"])) == len(open_split(data, ["cat"], "train", held_out=held)) == 4
    voc(tmp_path / "set", {"e": voc_xml(voc_object((5, 6, 20, 30)))}, "test")
    assert open_split(data, ["cat"], held_out=held).name == "set/test"
    assert open_split(data, ["cat"], "val", held_out=held).name == "set/train, held out"


def test_images_that_a_run_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By split and held-out images; in COCO folders, several splits may use the same file name."""
    cat, run = voc_xml(voc_object((5, 6, 20, 30))), tmp_path / "run"
    data = voc(tmp_path / "set", dict.fromkeys("abcd", cat), "trainval")
    for split, names in (("train", "ab"), ("val", "cd"), ("test", "ce")):
        voc(data, dict.fromkeys(names, cat), split)
    run.mkdir()

    def told(split: str, path: Path = data) -> list[str]:
        images = open_split(path, ["cat", "dog"], split).images
        return [image.name for i, image in enumerate(images) if i in run_trained_on(run, path, images)]

    def trained(path: Path, train: str, *held: str) -> None:
        (run / "recipe.json").write_text(json.dumps({"source": str(path), "recipe": {"data": {"train": train}}}))
        (run / "split.json").write_text(json.dumps({"val": held}))

    assert told("val") == []
    trained(data, "trainval", "d")
    assert (told("val"), told("train"), told("test")) == (["c"], ["a", "b"], ["c"])
    trained(data, "train")
    assert (told("val"), told("trainval")) == ([], ["a", "b"])
    trained(tmp_path / "other", "trainval")
    assert told("val") == []
    kit = tmp_path / "VOCdevkit"
    for year in (2007, 2012):
        shutil.copytree(data, kit / f"VOC{year}")
    trained(kit, "trainval", "VOC2012/d")
    assert told("val", kit) == ["VOC2007/c", "VOC2007/d", "VOC2012/c"]
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "coco" / split).mkdir()
        file = coco(tmp_path / "coco" / split, [annotation()])
        file.rename(tmp_path / "coco" / "annotations" / f"instances_{split}.json")
    trained(tmp_path / "coco", "train")
    assert (told("train", tmp_path / "coco"), told("val", tmp_path / "coco")) == (["a.jpg", "b.jpg"], [])
    images = open_split(tmp_path / "coco", ["cat", "dog"], "val").images
    with monkeypatch.context() as patched:
        patched.setattr(annotated, "read_document", lambda path: pytest.fail(f"{path} must not be read"))
        assert not run_trained_on(run, tmp_path / "coco", images)
    trained(data, "trainval")
    (data / "ImageSets" / "Main" / "trainval.txt").unlink()
    assert told("val") == [], "the split's list no longer exists"
    single = coco(tmp_path, [annotation()])
    trained(single, "train", "a.jpg")
    assert told("all", single) == ["b.jpg"]


def test_open_detectors_and_run_policy(tmp_path: Path) -> None:
    one = save_detector(detector(), tmp_path / "one.safetensors")
    two = save_detector(detector(classes=2), tmp_path / "two.safetensors")
    assert [model.training for model in open_detectors([one, one])] == [False, False]
    with pytest.raises(UserError, match=r"two.safetensors have different classes: class 1, class 2, class 3; and class 1, class 2"):
        open_detectors([one, two])
    with pytest.raises(UserError, match="must all take gray images or all take color images"):
        _ = TestOptions((detector(), detector(channels=1))).channels
    assert run_policy(one) is None and run_policy(tmp_path) is None
    for text, policy in (('{"recipe": {"data": {"bad": "drop"}}}', "drop"), ('{"recipe": {}}', None), ("[", None)):
        (tmp_path / "recipe.json").write_text(text)
        assert run_policy(tmp_path) == policy
