"""BoxSource, ImageReader and hold_out."""

from pathlib import Path

import numpy as np
import pytest
import torch

import boxed
import planting
from reslearn.data.augment import Draws
from reslearn.data.boxes import box_set
from reslearn.data.boxes.read import open_boxes
from reslearn.data.boxes.reader import ImageReader
from reslearn.data.boxes.source import BoxSource, hold_out, mirrored, upside_down
from reslearn.data.images import files
from reslearn.errors import UserError


def draws(indices: list[int], epoch: int = 0) -> Draws:
    return Draws(5, torch.full((len(indices),), epoch), torch.tensor(indices))


@pytest.mark.parametrize("turn", [mirrored, upside_down])
def test_boxes_and_masks_turn_with_the_image(turn) -> None:
    image = torch.zeros(3, 20, 30)
    image[:, 2:8, 5:16] = 1
    target = {"boxes": torch.tensor([[5.0, 2.0, 16.0, 8.0]]), "labels": torch.tensor([1]), "masks": image[:1].to(torch.uint8)}
    turned, turned_target = turn(image, target)
    x1, y1, x2, y2 = turned_target["boxes"][0].int().tolist()
    assert turned[:, y1:y2, x1:x2].min() == 1 and turned.sum() == image.sum()
    assert torch.equal(turned_target["masks"][0].float(), turned[0])
    again, back = turn(turned, turned_target)
    assert torch.equal(again, image) and torch.equal(back["boxes"], target["boxes"])
    assert target["boxes"].tolist() == [[5, 2, 16, 8]], "the input is unchanged"


def test_flips_depend_only_on_seed_epoch_and_index(tmp_path: Path) -> None:
    source = BoxSource(open_boxes(boxed.shapes(tmp_path))["train"], flip="both")
    together, targets = source.train_batch(draws([0, 1, 2, 3, 4, 5, 6, 7]))
    for i in range(8):
        (alone,), (target,) = source.train_batch(draws([i]))
        assert torch.equal(alone, together[i]) and torch.equal(target["boxes"], targets[i]["boxes"])
    others, _ = source.train_batch(draws([0, 1, 2, 3, 4, 5, 6, 7], epoch=1))
    assert any(not torch.equal(a, b) for a, b in zip(together, others, strict=True))
    turned = {tuple(bool(torch.equal(view, same)) for same in (image, image.flip(2), image.flip(1), image.flip(1, 2)))
              for view, (image, _) in ((together[i], source[i]) for i in range(8))}  # fmt: skip
    assert len(turned) >= 3, "both axes are flipped"


def test_without_flips_images_are_unchanged(tmp_path: Path) -> None:
    source = BoxSource(open_boxes(boxed.shapes(tmp_path))["train"])
    images, targets = source.train_batch(draws([3, 1]))
    assert torch.equal(images[0], source[3][0]) and torch.equal(targets[1]["boxes"], source[1][1]["boxes"])
    assert images[0].shape == (3, 48, 64) and images[0].min() >= 0 and images[0].max() <= 1


def test_damage_after_the_header_is_reported_when_the_image_is_read(tmp_path: Path) -> None:
    root = boxed.voc(tmp_path, {"a": boxed.voc_xml(boxed.voc_object((1, 1, 9, 9)))})
    file = root / "JPEGImages" / "a.jpg"
    planting.photo(0, boxed.SIZE).save(file, quality=95)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    split = open_boxes(root)["train"]
    words = r"a\.jpg: cannot be decoded \(damaged or truncated\): .*; to copy the set without damaged images, run reslearn doctor "
    for read in (lambda: BoxSource(split)[0], lambda: BoxSource(split, channels=1)[0], split.images[0].pixels):
        with pytest.raises(UserError, match=words + "SET --fix COPY$"):
            read()


def test_difficult_objects_can_be_excluded(tmp_path: Path) -> None:
    document = boxed.voc_xml(boxed.voc_object((1, 1, 9, 9), more="<difficult>1</difficult>"), boxed.voc_object((10, 10, 30, 30)))
    split = open_boxes(boxed.voc(tmp_path, {"a": document}))["train"]
    assert [len(BoxSource(split, difficult=keep)[0][1]["boxes"]) for keep in (True, False)] == [2, 1]


def test_hold_out_is_seeded_and_keeps_every_image(tmp_path: Path) -> None:
    split = open_boxes(boxed.shapes(tmp_path, images=10))["train"]
    rest, out = hold_out(split, 3, seed=1)
    names = [[image.name for image in part.images] for part in (rest, out, split)]
    assert sorted(names[0] + names[1]) == sorted(names[2]) and len(names[1]) == 3
    assert [image.name for image in hold_out(split, 3, seed=1)[1].images] == names[1]
    assert any([image.name for image in hold_out(split, 3, seed=s)[1].images] != names[1] for s in (2, 3, 4))


@pytest.mark.parametrize(("cache", "decoded"), [(0, 6), (4 * 40 * 60 * 3 - 1, 6), (4 * 40 * 60 * 3, 3)])
def test_small_sets_are_cached(tmp_path: Path, cache: int, decoded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    root = boxed.voc(tmp_path, {f"a{i}": boxed.voc_xml(boxed.voc_object((5, 6, 24, 30))) for i in range(4)})
    images = open_boxes(root)["train"].images
    for i, image in enumerate(images):
        planting.photo(i, (40, 60)).save(image.path)
    read: list[Path] = []
    monkeypatch.setattr(box_set, "read", lambda path, channels: read.append(path) or files.read(path, channels))
    reader = ImageReader(images, cache=cache)
    for i in (0, 2, 0, 3, 2, 0):
        assert np.array_equal(reader[i], files.read(images[i].path, 3))
    assert len(reader) == 4 and len(read) == decoded
    assert ImageReader(images, 1)[1].shape == (40, 60, 1)
