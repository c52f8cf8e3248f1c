"""The localize commands: training, evaluation and errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reslearn
from command_line import RunCli
from pages import Page
from painted_sets import COLORS, write_set
from reslearn import UserError
from reslearn.data.augment import Draws
from reslearn.data.boxes.read import open_boxes
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.detect import create_detector, save_detector
from reslearn.localize.crops import Crops, crops_of
from reslearn.localize.evaluate import errors, evaluate
from reslearn.localize.net import create_localizer, load_localizer
from reslearn.localize.predict import predict
from reslearn.localize.sources import LocalizeSource
from reslearn.localize.views import Single, of_one_kind, view_of
from reslearn.weights.store import Card

VIEW = Preprocessing(channels=3, size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)


def edit(file: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def given(run: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths for commands: models, sets and invalid sets."""
    root = tmp_path_factory.mktemp("sets")
    found = {name: write_set(root / name, {"train": 2, "test": 2}) for name in ("invalid", "others", "single", "mixed")}
    found |= {"alone": write_set(root / "alone", {"train": 2}), "tested": write_set(root / "tested", {"test": 2})}
    found["val"] = write_set(root / "val", {"train": 8, "val": 4})

    def rename(document: Any) -> None:
        document["categories"][0]["name"], document["categories"][1]["name"] = "ring", "star"

    def keep_one(document: Any) -> None:
        for key in ("images", "annotations", "categories"):
            del document[key][1]

    edit(found["invalid"] / "test" / "_annotations.coco.json", lambda file: file["annotations"][0].update(bbox=[1, 1, 0, 9]))
    for split in ("train", "test"):
        edit(found["others"] / split / "_annotations.coco.json", rename)
        edit(found["single"] / split / "_annotations.coco.json", keep_one)
    edit(found["mixed"] / "train" / "_annotations.coco.json", lambda document: document["annotations"][1].update(image_id=1))
    for name, channels in (("model", 3), ("gray", 1)):
        view = Preprocessing(channels=channels, size=(32, 32), mean=(0.4,) * channels, std=(0.2,) * channels)
        card = Card(net="resnet8", classes=("a", "b"), preprocessing=view)
        found[name] = reslearn.save(reslearn.create("resnet8", 2, channels), root / f"{name}.safetensors", card)
    found["detector"] = save_detector(create_detector("resnet8", 2), root / "detector.safetensors")
    return found | {"data": shapes, "run": run}


