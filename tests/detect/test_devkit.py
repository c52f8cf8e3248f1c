"""The papers' protocol on VOCdevkit, from the command line to results on the 2007 test split."""

import json
from pathlib import Path

import pytest
import torch

import boxed
from command_line import RunCli
from reslearn import Card, create, resume, save, train
from reslearn.data.boxes.read import open_boxes
from reslearn.data.preprocess import Preprocessing
from reslearn.detect import load_detector
from reslearn.detect.evaluate import open_split, run_held_out

SMALL = [
    "detector.min_size=48", "detector.max_size=96", "detector.anchors=[16,24]", "detector.ratios=[1.0]", "detector.regions=16",
    "detector.ranked=[200,100]", "detector.proposals=[50,20]", "schedule.steps=4", "evaluate.every=4", "checkpoint.every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 + 2 + 2 images of 2007 and 4 + 2 of 2012, some with equal names; a 2012 test list without annotations."""
    root = tmp_path_factory.mktemp("data") / "VOCdevkit"
    for year, splits in (("VOC2007", {"train": 6, "val": 2, "test": 2}), ("VOC2012", {"train": 4, "val": 2})):
        for split, count in splits.items():
            boxed.shapes(root / year, count, split, seed=int(year[3:]))
        main = root / year / "ImageSets" / "Main"
        (main / "trainval.txt").write_text((main / "train.txt").read_text() + (main / "val.txt").read_text())
    (root / "VOC2012/ImageSets/Main/test.txt").write_text("2012_000001\n2012_000002\n")
    boxed.photo(root / "VOC2012/JPEGImages/2012_000001.jpg")
    return root


def test_training_on_07_and_12_and_testing_on_07(devkit: Path, tmp_path: Path, run_cli: RunCli) -> None:
    run, words = tmp_path / "run", [word for setting in SMALL for word in ("--set", setting)]
    words = ["detect", "train", devkit, "--recipe", "voc-paper", "--model", "resnet8", "--out", run, "--device", "cpu", *words]
    code, out, err = run_cli(*words)
    assert code == 0, err
    said = out + err
    assert "VOCdevkit: 14 train + 2 test images" in said
    assert "VOC2012/ImageSets/Main/test.txt: not annotated: none of its 2 images has a file in Annotations: left out" in said
    facts = json.loads((run / "recipe.json").read_text())
    detector = facts["recipe"]["detector"]
    assert (detector["background"], detector["anchors_inside"], detector["frozen"]) == (0.1, True, 0)
    assert facts["data"]["n"] == {"train": 14, "test": 2}
    result = json.loads((run / "result.json").read_text())
    assert {row["name"].split("/")[0] for row in result["gallery"]} == {"VOC2007"}
    found = tmp_path / "found.json"
    code, out, err = run_cli("detect", "eval", run, devkit, "--json", "--out", found, "--device", "cpu")
    assert code == 0, err
    numbers = json.loads(out)
    assert numbers["data"] == "VOCdevkit/test" and numbers["n"] == 2 and numbers["VOC07"] == result["last"]["test"]["VOC07"]
    assert {row["file_name"] for row in json.loads(found.read_text())} <= {"VOC2007/test-0.png", "VOC2007/test-1.png"}


def test_images_held_out_of_both_years_are_recorded_and_a_stopped_run_resumes(devkit: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "data.train=train", "data.val=3"]
    for year in ("VOC2007", "VOC2012"):  # without val lists, so that images are held out
        source = devkit / year
        (tmp_path / "VOCdevkit" / year / "ImageSets" / "Main").mkdir(parents=True)
        for folder in ("Annotations", "JPEGImages"):
            (tmp_path / "VOCdevkit" / year / folder).symlink_to(source / folder)
        (tmp_path / "VOCdevkit" / year / "ImageSets/Main/train.txt").write_text((source / "ImageSets/Main/train.txt").read_text())
    data = tmp_path / "VOCdevkit"
    run = train(data, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True, task="detect", device="cpu", seed=1)
    held = run_held_out(run.folder, data)
    every = [image.name for image in open_boxes(data)["train"].images]
    assert len(held) == 3 and set(held) < set(every) and len(set(every)) == 10
    assert [image.name for image in open_split(data, ("disc", "square"), "val", held_out=held).images] == held
    weights = load_detector(run.folder).state_dict()
    for name in ("result.json", "model.safetensors"):
        (run.folder / name).unlink()
    newest = max((run.folder / "checkpoints").iterdir())
    for file in sorted(newest.iterdir()):
        file.unlink()
    newest.rmdir()
    again = load_detector(resume(run.folder, quiet=True).folder).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(("recipe", "steps"), [("voc-paper", 2), ("voc-paper-4step", 6), ("coco-paper", 2)])
def test_each_paper_recipe_trains_the_unfrozen_layers(devkit: Path, tmp_path: Path, recipe: str, steps: int) -> None:
    torch.manual_seed(0)
    view = Preprocessing(channels=3, size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    before = create("resnet8", 2)
    save(before, tmp_path / "start.safetensors", Card(net="resnet8", classes=("a", "b"), preprocessing=view))
    settings = [*SMALL, f"schedule.steps={steps}", "data.train=trainval", "detector.frozen=2"]
    on = {"out": tmp_path / "run", "quiet": True, "task": "detect", "device": "cpu"}
    run = train(devkit, recipe=recipe, init=tmp_path / "start.safetensors", settings=settings, **on)
    after = load_detector(run.folder).state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    shared = {name: tensor for name, tensor in before.state_dict().items() if f"backbone.{name}" in after}
    changed = {name.split(".")[0] for name, tensor in shared.items() if not torch.equal(tensor, after[f"backbone.{name}"])}
    assert changed == {"layer2"}  # conv1 and layer1 are frozen; layer3 is in the region head
