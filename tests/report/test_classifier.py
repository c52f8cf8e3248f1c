"""Reports of classifiers: complete, minimal, unfinished and hostile run folders; the page shows the contents of the files."""

import ast
import base64
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

import reslearn.report
from pages import Page, assert_stands_alone
from reslearn.errors import UserError
from reslearn.report import write
from reslearn.report.classify import ClassificationResult, most_confused
from reslearn.report.plots import thinned
from reslearn.report.runs import RunRecord, column, open_folders, read_run
from reslearn.report.text import duration, recipe_rows

CLASSES = ["cat", "dog", "ship"]


def read(folders: list[Path]) -> list[RunRecord[ClassificationResult]]:
    return [read_run(folder, ClassificationResult) for folder in open_folders(folders)]


def numbers(classes: list[str], error: float) -> dict[str, Any]:
    """Metrics as evaluate writes them, with values that are easy to find on the page."""
    k = len(classes)
    confusion = [[80 if i == j else 3 + (5 * i + j) % 7 for j in range(k)] for i in range(k)]
    return {
        "n": sum(map(sum, confusion)),
        "loss": 0.4321,
        "top1_error": error,
        "top1_interval": [error - 1.11, error + 1.22],
        "calibration_error": 4.567,
        "calibration_bins": [
            {"low": 0.0, "high": 50.0, "n": 0, "confidence": None, "accuracy": None},
            {"low": 50.0, "high": 100.0, "n": 100, "confidence": 90.0, "accuracy": 85.4},
        ],
        "per_class": [
            {"class": name, "n": sum(confusion[i]), "accuracy": 100 * 80 / sum(confusion[i])} for i, name in enumerate(classes)
        ],
        "confusion": confusion,
    }


def result(classes: list[str], error: float) -> dict[str, Any]:
    return {
        "step": 640,
        "epochs": 9.5,
        "seconds": 7384.0,
        "images_per_s": 4321.0,
        "peak_memory_mb": 876.5,
        "parameters": 272474,
        "last": {"step": 640, "val": numbers(classes, error + 0.5), "test": numbers(classes, error)},
        "best": {"step": 480, "test": numbers(classes, error - 0.25)},
        "worst": [
            {
                "image": "images/worst-00.png",
                "name": "a.png",
                "label": classes[0],
                "predicted": classes[1],
                "loss": 9.87,
                "probability": 5.2e-05,
            },
            {
                "image": "images/gone.png",
                "name": "b.png",
                "label": classes[1],
                "predicted": classes[0],
                "loss": 8.76,
                "probability": 1.6e-04,
            },
        ],
        "worst_split": "test",
    }


def build(folder: Path, classes: list[str] = CLASSES, error: float = 12.34, **recipe: Any) -> Path:
    """A complete run folder."""
    (folder / "images").mkdir(parents=True)
    setup = {
        "recipe": {
            "name": "default",
            "seed": 3,
            "net": {"name": "resnet20", "shortcut": "A"},
            "optimizer": {"lr": 0.1, "nesterov": False},
            **recipe,
        },
        "command": "reslearn train pets --net resnet20",
        "data": {
            "name": "pets",
            "classes": classes,
            "fingerprint": "sha256:beef",
            "channels": 3,
            "sizes": [32, 30],
            "n": {"train": 8000, "val": 500, "test": 600},
            "left_out": {"unreadable": ["x.jpg"]},
        },
        "machine": {"device": "Abacus 9000", "threads": 4},
        "versions": {"reslearn": "0.1", "torch": "2.11"},
        "chose": ["net resnet20: images are 32x30 px"],
    }
    lines = []
    for step in range(10, 650, 10):
        error_now = 70 * 0.99**step + 5
        lines.append({"event": "train", "step": step, "epoch": step / 67, "lr": 0.1, "loss": error_now / 30, "error": error_now})
        if step % 160 == 0:
            lines.append({"event": "eval", "split": "val", "step": step, "epoch": step / 67, "loss": 1.0, "top1_error": 15.25})
    (folder / "recipe.json").write_text(json.dumps(setup))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps(result(classes, error)))
    Image.new("RGB", (32, 30), (200, 30, 30)).save(folder / "images" / "worst-00.png")
    Image.new("RGB", (320, 90), (30, 200, 30)).save(folder / "images" / "augmented.png")
    return folder


def unfinished(folder: Path, **recipe: Any) -> Path:
    build(folder, **recipe)
    (folder / "result.json").unlink()
    return folder