def test_a_run_learns_to_localize(run: Path, shapes: Path) -> None:
    result = json.loads((run / "result.json").read_text())["last"]["test"]
    assert result["n"] == 30 and result["1-crop"]["true_class"]["error"] <= 30 and result["dense"]["true_class"]["error"] <= 15
    assert result["dense"]["top1"]["error"] >= result["dense"]["true_class"]["error"]
    untrained = load_localizer(run).train()
    torch.manual_seed(0)
    fresh = create_localizer("resnet8", untrained.classes, untrained.settings, untrained.card.preprocessing).eval()
    assert evaluate(fresh, shapes)["dense"]["true_class"]["error"] > 2 * result["dense"]["true_class"]["error"] + 20
    card = load_localizer(run).card
    assert card.metrics["test"]["dense"] == result["dense"]["true_class"]["error"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 96


def test_errors_match_a_loop_over_images(run: Path, shapes: Path) -> None:
    """predict and errors against a loop over images and two scales."""
    model, data = load_localizer(run), open_boxes(shapes)["test"]
    preprocessing = model.card.preprocessing
    truth = of_one_kind(data)
    for scales in (None, (32, 44)):
        scores, boxes = predict(model, data, scales)
        wrong = np.zeros((2, len(data)), bool)
        for i, image in enumerate(data.images):
            found: dict[int, tuple[float, np.ndarray]] = {}
            for scale in scales or (None,):
                view, back = view_of(image.pixels(), preprocessing, scale)
                mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
                top, best = model.best((torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float() / 255 - mean) / std)
                for k in range(2):
                    box = best[0, k].numpy().astype(float)
                    box = np.array([(box[j] + back[j % 2]) * back[2 + j % 2] for j in range(4)])
                    if k not in found or top[0, k] > found[k][0]:
                        found[k] = float(top[0, k]), box
            for k in range(2):
                assert scores[i, k] == pytest.approx(found[k][0], abs=1e-3)
                np.testing.assert_allclose(boxes[i, k], found[k][1], atol=1e-2)
            label, (x1, y1, x2, y2) = int(truth.labels[i]), truth.boxes[i][0]
            a1, b1, a2, b2 = boxes[i, label]
            shared = max(0, min(a2, x2) - max(a1, x1)) * max(0, min(b2, y2) - max(b1, y1))
            good = shared / ((a2 - a1) * (b2 - b1) + (x2 - x1) * (y2 - y1) - shared) >= 0.5
            wrong[:, i] = not good, not good or scores[i, label] < scores[i, 1 - label]
        numbers = errors(np.argsort(-scores, axis=1), boxes, truth, model.classes)
        assert [numbers["true_class"]["error"], numbers["top1"]["error"]] == pytest.approx((100 * wrong.mean(axis=1)).tolist())


def test_top5_with_more_than_5_classes() -> None:
    order = np.tile(np.arange(6, -1, -1), (2, 1))  # the top 5 are 6, 5, 4, 3, 2
    boxes = np.tile([0.0, 0, 1, 1], (2, 7, 1))
    found = errors(order, boxes, Single(np.array([2, 1]), (boxes[0, :1], boxes[0, :1])), "abcdefg")
    assert [found[key]["error"] for key in ("true_class", "top1", "top5", "classification")] == [0, 100, 50, 100]
    assert found["per_class"][2] == {"class": "c", "n": 1, "error": 0.0, "interval": [0.0, 0.0]}
    assert found["per_class"][0] == {"class": "a", "n": 0, "error": None, "interval": None}


def test_a_classifier_with_another_class_order(run: Path, shapes: Path, tmp_path: Path) -> None:
    """A classifier that always predicts square (its first class): correct for every second image."""
    model = reslearn.create("resnet8", 3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([5.0, 1, 0])
    view = load_localizer(run).card.preprocessing
    card = Card(net="resnet8", classes=("square", "other", "disc"), preprocessing=view)
    path = reslearn.save(model, tmp_path / "c.safetensors", card)
    result = evaluate(run, shapes, classifier=path)
    assert result["1-crop"]["classification"]["error"] == 50 and result["classes_from"] == str(path)
    squares = result["1-crop"]["per_class"][1]
    assert result["1-crop"]["top1"]["error"] == pytest.approx(50 + squares["error"] / 2)
    card = Card(net="resnet8", classes=("disc", "x"), preprocessing=view)
    other = reslearn.save(reslearn.create("resnet8", 2), tmp_path / "o.safetensors", card)
    with pytest.raises(UserError, match="has no class 'square'"):
        evaluate(run, shapes, classifier=other)


def test_training_crops_are_reproducible(shapes: Path) -> None:
    data = open_boxes(shapes)["train"]
    one, two = LocalizeSource(data), LocalizeSource(data)

    def batch(source: LocalizeSource, step: int) -> Crops:
        return crops_of(source, 0, 32, (32, 48), Draws(view_seed(0), *SampleOrder(0, 64, 8)[step]))

    for step in (0, 5, 9):
        first = batch(one, step)
    second = batch(two, 9)
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    assert all(torch.equal(a, b) for a, b in zip(first.boxes, second.boxes, strict=True))
    for pixels, boxes, label in zip(first.pixels, first.boxes, first.labels, strict=True):  # the box matches the color
        x1, y1, x2, y2 = boxes[0].round().int().tolist()
        color = pixels[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean((1, 2))
        assert color.argmax() == {0: 0, 1: 2}[int(label)] and color.max() > 180


def test_training_from_a_classifier_by_command(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(tmp_path)
    view = VIEW
    reslearn.save(reslearn.create("plain8", 5), "c.safetensors", Card(net="plain8", classes=tuple("abcde"), preprocessing=view))
    words = ["train", shapes, "--init", "c.safetensors", "--out", "where", "--device", "cpu"]
    settings = ("data.size=32", "data.jitter=[32,40]", "data.val=0", "schedule.epochs=1", "batch.size=16", "schedule.lr=0.01")
    code, said, _ = run_cli("localize", *words, *set_(*settings))
    assert code == 0
    assert "true class given, 1 crop" in said and "report   where/report.html" in said
    page = Page(Path("where/report.html"))
    assert "A localizer on plain8" in page.text and f"from {shapes.name}, for 4 iterations (1.0 epochs)" in page.text
    assert page.count("svg") == 3 and page.count("img") == len(json.loads(Path("where/result.json").read_text())["gallery"]) + 1
    Path("where/report.html").unlink()
    assert run_cli("localize", "train", "--resume", "where", "--device", "cpu").code == 0
    assert Page(Path("where/report.html")).source == page.source
    card = load_localizer("where").card
    assert card.net == "plain8" and card.preprocessing.mean == view.mean and card.classes == tuple(COLORS)
    code, said, _ = run_cli("localize", "eval", "where", shapes, "--scale", 40, "--scale", 48, "--out", "e.json", "--device", "cpu")
    assert code == 0
    assert "dense 40 48" in said and "true class given" in said and "disc" in said
    assert json.loads(Path("e.json").read_text())["scales"] == [40, 48]


def set_(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


TRAIN = ["train", "{data}", "--out", "o", "--model", "resnet8"]
REFINE = ["train", "{data}", "--out", "o", "--recipe", "localize-regions"]
ERRORS = {
    "no data": (["train", "--model", "resnet8"], "DATA is missing: reslearn localize train DATA"),
    "another net": (["train", "{data}", "--out", "o", "--model", "resnet20", "--init", "{model}"], "is a resnet8, not a"),
    "jitter": ([*TRAIN, *set_("data.jitter=5")], "data.jitter: must be a list"),
    "small jitter": ([*TRAIN, *set_("data.jitter=[99,100]")], "must be two sizes in px, size <= low <= high"),
    "lr": ([*TRAIN, *set_("schedule.lr=0")], "schedule.lr"),
    "net": (["train", "{data}", "--out", "o", "--model", "resnt8"], "no network called 'resnt8'"),
    "existing folder": (["train", "{data}", "--out", "{data}", "--model", "resnet8"], "exists and is not an empty folder"),
    "existing run": (["train", "{data}", "--out", "{run}", "--model", "resnet8"], "already contains a run"),
    "resume and more": (["train", "--resume", "o", "--model", "m", *set_("schedule.lr=1")], "--model, --set cannot be combined"),
    "resume nothing": (["train", "--resume", "o"], "is not a run folder"),
    "scale": (["eval", "{run}", "{data}", "--scale", "8"], "scale 8: must be from 32"),
    "no test images": (["eval", "{run}", "{alone}"], "has no test or val images"),
    "policy": (["crops", "{data}", "-o", "o", "--bad-boxes", "dorp"], "'--bad-boxes': ", "'dorp' is not one of 'drop', 'fail'"),
    "bad box, crops": (["crops", "{invalid}", "-o", "o"], "object 0: no area", "leave them out with --bad-boxes drop"),
    "bad box": (["train", "{invalid}", "--out", "o", "--model", "resnet8"], "no area", "reslearn doctor {invalid} --fix COPY"),
    "bad box, eval": (["eval", "{run}", "{invalid}"], "no area", "reslearn doctor {invalid} --fix COPY"),
    "classes": (["eval", "{run}", "{others}"], "has a class that the model lacks: ", "'ring'"),
    "split": (["eval", "{run}", "{data}", "--split", "tset"], "no split 'tset'; did you mean 'test'"),
    "key": ([*TRAIN, *set_("data.jiter=[32,48]")], "no key 'data.jiter'; did you mean 'data.jitter'?"),
    "localizer key": ([*TRAIN, *set_("localizer.anchor=1")], "no key 'localizer.anchor'; did you mean 'localizer.anchors'?"),
    "no value": ([*TRAIN, *set_("localizer.hidden")], "must have the form key=value"),
    "count": ([*TRAIN, *set_("localizer.count=0")], "localizer.count: must be at least 1"),
    "anchors and count": ([*TRAIN, *set_("localizer.anchors=[[8,8]]", "localizer.count=4")], "localizer.count does not apply"),
    "no anchors": ([*TRAIN, *set_("localizer.anchors=[]")], "localizer.anchors: must have 1 or more values"),
    "overlaps": ([*TRAIN, *set_("localizer.iou=[0.7,0.3]")], "iou must be two overlaps, 0 < low <= high <= 1"),
    "stage": ([*TRAIN, *set_("stage=region")], "stage: must be 'proposals' or 'regions'; did you mean 'regions'?"),
    "proposals": ([*TRAIN, *set_("localizer.proposals=5")], "localizer.proposals applies to stage regions only"),
    "warm-up": ([*TRAIN, *set_("schedule.warmup=0", "schedule.warmup_lr=0.01")], "schedule.warmup_lr", "classification"),
    "ranks": ([*TRAIN, *set_("batch.sync_bn=true")], "batch.sync_bn"),
    "frozen": (["train", "{data}", "--out", "o", "--init", "{model}", *set_("net.frozen=1")], "net.frozen"),
    "rate of the backbone": ([*TRAIN, *set_("optimizer.backbone_lr=0.1")], "optimizer.backbone_lr", "net.init"),
    "execution": ([*TRAIN, *set_("execution=captured")], "execution: must be 'auto', 'eager' or 'fused'"),
    "plateau without val": ([*TRAIN, *set_("schedule.shape=plateau", "data.val=0")], "schedule.shape=plateau", "data.val"),
    "val twice": (["train", "{val}", "--out", "o", "--model", "resnet8", *set_("data.val=3")], "has its own val images"),
    "too many held out": ([*TRAIN, *set_("data.val=64")], "would hold out 64 of 64 images"),
    "long warm-up": (
        [*TRAIN, *set_("schedule.steps=5", "schedule.warmup=5")],
        "must be shorter than the run (5 steps)",
    ),
    "no train images": (["train", "{tested}", "--out", "o", "--model", "resnet8"], "no train split"),
    "one class": (["train", "{single}", "--out", "o", "--model", "resnet8"], "only one class, 'disc'"),
    "two classes in an image": (["train", "{mixed}", "--out", "o", "--model", "resnet8"], "0.png: has disc and square"),
    "recipe": (["train", "{data}", "--out", "o", "--recipe", "localize-region"], "did you mean 'localize-regions'?"),
    "a localizer as init": (["train", "{data}", "--out", "o", "--init", "{run}"], "{run}", "localizer"),
    "a detector as init": (["train", "{data}", "--out", "o", "--init", "{detector}"], "{detector}", "detector"),
    "a net without a map": (["train", "{data}", "--out", "o", "--model", "densenet-bc-100-12"], "localization does not support"),
    "gray": (["train", "{data}", "--out", "o", "--init", "{gray}"], "{gray}", "gray", "color"),
    "init, nowhere": (["train", "{data}", "--out", "o", "--init", "nowhere"], "no model file or run folder called nowhere"),
    "refine without init": (REFINE, "--init"),
    "refine a classifier": ([*REFINE, "--init", "{model}"], "{model} is not a localizer"),
    "refine, the size": ([*REFINE, "--init", "{run}", *set_("data.size=64")], "data.size"),
    "refine, the crop": ([*REFINE, "--init", "{run}", *set_("data.crop_ratio=1")], "data.crop_ratio"),
    "refine, the jitter": ([*REFINE, "--init", "{run}", *set_("data.jitter=[32,64]")], "data.jitter"),
    "refine, the layers": ([*REFINE, "--init", "{run}", *set_("localizer.hidden=8")], "localizer.hidden"),
    "refine, the anchors": ([*REFINE, "--init", "{run}", *set_("localizer.anchors=[[8,8]]")], "localizer.anchors"),
    "refine, the count": ([*REFINE, "--init", "{run}", *set_("localizer.count=4")], "localizer.count"),
    "refine, the backbone": ([*REFINE, "--init", "{run}", *set_("optimizer.backbone_lr=0.1")], "optimizer.backbone_lr"),
    "refine without boxes": ([*REFINE, "--init", "{run}", *set_("localizer.proposals=null")], "localizer.proposals"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(
    name: str, given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(tmp_path)
    words, *messages = ERRORS[name]
    code, _, err = run_cli("localize", *(word.format(**given) for word in words))
    assert code == 2, err
    assert all(message.format(**given) in err for message in messages) and err.count("\n") == 1 and not list(tmp_path.iterdir()), (
        err
    )
