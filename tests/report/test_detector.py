"""Reports of detectors: complete, unfinished, compared and mixed runs; the page shows the contents of the files."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from detection_runs import build, drawn_set
from pages import Page, assert_stands_alone
from reslearn.data.boxes.box_set import BoxSet
from reslearn.errors import UserError
from reslearn.report import write


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> BoxSet:
    return drawn_set(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def run(images: BoxSet, tmp_path: Path) -> Path:
    return build(tmp_path / "run", images, images)


def test_complete_run(run: Path, tmp_path: Path) -> None:
    page = Page(write([run], tmp_path / "page.html"))
    assert_stands_alone(page)
    result = json.loads((run / "result.json").read_text())
    test, review = result["last"]["test"], result["last"]["test"]["review"]
    low, high = test["intervals"]["AP"]
    for words in (
        f"Test AP after the last iteration: {test['AP']:.1f}% (95% interval {low:.1f} to {high:.1f}%; 12 images)",
        "A detector on resnet18 (15,000,000 parameters), trained on 205 images of 2 classes from bccd",
        "Training took 4 min 10 s on CPU, at 9.6 images/s, with a peak memory of 1,800 MB.",
        f"VOC 2007 AP at IoU 0.50, 11-point interpolation {test['VOC07']:.1f} ",
        "average precision, %",
        "rpn box reg",
        "precision, %, at IoU 0.75",
        "problems found no area: 2",
        "detector.min_size 240",
        "size 240: the median box is 102 px of 480",
        "Test images with objects and detections",
    ):
        assert words in page.text, words
    for row, best in zip(test["per_class"], review["thresholds"], strict=True):
        assert f"{row['class']} {row['objects']} {row['AP']:.1f} {row['AP50']:.1f} {row['AP75']:.1f}" in page.text
        assert f"{best['score']:.2f} P {best['precision']:.1f}, R {best['recall']:.1f}" in page.text
    for kind, n in review["mistakes"]["kept"].items():
        assert re.search(rf"{kind} [a-z0-9 ,.IoU]+ {n} {review['mistakes']['all'][kind]} ", page.text), kind
    gallery = result["gallery"]
    assert len(gallery) > 10 and {"image", "missed"} < {picture["kind"] for picture in gallery}
    shown = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(shown) == len(gallery) and all(source.startswith("data:image/jpeg;base64,") for source in shown)
    first = gallery[0]
    assert f"{first['kind']} detection: {first['label']}, {first['score']:.2f}" in page.text
    assert page.count("svg") == 3 and "None" not in page.text and "nan" not in page.text
    ids = re.findall(r' id="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))


def test_masks_and_example_detections(run: Path, tmp_path: Path) -> None:
    without = Page(write([run], tmp_path / "without.html"))
    assert "mask" not in without.text and "Evenly spaced" not in without.text
    result = json.loads((run / "result.json").read_text())
    masks = {**result["last"]["test"], "AP": 12.34, "AP50": 45.67, "intervals": {"AP": [10.0, 15.0]}}
    result["last"]["test"]["masks"] = masks
    result["examples"] = [{"image": result["gallery"][0]["image"], "name": "slide <7>"}]
    (run / "result.json").write_text(json.dumps(result))
    page = Page(write([run], tmp_path / "page.html"))
    assert_stands_alone(page)
    for words in (
        "Mask AP: 12.3% (95% interval 10.0 to 15.0%), 45.7% at IoU 0.5.",
        "test mask AP 12.3% 10.0 to 15.0% (95%)",
        "test, last test, last, masks validation, last",
        "Detections Evenly spaced test images",
        "slide <7>",
    ):
        assert words in page.text, words
    assert page.count("img") == without.count("img") + 1


def test_unfinished_and_minimal_runs(run: Path, tmp_path: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    del result["gallery"], result["best"], result["gallery_split"]
    for split in ("val", "test"):
        del result["last"][split]["review"]
    (run / "result.json").write_text(json.dumps(result))
    page = Page(write([run], tmp_path / "page.html"))
    assert "By class and size" in page.text and "Precision and recall" not in page.text and page.count("img") == 0
    (run / "result.json").unlink()
    page = Page(write([run], tmp_path / "page.html"))
    assert "This run has not finished: 600 iterations so far." in page.text
    assert "latest validation AP50 77.3%" in page.text and page.count("svg") == 2
    (run / "metrics.jsonl").unlink()
    assert "No measurements yet." in Page(write([run], tmp_path / "page.html")).text


def test_several_runs(run: Path, images: BoxSet, tmp_path: Path) -> None:
    other = build(tmp_path / "other", images, images, name="plain", net="plain34", skill=0.6)
    (third := build(tmp_path / "third", images, images)).joinpath("result.json").unlink()
    page = Page(write([run, other, third], tmp_path / "page.html"))
    assert_stands_alone(page)
    first, second = (json.loads((folder / "result.json").read_text())["last"]["test"] for folder in (run, other))
    assert first["AP"] > second["AP"]
    for words in (
        "3 detectors compared",
        "3 detectors, 2 of them finished. run has the highest test AP: ",
        "third has not finished",
        f"other plain34, 15.0 M parameters {second['AP']:.1f} ",
        f"cell {first['per_class'][0]['AP']:.1f} {second['per_class'][0]['AP']:.1f} –",
    ):
        assert words in page.text, words
    marked = re.findall(r'<tr class="differs"><th[^>]*>([^<]+)<', page.source)
    assert marked == ["name", "net.name"]
    assert re.search(r"stroke: var\(--c1\); stroke-width: 1.8", page.source)  # the second's precision over recall
    ids = re.findall(r' id="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))


def test_several_seeds(run: Path, images: BoxSet, tmp_path: Path) -> None:
    other = build(tmp_path / "other", images, images, skill=0.8)
    assert "seeds" not in Page(write([run, other], tmp_path / "page.html")).text
    document = json.loads((other / "recipe.json").read_text())
    document["recipe"]["seed"] = 1
    (other / "recipe.json").write_text(json.dumps(document))
    results = [json.loads((folder / "result.json").read_text())["last"]["test"] for folder in (run, other)]
    values = {key: [result[key] for result in results] for key in ("AP", "AP50", "AP75")}
    assert len(set(values["AP"])) == 2
    means = ", ".join(f"{key} is {mean(pair):.1f} ± {stdev(pair):.1f}%" for key, pair in values.items())
    sentence = f"Over 2 seeds of one recipe, the test {means} (mean ± standard deviation)."
    assert sentence in Page(write([run, other], tmp_path / "page.html")).text
    document["recipe"]["net"]["name"] = "plain18"
    (other / "recipe.json").write_text(json.dumps(document))
    assert "seeds" not in Page(write([run, other], tmp_path / "page.html")).text, "more than the seed differs"


def test_detectors_and_classifiers_cannot_share_a_report(run: Path, tmp_path: Path) -> None:
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    (classifier / "recipe.json").write_text('{"recipe": {}}')
    with pytest.raises(UserError, match=r"different tasks cannot share a report: classifier \(classify\), run \(detect\)"):
        write([classifier, run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_hostile_names_and_many_classes(images: BoxSet, tmp_path: Path) -> None:
    hostile = ("<b>bold</b>", '"><script>alert(1)</script>', *(f"kind {i}" for i in range(10)))
    many = BoxSet(images.name, hostile, images.images)
    page = Page(write([build(tmp_path / "run", many, many)], tmp_path / "page.html"))
    assert page.count("script") == 0 and '"><script>alert(1)</script>' in page.text
    assert "The bold curve is the mean over classes; gray curves are single classes." in page.text
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace("loss_classifier", "<script>$x^{"))
    page = Page(write([tmp_path / "run"], tmp_path / "page.html"))
    assert page.count("script") == 0 and "objectness" in page.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery": [{"kind": "missed"}]}, r"result\.json: gallery\.0\.image: "),
        ({"last": {"step": 5, "test": {"n": 3}}}, r"result\.json: last\.test\.AP: "),
        ({"epochs": None}, r"result\.json: epochs: "),
    ],
)
def test_error_names_a_broken_result(run: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    document = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(document | change))
    with pytest.raises(UserError, match=message):
        write([run], tmp_path / "page.html")


def test_pictures_outside_the_run_folder_are_not_embedded(run: Path, tmp_path: Path) -> None:
    document = json.loads((run / "result.json").read_text())
    (tmp_path / "secret.jpg").write_bytes((run / document["gallery"][0]["image"]).read_bytes())
    document["gallery"] = [document["gallery"][0] | {"image": "../secret.jpg"}]
    (run / "result.json").write_text(json.dumps(document))
    page = Page(write([run], tmp_path / "page.html"))
    assert page.count("img") == 0 and "no picture" in page.text


def test_real_photos(real_data: Path, tmp_path: Path) -> None:
    from reslearn.data.boxes.read import open_boxes

    sets = open_boxes(real_data / "bccd", bad="drop", only=["test"])
    page = Page(write([build(tmp_path / "run", sets["test"], sets["test"])], tmp_path / "page.html"))
    assert "Platelets 69 " in page.text and page.count("img") == 28
    assert len(page.source) < 3_000_000
