"""Training with masks: a set of real items pasted on a photo, from polygons to the mask AP of a run."""

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from scipy import ndimage

import pasting
from pages import Page
from reslearn import train
from reslearn.data.augment import Draws
from reslearn.data.boxes.masks import draw
from reslearn.data.boxes.read import open_boxes
from reslearn.data.boxes.source import BoxSource
from reslearn.detect.validation import validate_split
from reslearn.errors import UserError
from reslearn.evaluation.average_precision import coco
from reslearn.report import write

SIDE = 64
IMAGES = {"train": 8, "val": 3, "test": 3}
TINY = [
    "detector.masks=true", "detector.min_size=64", "detector.max_size=64", "detector.roi_size=4", "detector.regions=8",
    "detector.anchors=[16,32]", "detector.ranked=[100,60]", "detector.proposals=[60,20]", "detector.score=0",
    "detector.detections=10", "batch.size=2", "data.workers=0", "data.flip=none", "schedule.steps=24", "schedule.lr=0.01",
    "schedule.shape=cosine", "schedule.warmup=0", "log.every=6", "evaluate.every=24",
]  # fmt: skip


def photos(folder: Path) -> list[Path]:
    """Four parts of a photo shipped with matplotlib."""
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as photo:
        width, height = photo.width // 2, photo.height // 2
        corners = [(x, y) for y in (0, height) for x in (0, width)]
        files = [folder / f"{i}.png" for i in range(4)]
        folder.mkdir()
        for file, (x, y) in zip(files, corners, strict=True):
            photo.crop((x, y, x + width, y + height)).save(file)
    return files


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pasted")
    return pasting.paste(folder / "set", photos(folder / "photos"), IMAGES, side=SIDE)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.*"))}


def test_the_seed_determines_the_set(pasted: Path, tmp_path: Path) -> None:
    files = photos(tmp_path / "photos")
    again, other = (pasting.paste(tmp_path / f"{seed}", files, IMAGES, side=SIDE, seed=seed) for seed in (0, 1))
    assert tree(again) == tree(pasted)
    assert all(tree(other)[name] != content for name, content in tree(pasted).items())


def test_no_item_is_in_two_splits() -> None:
    stocks = [pasting.items("train", slice(None)), *(pasting.items("test", part) for part in (slice(0, 50), slice(50, None)))]
    own = [{item.gray.tobytes() for item in stock} for stock in stocks]
    assert [len(stock) for stock in stocks] == [2400, 200, 200]
    assert not own[0] & own[1] and not own[0] & own[2] and not own[1] & own[2]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_polygons_match_the_pixels(tmp_path: Path) -> None:
    """Against pycocotools, and against the pixels: outside the masks, the image is the background."""
    numbers, stock = np.random.default_rng(3), pasting.items("test", slice(0, 40))
    ground = Image.fromarray(np.full((200, 200, 3), (9, 8, 7), np.uint8))
    for _ in range(12):
        pixels, laid = pasting.compose(ground, stock, numbers, SIDE, 4)
        covered = np.zeros((SIDE, SIDE), int)
        for n, (label, mask) in enumerate(laid, 1):
            entry = pasting.annotation(n, 1, label, mask)
            runs = coco_masks.merge(coco_masks.frPyObjects(entry["segmentation"], SIDE, SIDE))
            whole = ndimage.binary_fill_holes(mask, np.ones((3, 3)))
            assert np.array_equal(coco_masks.decode(runs), whole) and whole.sum() <= 1.05 * mask.sum()
            assert entry["area"] == coco_masks.area(runs) and entry["bbox"] == coco_masks.toBbox(runs).tolist()
            covered += mask
        assert covered.max() == 1, "no pixel belongs to two items"
        near = np.zeros((SIDE, SIDE), int)
        for down, right in np.ndindex(5, 5):  # bicubic edges reach beyond the mask
            near |= np.pad(covered, 2)[down : down + SIDE, right : right + SIDE]
        assert (pixels[near == 0] == (9, 8, 7)).all() and (pixels[covered == 1] != (9, 8, 7)).any(axis=1).mean() > 0.99


