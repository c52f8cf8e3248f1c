"""reslearn localize, as it is called: from cut windows to errors; stopped and killed runs; mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import reslearn
from command_line import RunCli
from pages import Page
from painted_sets import COLORS, TINY, write_set
from reslearn import UserError
from reslearn.data.boxes.read import open_boxes
from reslearn.data.preprocess import Preprocessing
from reslearn.localize import create_localizer, load_localizer
from reslearn.localize.evaluate import errors, evaluate
from reslearn.localize.predict import predict
from reslearn.localize.train import Examples, make_plan
from reslearn.localize.views import Single, of_one_kind, view_of
from reslearn.weights.store import Card

VIEW = Preprocessing(channels=3, size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sets that something is wrong with."""
    root = tmp_path_factory.mktemp("sets")
    found = {name: write_set(root / name, {"train": 2, "test": 2}) for name in ("unsound", "others")}
    found["alone"] = write_set(root / "alone", {"train": 2})
    file = found["unsound"] / "test" / "_annotations.coco.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["bbox"][2] = 0
    file.write_text(json.dumps(document))
    for file in found["others"].glob("*/_annotations.coco.json"):
        file.write_text(file.read_text().replace('"disc"', '"ring"').replace('"square"', '"star"'))
    return found


def test_it_learns_where_things_are(run: Path, shapes: Path) -> None:
    result = json.loads((run / "result.json").read_text())["test"]
    assert result["n"] == 30 and result["1-crop"]["true_class"]["error"] <= 30 and result["dense"]["true_class"]["error"] <= 15
    assert result["dense"]["top1"]["error"] >= result["dense"]["true_class"]["error"]
    untrained = load_localizer(run).train()
    torch.manual_seed(0)
    fresh = create_localizer("resnet8", untrained.classes, untrained.settings, untrained.card.preprocessing).eval()
    assert evaluate(fresh, shapes)["dense"]["true_class"]["error"] > 2 * result["dense"]["true_class"]["error"] + 20
    card = load_localizer(run).card
    assert card.metrics["test"]["dense"] == result["dense"]["true_class"]["error"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 96


def test_the_numbers_are_those_of_each_image_alone(run: Path, shapes: Path) -> None:
    """predict and errors against one image after the other, two scales, the better-scored box by hand."""
    model, data = load_localizer(run), open_boxes(shapes)["test"]
    look = model.card.preprocessing
    truth = of_one_kind(data)
    for scales in (None, (32, 44)):
        scores, boxes = predict(model, data, scales)
        wrong = np.zeros((2, len(data)), bool)
        for i, image in enumerate(data.images):
            found: dict[int, tuple[float, np.ndarray]] = {}
            for scale in scales or (None,):
                view, back = view_of(image.pixels(), look, scale)
                x = (
                    torch.from_numpy(view.copy()).permute(2, 0, 1)[None].float() / 255 - torch.tensor(look.mean)[:, None, None]
                ) / (torch.tensor(look.std)[:, None, None])
                top, best = model.best(x)
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


def test_five_guesses_where_there_are_more_classes() -> None:
    order = np.tile(np.arange(6, -1, -1), (2, 1))  # 6, 5, 4, 3, 2 are guessed
    boxes = np.tile([0.0, 0, 1, 1], (2, 7, 1))
    found = errors(order, boxes, Single(np.array([2, 1]), (boxes[0, :1], boxes[0, :1])), "abcdefg")
    assert [found[key]["error"] for key in ("true_class", "top1", "top5", "classification")] == [0, 100, 50, 100]
    assert (
        found["per_class"][2] == {"class": "c", "n": 1, "error": 0.0, "interval": [0.0, 0.0]}
        and found["per_class"][0]["error"] is None
    )


def test_classes_from_a_classifier_in_another_order(run: Path, shapes: Path, tmp_path: Path) -> None:
    """A classifier that says square (its first class) for everything: right for every second image."""
    model = reslearn.create("resnet8", 3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([5.0, 1, 0])
    view = load_localizer(run).card.preprocessing
    path = reslearn.save(
        model, tmp_path / "c.safetensors", Card(net="resnet8", classes=("square", "other", "disc"), preprocessing=view)
    )
    result = evaluate(run, shapes, classifier=path)
    assert result["1-crop"]["classification"]["error"] == 50 and result["classes_from"] == str(path)
    squares = result["1-crop"]["per_class"][1]
    assert result["1-crop"]["top1"]["error"] == pytest.approx(50 + squares["error"] / 2)
    other = reslearn.save(
        reslearn.create("resnet8", 2), tmp_path / "o.safetensors", Card(net="resnet8", classes=("disc", "x"), preprocessing=view)
    )
    with pytest.raises(UserError, match="knows no class 'square'"):
        evaluate(run, shapes, classifier=other)


def test_training_sees_the_same_crops_whenever_it_looks(shapes: Path) -> None:
    data, plan = open_boxes(shapes)["train"], make_plan(TINY)
    one, two = Examples(data, plan), Examples(data, plan)
    for step in (0, 5, 9):
        first = one.batch(step)
    second = two.batch(9)
    assert torch.equal(first[0], second[0]) and torch.equal(first[2], second[2])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    for pixels, boxes, label in zip(*first, strict=True):  # the box is where the color is
        x1, y1, x2, y2 = boxes[0].round().int().tolist()
        color = pixels[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean((1, 2))
        assert color.argmax() == {0: 0, 1: 2}[int(label)] and color.max() > 180


def test_from_a_classifier_by_command(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    view = VIEW
    reslearn.save(reslearn.create("plain8", 5), "c.safetensors", Card(net="plain8", classes=tuple("abcde"), preprocessing=view))
    words = ["train", shapes, "--init", "c.safetensors", "--out", "where", "--size", 32, "--epochs", 1, "--batch", 16]
    code, said, _ = run_cli("localize", *words, "--jitter", "32,40", "--lr", 0.01, "--device", "cpu")
    assert code == 0
    assert "true class given, 1 crop" in said and "report   where/report.html" in said
    page = Page(Path("where/report.html"))
    assert "A localizer on plain8" in page.text and f"from {shapes.name}, for 4 iterations (1.0 epochs)" in page.text
    assert page.count("svg") == 2 and page.count("img") == len(json.loads(Path("where/result.json").read_text())["gallery"]) + 1
    Path("where/report.html").unlink()
    assert run_cli("localize", "train", "--resume", "where", "--device", "cpu").code == 0
    assert Page(Path("where/report.html")).source == page.source
    card = load_localizer("where").card
    assert card.net == "plain8" and card.preprocessing.mean == view.mean and card.classes == tuple(COLORS)
    code, said, _ = run_cli("localize", "eval", "where", shapes, "--scale", 40, "--scale", 48, "--out", "e.json", "--device", "cpu")
    assert code == 0
    assert "dense 40 48" in said and "true class given" in said and "disc" in said
    assert json.loads(Path("e.json").read_text())["scales"] == [40, 48]


MISTAKES = {
    "no data": (["train", "--model", "resnet8"], "say what to train on and where to"),
    "nothing to start from": (
        ["train", "{data}", "--out", "o"],
        "give either net (--model), the name of a network, or init (--init)",
    ),
    "both": (["train", "{data}", "--out", "o", "--model", "resnet8", "--init", "x"], "give either net (--model)"),
    "jitter": (["train", "{data}", "--out", "o", "--model", "resnet8", "--jitter", "5"], "--jitter 5: write two sizes"),
    "small jitter": (
        ["train", "{data}", "--out", "o", "--model", "resnet8", "--jitter", "99,100"],
        "must be two sizes in px, 224 <= low <= high",
    ),
    "lr": (["train", "{data}", "--out", "o", "--model", "resnet8", "--lr", "0"], "schedule.lr"),
    "net": (["train", "{data}", "--out", "o", "--model", "resnt8"], "no network called 'resnt8'"),
    "there": (["train", "{data}", "--out", "{data}", "--model", "resnet8"], "is there already"),
    "here": (["train", "{data}", "--out", ".", "--model", "resnet8"], "--out .: a run makes its own folder"),
    "resume and more": (["train", "--resume", "o", "--model", "resnet8", "--lr", "1"], "leave out --lr, --model"),
    "resume nothing": (["train", "--resume", "o"], "is no run of localize train"),
    "scale": (["eval", "{run}", "{data}", "--scale", "8"], "scale 8: must be from 32"),
    "no test images": (["eval", "{run}", "{alone}"], "has neither test nor val images; --split train tests on"),
    "policy": (["crops", "{data}", "-o", "o", "--bad-boxes", "dorp"], "'--bad-boxes': ", "'dorp' is not one of 'drop', 'fail'"),
    "bad box, crops": (["crops", "{unsound}", "-o", "o"], "object 0: no area", "leave these objects out: --bad-boxes drop"),
    "bad box": (["train", "{unsound}", "--out", "o", "--model", "resnet8"], "no area", "reslearn doctor {unsound} --fix COPY"),
    "bad box, eval": (["eval", "{run}", "{unsound}"], "no area", "reslearn doctor {unsound} --fix COPY"),
    "classes": (["eval", "{run}", "{others}"], "has a class that the model does not know: ", "'ring'"),
    "split": (["eval", "{run}", "{data}", "--split", "tset"], "no split 'tset'; did you mean 'test'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str,
    run: Path,
    shapes: Path,
    sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: RunCli,
) -> None:
    monkeypatch.chdir(tmp_path)
    words, *said = MISTAKES[name]
    paths = {"data": shapes, "run": run, **sets}
    code, _, err = run_cli("localize", *(word.format(**paths) for word in words))
    assert code == 2
    assert all(each.format(**paths) in err for each in said) and err.count("\n") == 1 and not list(tmp_path.iterdir())