def test_complete_run(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    before = dict(matplotlib.rcParams)
    target = write([run], tmp_path / "deep" / "report.html")
    assert dict(matplotlib.rcParams) == before
    assert target == tmp_path / "deep" / "report.html"
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    page = Page(target)
    assert_stands_alone(page)
    assert "<title>run</title>" in page.source and "<h1>run</h1>" in page.source
    for words in (
        "12.34%",  # last
        "11.23 to 13.56%",
        "12.09%",  # best
        "12.84%",  # validation
        "4.57%",  # calibration
        "272,474 parameters",
        "8,000 images of 3 classes",
        "640 iterations (9.5 epochs)",
        "iteration 480",
        "2 h 3 min on Abacus 9000, at 4,321 images/s",
        "876 MB",
        "loss 9.87 p = 5.2e-05",
        "the network is overconfident",
        "net resnet20: images are 32x30 px",
        "reslearn train pets --net resnet20",
        "32 × 30",
        "sha256:beef",
        "unreadable: x.jpg",
        "optimizer.nesterov false",
        "torch 2.11",
    ):
        assert words in page.text, words
    assert "not finished" not in page.text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert [base64.b64decode(uri.partition(",")[2]) for uri in images] == [
        (run / "images" / name).read_bytes() for name in ("worst-00.png", "augmented.png")
    ]
    assert "no picture" in page.text
    assert page.count("svg") == 2
    assert all(word in page.text for word in ("error, %", "learning rate", "iteration"))  # text, not outlines


def test_analyses_are_in_the_report(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    (run / "analysis").mkdir()
    result = {"analysis": "responses", "command": "reslearn analyze responses run", "models": {"run": {}}, "findings": ["Little."]}
    (run / "analysis" / "responses.json").write_text(json.dumps(result))
    (run / "analysis" / "responses.png").write_bytes((run / "images" / "augmented.png").read_bytes())
    page = Page(write([run], tmp_path / "report.html"))
    assert_stands_alone(page)
    for words in ("Layer responses", "Little.", "reslearn analyze responses run"):
        assert words in page.text
    assert page.count("img") == 3
    (run / "analysis" / "responses.png").write_text("not a picture")
    assert Page(write([run], tmp_path / "report.html")).count("img") == 2


def test_confusion_matrix_and_classes_match_the_file(tmp_path: Path) -> None:
    page = Page(write([build(tmp_path / "run")], tmp_path / "page.html"))
    metrics = result(CLASSES, 12.34)["last"]["test"]
    cells = [attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    assert cells == [
        f"{true} predicted as {predicted}: {metrics['confusion'][i][j]}"
        for i, true in enumerate(CLASSES)
        for j, predicted in enumerate(CLASSES)
    ]
    for true, predicted, n, share in most_confused(metrics["confusion"], CLASSES):
        assert f"{true} {predicted} {n} {share:.2f}%" in page.text
    hardest_first = sorted(metrics["per_class"], key=lambda row: row["accuracy"])
    assert " ".join(f"{row['class']} {row['n']} {row['accuracy']:.2f}%" for row in hardest_first) in page.text


def test_most_confused() -> None:
    confusion = [[5, 2, 0], [3, 0, 2], [0, 0, 0]]
    pairs = most_confused(confusion, ["a", "b", "c"])
    assert pairs == [("b", "a", 3, 60.0), ("a", "b", 2, pytest.approx(200 / 7)), ("b", "c", 2, 40.0)]
    assert most_confused(confusion, ["a", "b", "c"], k=1) == pairs[:1]


def test_many_classes_have_pairs_but_no_matrix(tmp_path: Path) -> None:
    page = Page(write([build(tmp_path / "run", classes=[f"kind {i}" for i in range(61)])], tmp_path / "page.html"))
    assert "Confusion matrix" not in page.text
    assert "Most confused" in page.text
    assert "kind 60" in page.text


def test_several_runs(tmp_path: Path) -> None:
    runs = [
        build(tmp_path / "one"),
        build(tmp_path / "two", error=10.5, seed=4),
        unfinished(tmp_path / "three", seed=5, optimizer={"lr": 0.05}),
    ]
    page = Page(write(runs, tmp_path / "page.html"))
    assert_stands_alone(page)
    assert "3 runs compared" in page.text
    assert "two has the lowest test error: 10.50% (95% interval 9.39 to 11.72%)." in page.text
    assert "Over 2 seeds of one recipe, the test error is 11.42 ± 1.30%" in page.text
    assert "three has not finished: 640 iterations so far" in page.text
    drawn = page.source[page.source.index("<svg") : page.source.index("</svg>")]
    for i in range(3):  # as in Figure 6 of the paper: training dashed, validation bold
        assert re.search(rf"stroke-dasharray[^\"]*stroke: var\(--c{i}\)[;\"]", drawn)
        assert re.search(rf"stroke: var\(--c{i}\); stroke-width: 2[;\"]", drawn)
    assert "#" not in re.sub(r'[("]#curves-\w+', "", drawn)  # no matplotlib colors are left
    ids = re.findall(r' id="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))
    marked = re.findall(r'<tr class="differs"><th[^>]*>([^<]+)<', page.source)
    assert marked == ["seed", "optimizer.lr", "optimizer.nesterov"]


def test_different_data_is_a_warning(tmp_path: Path) -> None:
    runs = [build(tmp_path / "one"), build(tmp_path / "two", seed=4)]
    assert "were trained on different data" not in Page(write(runs, tmp_path / "page.html")).text
    setup = runs[1] / "recipe.json"
    setup.write_text(setup.read_text().replace("beef", "cafe"))
    text = Page(write(runs, tmp_path / "page.html")).text
    assert "were trained on different data" in text
    assert "seeds of one recipe" not in text


def test_folders_of_the_same_name_get_unique_labels(tmp_path: Path) -> None:
    runs = [build(tmp_path / "x" / "run"), build(tmp_path / "y" / "run"), build(tmp_path / "other")]
    assert [run.label for run in read(runs)] == ["x/run", "y/run", "other"]
    with pytest.raises(UserError, match="given twice"):
        read([runs[0], tmp_path / "x" / ".." / "x" / "run"])


def test_unfinished_runs(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    page = Page(write([run], tmp_path / "page.html"))
    assert "This run has not finished: 640 iterations so far." in page.text
    assert "latest validation error 15.25%" in page.text
    assert page.count("svg") == 1
    (run / "metrics.jsonl").write_text('{"event": "eval", "split": "val", "step": 0, "top1_error": 66.67}\n')
    assert "latest validation error 66.67%" in Page(write([run], tmp_path / "page.html")).text
    for nothing in ("", "\n"):
        (run / "metrics.jsonl").write_text(nothing)
        assert "no measurements yet" in Page(write([run], tmp_path / "page.html")).text
    (run / "metrics.jsonl").unlink()
    page = Page(write([run], tmp_path / "page.html"))
    assert "no measurements yet" in page.text
    assert page.count("svg") == 0


def test_minimal_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"recipe": {}}')
    done = {"step": 5, "epochs": 0.1, "seconds": 1.5, "last": {"step": 5, "val": {"n": 7, "top1_error": 28.571}}}
    (tmp_path / "result.json").write_text(json.dumps(done))
    page = Page(write([tmp_path], tmp_path / "report.html"))
    assert "Validation error after the last iteration: 28.57% (7 images). Training took 1.5 s." in page.text
    assert "None" not in page.text and "nan" not in page.text
    done["last"] = {"step": 5}
    (tmp_path / "result.json").write_text(json.dumps(done))
    assert "Training took 1.5 s." in Page(write([tmp_path], tmp_path / "report.html")).text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    classes = ["<b>bold</b>", '"><script>alert(1)</script>', "$x^{", "猫と犬", "a'b&amp;c"]
    hostile = "<img src=http:evil.example>"
    run = build(tmp_path / hostile, classes, name="</title><img src=http://evil.example/x>")
    page = Page(write([run, build(tmp_path / "{{ 7 * 7 }}", classes)], tmp_path / "page.html"))
    assert page.count("script") == 0
    assert not any(attributes.get("src", "").startswith("http") for _, attributes in page.tags)
    for name in [*classes, hostile, "{{ 7 * 7 }}", "</title><img src=http://evil.example/x>"]:
        assert name in page.text, name
    assert page.count("b") == 0
    page = Page(write([run], tmp_path / "page.html"))
    assert page.count("img") == 2  # the run's own
    assert page.text.count(hostile) == 2  # the title and the heading
    titles = {attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes}
    assert '"><script>alert(1)</script> predicted as 猫と犬: 4' in titles


@pytest.mark.parametrize("path", ["../secret.png", "images/notes.png", "images", ""])
def test_only_pictures_of_the_run_are_embedded(tmp_path: Path, path: str) -> None:
    run = build(tmp_path / "run")
    Image.new("RGB", (5, 5)).save(tmp_path / "secret.png")
    (run / "images" / "notes.png").write_text("private")
    document = json.loads((run / "result.json").read_text())
    document["worst"][0]["image"] = path
    (run / "result.json").write_text(json.dumps(document))
    page = Page(write([run], tmp_path / "page.html"))
    assert page.count("img") == 1  # the augmented sheet
    assert page.text.count("no picture") == 2


def test_truncated_last_line_is_ignored(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    complete = (run / "metrics.jsonl").read_bytes()
    truncated = '{"event": "train", "step": 650, "note": "é'.encode()
    for length in (1, 20, len(truncated), len(truncated) - 1):  # the last in the middle of a character
        (run / "metrics.jsonl").write_bytes(complete + truncated[:length])
        assert read([run])[0].step == 640


@pytest.mark.parametrize("line", ['{"event": "tr', "[1]", '{"event": "train", "step": "1"}', "\x00"])
def test_error_names_a_broken_line(tmp_path: Path, line: str) -> None:
    run = unfinished(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3: "):
        read([run])


def test_resumed_and_diverged_runs(tmp_path: Path) -> None:
    run = unfinished(tmp_path / "run")
    lines = [
        {"event": "train", "step": 1, "error": 90.0, "loss": 2.0},
        {"event": "train", "step": 3, "error": 11.0, "loss": 1.8},
        {"event": "train", "step": 2, "error": 70.0, "loss": float("nan")},
        {"event": "train", "step": 3, "error": None, "loss": float("inf")},
        {"event": "other"},
        {"event": "eval", "split": "test", "step": 3, "top1_error": 50.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = read([run])[0]
    errors = column(record.train, "error")
    assert column(record.train, "step").tolist() == [1, 2, 3]
    assert errors.tolist()[:2] == [90.0, 70.0] and np.isnan(errors[2])
    assert record.split == "test"
    assert "latest test error 50.00%" in Page(write([run], tmp_path / "page.html")).text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.json", None, "not a run folder: it has no recipe.json"),
        ("recipe.json", b"{", r"recipe\.json: invalid JSON"),
        ("recipe.json", b"[]", r"recipe\.json: "),
        ("recipe.json", b'{"recipe": 3}', r"recipe\.json: recipe: "),
        ("result.json", b"\xff\xfe", r"result\.json: invalid JSON"),
        ("result.json", b"{}", r"result\.json: step: "),
    ],
)
def test_error_names_a_broken_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    run = build(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        write([run], tmp_path / "page.html")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_error_names_an_invalid_confusion_matrix(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    document = json.loads((run / "result.json").read_text())
    document["last"]["test"]["confusion"][1].pop()
    (run / "result.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"result\.json: last\.test: .*not square"):
        read([run])


def test_other_user_errors(tmp_path: Path) -> None:
    run = build(tmp_path / "run")
    with pytest.raises(UserError, match="no such run folder"):
        write([tmp_path / "missing"], tmp_path / "page.html")
    with pytest.raises(UserError, match="at least one"):
        write([], tmp_path / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write([run], tmp_path / "folder")
    with pytest.raises(UserError, match="cannot write"):
        write([run], run / "recipe.json" / "page.html")
    assert not list(tmp_path.rglob("*.partial"))


def test_the_same_folders_give_the_same_bytes(tmp_path: Path) -> None:
    runs = [build(tmp_path / "one"), build(tmp_path / "two")]
    assert write(runs, tmp_path / "1.html").read_bytes() == write(runs, tmp_path / "2.html").read_bytes()


def test_pages_of_long_runs_stay_small(tmp_path: Path) -> None:
    runs = []
    for i in range(3):
        run = build(tmp_path / str(i), seed=i)
        noise = np.random.default_rng(i).uniform(5, 90, 8000)
        lines = [{"event": "train", "step": s, "lr": 0.1, "loss": e, "error": e} for s, e in enumerate(noise.tolist())]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        runs.append(run)
    assert write(runs, tmp_path / "page.html").stat().st_size < 400_000


def test_thinning_keeps_short_curves_and_averages_long_ones() -> None:
    step, value = np.arange(1000.0), np.random.default_rng(0).normal(size=1000)
    assert all(np.array_equal(a, b) for a, b in zip(thinned(step, value, 1000), (step, value), strict=True))
    few, means = thinned(step, value, 100)
    assert np.allclose(few, step.reshape(100, 10).mean(axis=1))
    assert np.allclose(means, value.reshape(100, 10).mean(axis=1))
    value[3] = np.nan
    assert len(thinned(step, value, 1000)[0]) == 999


def test_recipe_rows_and_durations() -> None:
    rows = recipe_rows([{"a": {"b": 1, "c": []}, "d": True}, {"a": {"b": 1.0}, "d": True}])
    assert rows == {"a.b": ["1", "1.0"], "a.c": ["none", None], "d": ["true", "true"]}
    durations = [duration(s) for s in (0.04, 59.94, 61, 3599.6, 7384)]
    assert durations == ["0.0 s", "59.9 s", "1 min 1 s", "1 h 0 min", "2 h 3 min"]


def test_imports_neither_torch_nor_other_packages_of_ours() -> None:
    """Reports read run folders only, so they import nothing else from reslearn but errors and files."""
    assert reslearn.report.__file__ is not None
    imported = set()
    for path in Path(reslearn.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.startswith("reslearn") and not name.startswith("reslearn.report")}
    assert ours == {"reslearn.errors", "reslearn.files"}
    assert not any(name.startswith(("torch", "matplotlib.pyplot")) for name in imported)