def test_outlines_of_touching_parts_holes_and_the_whole_image() -> None:
    diagonal = np.eye(3, dtype=bool)
    found, holes = pasting.outlines(diagonal)
    assert len(found) == 3 and all(len(each) == 4 for each in found) and not holes
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    assert pasting.outlines(ring)[1] and not pasting.outlines(~ring)[1]
    whole, _ = pasting.outlines(np.ones((4, 6), bool))
    assert whole[0].tolist() == [[0, 0], [6, 0], [6, 4], [0, 4]]
    numbers = np.random.default_rng(0)
    for _ in range(20):  # noise has every kind of corner
        mask = numbers.random((9, 11)) < 0.5
        found, holes = pasting.outlines(mask)
        again = draw(tuple(each.astype(float) for each in found), 9, 11)
        assert (again | mask == again).all() and (holes or np.array_equal(again, mask))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_the_set_is_valid_and_pycocotools_reads_the_same(pasted: Path) -> None:
    splits = open_boxes(pasted)  # bad="fail"
    for name, split in splits.items():
        oracle = COCO(str(pasted / "annotations" / f"instances_{name}.json"))
        assert len(split) == IMAGES[name] and not split.findings and split.classes == pasting.CLASSES
        for image in split.images:
            masks = image.target(masks=True)["masks"].numpy()
            expected = [oracle.annToMask(each) for each in oracle.imgToAnns[image.id]]
            assert 1 <= len(masks) == len(expected) and np.array_equal(masks, expected)
            assert masks.sum((1, 2)).tolist() == image.objects.areas.tolist()


def test_masks_are_flipped_with_the_pixels(pasted: Path) -> None:
    """A flipped view has the flipped mask and its bounding box."""
    source = BoxSource(open_boxes(pasted)["train"], flip="both", masks=True)
    flips = set()
    for epoch in range(4):
        indices = torch.arange(len(source))
        views, targets = source.train_batch(Draws(1, torch.full_like(indices, epoch), indices))
        for i, (view, target) in enumerate(zip(views, targets, strict=True)):
            image, straight = source[i]
            axes = next(axes for axes in ((), (1,), (2,), (1, 2)) if torch.equal(view, image.flip(axes)))
            flips.add(axes)
            assert torch.equal(target["masks"], straight["masks"].flip(axes))
            for mask, box in zip(target["masks"].numpy(), target["boxes"].tolist(), strict=True):
                rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
                assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert len(flips) == 4


def test_a_run_with_masks_learns_and_reports_mask_ap(pasted: Path, tmp_path: Path) -> None:
    run = train(pasted, model="resnet18", settings=TINY, seed=0, out=tmp_path / "run", quiet=True, task="detect")
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    losses = np.array([[line["loss"], line["losses"]["loss_mask"]] for line in steps])
    assert np.isfinite(losses).all() and (losses[-1] < (0.8 * losses[0][0], 0.9 * losses[0][1])).all(), losses
    whole = json.loads((run.folder / "result.json").read_text())
    assert [each["name"] for each in whole["examples"]] == [image.name for image in open_boxes(pasted)["test"].images]
    assert all((run.folder / each["image"]).is_file() for each in whole["examples"])
    assert "test mask AP" in Page(write([run.folder], tmp_path / "page.html")).text
    result = whole["last"]
    (seen,) = [line for line in lines if line["event"] == "eval"]
    assert set(seen["masks"]) == {"AP", "AP50", "AP75"} and "loss_mask" in seen["losses"]
    for name in ("val", "test"):
        masks, boxes = result[name]["masks"], result[name]
        assert masks["n"] == boxes["n"] == IMAGES[name] and masks["objects"] == boxes["objects"] > 0
        assert 0 <= masks["AP"] <= masks["AP50"] <= 100 and len(masks["per_class"]) == len(pasting.CLASSES)


@pytest.mark.parametrize("shift", [0, 24])
def test_mask_ap_evaluates_masks_and_box_ap_boxes(shift: int, pasted: Path) -> None:
    """A detector with perfect boxes, and with perfect or shifted masks."""
    source = BoxSource(open_boxes(pasted)["val"], masks=True)
    result = validate_split(_Oracle(source, shift), source, "fp32", 0, lambda done: None)  # type: ignore[arg-type]
    assert result.masks is not None and coco(result.boxes)["AP"] == pytest.approx(100)
    assert coco(result.masks)["AP50"] == (pytest.approx(100) if not shift else pytest.approx(0, abs=20))
    assert all(found.masks is None for found in result.boxes.detections), "masks are not kept"


class _Oracle(torch.nn.Module):
    """Returns the objects of each image of a split in turn."""

    def __init__(self, source: BoxSource, shift: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answers = iter([source[i][1] for i in range(len(source))])
        self.shift = shift

    def detect_with_losses(self, images: object, targets: object) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        target = next(self.answers)
        masks = target["masks"].roll(self.shift, 2)[:, None].float()
        return [{**target, "scores": torch.ones(len(masks)), "masks": masks}], {"loss_mask": torch.tensor(1.0)}


def test_test_objects_without_a_mask_are_rejected_before_training(pasted: Path, tmp_path: Path) -> None:
    shutil.copytree(pasted, tmp_path / "set")
    file = tmp_path / "set" / "annotations" / "instances_test.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["segmentation"] = []
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"test image 0001\.png, object 1 has no segmentation"):
        train(tmp_path / "set", model="resnet18", settings=TINY, out=tmp_path / "run", quiet=True, task="detect")
    assert not (tmp_path / "run").exists()
