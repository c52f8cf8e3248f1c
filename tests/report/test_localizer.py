"""Reports of localizers: complete, unfinished, compared and mixed runs; the page shows the contents of the files."""

import json
import re
from pathlib import Path

import pytest

from localization_runs import build
from pages import Page, assert_stands_alone
from reslearn.errors import UserError
from reslearn.report import write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("painted") / "cells"


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    return build(tmp_path / "where", data)


def test_complete_run(run: Path, tmp_path: Path) -> None:
    page = Page(write([run], tmp_path / "page.html"))
    assert_stands_alone(page)
    result = json.loads((run / "result.json").read_text())
    test = result["last"]["test"]
    crop, dense = test["1-crop"]["true_class"], test["dense"]["true_class"]
    low, high = dense["interval"]
    for words in (
        "A localizer on resnet8 (1,234,567 parameters), trained on 16 images of 2 classes from cells, for 96 iterations",
        f"Test localization error with the true class given: {dense['error']:.2f}% (95% interval {low:.2f} to {high:.2f}%; "
        f"40 images; dense), {crop['error']:.2f}% (one crop).",
        f"With the predicted class: {test['dense']['top1']['error']:.2f}%",
        "Training took 4 min 10 s on CPU, at 3.1 images/s, with a peak memory of 900 MB.",
        "Loss terms",
        "scores",
        "localization error, %",
        "learning rate",
        "test, one crop test, dense validation, one crop validation, dense",
        f"class only {test['1-crop']['classification']['error']:.2f}%",
        "its shorter side scaled to 37 px",
        "images, %, by overlap",
        "Test images (dense) with objects",
        "images train: 16, val: 10, test: 40",
        "schedule.epochs 12",
        "stage proposals",
        "seed 0",
        "processor Abacus 9000",
        "9 anchors: fitted to the boxes",
        "reslearn.train() in Python",
    ):
        assert words in page.text, words
    for one_crop, full in zip(test["1-crop"]["per_class"], test["dense"]["per_class"], strict=True):
        low, high = one_crop["interval"]
        row = f"{one_crop['class']} 20 {one_crop['error']:.2f}% {low:.2f} to {high:.2f}% {full['error']:.2f}%"
        assert row in page.text, row
    assert {picture["kind"] for picture in result["gallery"]} == {"worst", "right"}
    for picture in result["gallery"]:
        predicted = "" if picture["predicted"] == picture["label"] else f" predicted as {picture['predicted']}"
        assert f"{picture['label']} IoU {picture['iou']:.2f}{predicted} {picture['name']} " in page.text
    shown = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(shown) == len(result["gallery"]) + 1 and all(source.startswith("data:image/jpeg;base64,") for source in shown)
    assert page.count("svg") == 3 and "None" not in page.text and "nan" not in page.text
    ids = re.findall(r' id="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))


def test_the_histogram_shows_the_images_by_overlap(run: Path, tmp_path: Path) -> None:
    """Wrong images are orange and correct ones blue."""
    result = json.loads((run / "result.json").read_text())
    result["last"]["test"]["dense"]["true_class"]["right_by_iou"] = [100.0] * 15 + [50.0] * 5 + [25.0]
    (run / "result.json").write_text(json.dumps(result))
    source = write([run], tmp_path / "page.html").read_text()
    histogram = source[: source.index("images, %, by overlap")]
    heights: dict[str, list[float]] = {}
    for path, color in re.findall(r'<path d="([^"]+)"[^>]*style="fill: var\(--(c[01])\); opacity', histogram):
        rows = [float(y) for _, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]
        heights.setdefault(color, []).append(max(rows) - min(rows))
    top = max(heights["c1"] + heights["c0"])
    assert len(heights["c1"]) == len(heights["c0"]) == 10 and max(heights["c1"]) == 0
    assert [round(height / top, 2) for height in heights["c0"]] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1]


def test_unfinished_and_minimal_runs(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    minimal = {key: value for key, value in result.items() if not key.startswith("gallery")} | {"last": {"step": 96}, "best": None}
    (run / "result.json").write_text(json.dumps(minimal))
    page = Page(write([run], tmp_path / "page.html"))
    assert "Localization error" not in page.text and (page.count("svg"), page.count("img")) == (2, 1)
    (run / "result.json").unlink()
    page = Page(write([run], tmp_path / "page.html"))
    assert "This run has not finished: 96 iterations so far." in page.text
    assert "iterations so far 96 latest validation localization error 16.15%" in page.text
    assert "latest training loss, scores 0.1408 latest training loss, boxes 0.0272" in page.text
    (run / "metrics.jsonl").unlink()
    assert "No measurements yet." in Page(write([run], tmp_path / "page.html")).text


def test_both_stages_and_an_unfinished_run(run: Path, data: Path, tmp_path: Path) -> None:
    refined = build(tmp_path / "refined", data, stage="regions", skill=1.5, seed=3)
    single = Page(write([refined], tmp_path / "single.html")).text
    assert "The second stage (R-CNN) of a localizer on resnet8" in single and "regions proposed by the first stage" in single
    (third := build(tmp_path / "third", data)).joinpath("result.json").unlink()
    page = Page(write([run, refined, third], tmp_path / "page.html"))
    assert_stands_alone(page)
    first, second = (json.loads((folder / "result.json").read_text())["last"]["test"] for folder in (run, refined))
    runs = {"where": first, "refined": second}
    views = {"1-crop": "one crop", "dense": "dense", "refined": "dense, then R-CNN"}
    errors = [(test[view]["true_class"]["error"], run, views[view]) for run, test in runs.items() for view in views if view in test]
    best, label, view = min(errors)
    for words in (
        "3 localizers compared",
        f"3 localizers, 2 of them finished. {label} has the lowest test localization error: {best:.2f}% (95% interval ",
        f"; {view}).",
        "third has not finished",
        "refined resnet8, second stage (R-CNN), 1.2 M parameters",
        f"disc {first['dense']['per_class'][0]['error']:.2f}% {second['refined']['per_class'][0]['error']:.2f}% –",
    ):
        assert words in page.text, words
    assert re.findall(r'<tr class="differs"><th[^>]*>([^<]+)<', page.source) == ["seed", "stage"]
    ids = re.findall(r' id="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))


def test_hostile_names(data: Path, tmp_path: Path) -> None:
    hostile = ("<b>bold</b>", '"><script>alert(1)</script>')
    page = Page(write([build(tmp_path / "run", data, classes=hostile)], tmp_path / "page.html"))
    assert page.count("script") == page.count("b") == 0 and all(name in page.text for name in hostile)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("result.json", {"gallery": [{"image": "x"}]}, r"result\.json: gallery\.0\.kind: "),
        ("result.json", {"last": {"step": 96, "test": {"n": 3, "1-crop": {}}}}, r"result\.json: last\.test\.1-crop\.true_class: "),
        ("result.json", {"step": None}, r"result\.json: step: "),
        ("recipe.json", {"recipe": 3}, r"recipe\.json: recipe: "),
    ],
)
def test_error_names_a_broken_file(run: Path, tmp_path: Path, file: str, change: dict[str, object], message: str) -> None:
    (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | change))
    with pytest.raises(UserError, match=message):
        write([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
