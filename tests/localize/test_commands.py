"""reslearn localize, as it is called: from cut windows to errors; stopped and killed runs; mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reslearn
from reslearn import UserError, cli
from reslearn.data.annotated import open_boxes
from reslearn.data.preprocess import Preprocessing
from reslearn.localize import create_localizer, load_localizer, resume, train
from reslearn.localize.evaluate import errors, evaluate, predict
from reslearn.localize.train import Examples, make_plan
from reslearn.localize.views import Single, of_one_kind, view_of
from reslearn.weights.store import Card

TINY = {
    "net": "resnet8",
    "size": 32,
    "jitter": (32, 48),
    "batch": 8,
    "schedule": {"epochs": 12, "lr": 0.03, "shape": "cosine", "warmup": 0.1},
}
VIEW = Preprocessing(channels=3, size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)
COLOURS = {"disc": (220, 60, 40), "square": (40, 80, 220)}


def write_set(root: Path, counts: dict[str, int]) -> Path:
    """A COCO folder of noise with one red or blue box in each image, of random place and shape."""
    numbers = np.random.default_rng(0)
    for split, count in counts.items():
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            kind = i % 2
            pixels = numbers.integers(90, 150, (40, 52, 3)).astype(np.uint8)
            w, h = numbers.integers(14, 26, 2).tolist()
            x, y = int(numbers.integers(0, 52 - w)), int(numbers.integers(0, 40 - h))
            pixels[y : y + h, x : x + w] = [*COLOURS.values()][kind]
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            images.append({"id": i + 1, "file_name": f"{i}.png", "height": 40, "width": 52})
            annotations.append({"id": i + 1, "image_id": i + 1, "category_id": kind + 1, "bbox": [x, y, w, h]})
        kinds = [{"id": i, "name": name} for i, name in enumerate(COLOURS, 1)]
        document = {"images": images, "annotations": annotations, "categories": kinds}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("shapes") / "set", {"train": 64, "test": 30})


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has come to its end."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(shapes, folder, device="cpu", say=lambda line: None, **TINY)
    return folder


def localize(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reslearn", "localize", *map(str, words)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


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
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 12


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
        numbers = errors(scores, boxes, truth, model.classes)
        assert [numbers["true_class"]["error"], numbers["top1"]["error"]] == pytest.approx((100 * wrong.mean(axis=1)).tolist())


def test_five_guesses_where_there_are_more_classes() -> None:
    scores = np.tile(np.arange(7.0), (2, 1))  # 6, 5, 4, 3, 2 are guessed
    boxes = np.tile([0.0, 0, 1, 1], (2, 7, 1))
    found = errors(scores, boxes, Single(np.array([2, 1]), (boxes[0, :1], boxes[0, :1])), "abcdefg")
    assert [found[key]["error"] for key in ("true_class", "top1", "top5", "classification")] == [0, 100, 50, 100]
    assert found["per_class"][2] == {"class": "c", "n": 1, "error": 0.0} and found["per_class"][0]["error"] is None


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
    for pixels, boxes, label in zip(*first, strict=True):  # the box is where the colour is
        x1, y1, x2, y2 = boxes[0].round().int().tolist()
        colour = pixels[:, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].float().mean((1, 2))
        assert colour.argmax() == {0: 0, 1: 2}[int(label)] and colour.max() > 180


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_run_ends_with_the_same_weights(run: Path, shapes: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "stopped"
    code = f"from reslearn.localize import train; train({str(shapes)!r}, {str(out)!r}, device='cpu', **{TINY!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    until = time.monotonic() + 240
    while len(list((out / "checkpoints").glob("step-*"))) < 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode != 0 and not (out / "model.safetensors").exists(), said
    if number == signal.SIGTERM:
        assert "SIGTERM" in said
    resume(out, device="cpu", say=lambda line: None)
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert (out / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()


def test_from_a_classifier_by_command(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    view = VIEW
    reslearn.save(reslearn.create("plain8", 5), "c.safetensors", Card(net="plain8", classes=tuple("abcde"), preprocessing=view))
    words = ["train", shapes, "--init", "c.safetensors", "--out", "where", "--size", 32, "--epochs", 1, "--batch", 16]
    assert localize(monkeypatch, *words, "--jitter", "32,40", "--lr", 0.01, "--device", "cpu") == 0
    assert "true class given, 1 crop" in capsys.readouterr().out
    card = load_localizer("where").card
    assert card.net == "plain8" and card.preprocessing.mean == view.mean and card.classes == tuple(COLOURS)
    assert localize(monkeypatch, "eval", "where", shapes, "--scale", 40, "--scale", 48, "--out", "e.json", "--device", "cpu") == 0
    said = capsys.readouterr().out
    assert "dense 40 48" in said and "true class given" in said and "disc" in said
    assert json.loads(Path("e.json").read_text())["scales"] == [40, 48]


MISTAKES = {
    "no data": (["train", "--model", "resnet8"], "say what to train on and where to"),
    "nothing to start from": (["train", "{data}", "--out", "o"], "give either the name of a network or a model"),
    "both": (["train", "{data}", "--out", "o", "--model", "resnet8", "--init", "x"], "give either the name"),
    "jitter": (["train", "{data}", "--out", "o", "--model", "resnet8", "--jitter", "5"], "--jitter 5: write two sizes"),
    "small jitter": (
        ["train", "{data}", "--out", "o", "--model", "resnet8", "--jitter", "99,100"],
        "must be two sizes in px, 224 <= low <= high",
    ),
    "lr": (["train", "{data}", "--out", "o", "--model", "resnet8", "--lr", "0"], "schedule.lr"),
    "net": (["train", "{data}", "--out", "o", "--model", "resnt8"], "no network called 'resnt8'"),
    "there": (["train", "{data}", "--out", "{data}", "--model", "resnet8"], "is there already"),
    "resume and more": (["train", "--resume", "o", "--model", "resnet8", "--lr", "1"], "leave out --lr, --model"),
    "resume nothing": (["train", "--resume", "o"], "is no run of localize train"),
    "scale": (["eval", "{run}", "{data}", "--scale", "8"], "scale 8: must be from 32"),
    "split": (["eval", "{run}", "{data}", "--split", "tset"], "no split 'tset'; did you mean 'test'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str, run: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, said = MISTAKES[name]
    assert localize(monkeypatch, *(word.format(data=shapes, run=run) for word in words)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_run_is_of_its_data(run: Path, shapes: Path, tmp_path: Path) -> None:
    facts = json.loads((run / "localize.json").read_text())
    (tmp_path / "localize.json").write_text(json.dumps({**facts, "fingerprint": "0"}))
    with pytest.raises(UserError, match="is not the data that"):
        resume(tmp_path)
    (tmp_path / "localize.json").write_text(json.dumps({**facts, "plan": 3}))
    with pytest.raises(UserError, match="is damaged"):
        resume(tmp_path)
