"""reslearn detect eval, compare, ladder and predict: output, files and errors."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import RunCli, run_reslearn
from detect.small import TINY, detector
from drawing import draw_images
from reslearn import UserError, create, train
from reslearn.data.boxes.masks import draw, parse
from reslearn.data.boxes.source import to_tensor
from reslearn.data.preprocess import Preprocessing
from reslearn.detect import create_detector, detect, save_detector
from reslearn.weights.store import Card, save

CATEGORIES = [{"id": 3, "name": "class 1"}, {"id": 7, "name": "class 2"}, {"id": 8, "name": "class 3"}]
SIZES = {"a.png": (48, 64), "b.png": (64, 40), "c.png": (56, 56)}  # height, width


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_detector(detector(), tmp_path_factory.mktemp("models") / "one.safetensors")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_detector(detector(seed=1, masks=True), tmp_path_factory.mktemp("models") / "masked.safetensors")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images, one without objects and one with a mask each, whose file is set/set.json."""
    return write_set(tmp_path / "set")


def write_set(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (height, width) in SIZES.items():
        Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8)).resize((width, height)).save(folder / name)
    boxes = [(1, 3, [4, 5, 20, 22]), (1, 7, [30, 10, 25, 30]), (2, 8, [3, 30, 30, 30]), (2, 3, [10, 2, 12, 14])]
    annotations = [
        {
            "id": i, "image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for i, (image, category, (x, y, w, h)) in enumerate(boxes, 1)
    ]  # fmt: skip
    images = [{"id": i, "file_name": name, "height": h, "width": w} for i, (name, (h, w)) in enumerate(SIZES.items(), 1)]
    document = {"images": images, "categories": CATEGORIES, "annotations": annotations} | changes
    (folder / "set.json").write_text(json.dumps(document))
    return folder / "set.json"


def coco_eval(data: Path, results: Path, kind: str) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data))
        judged = COCOeval(truth, truth.loadRes(str(results)), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return [100 * value for value in judged.stats]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools' own code
def test_pycocotools_computes_the_same_numbers_from_the_results_of_eval(
    masked: Path, data: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    out = tmp_path / "results.json"
    code, printed, err = run_cli("detect", "eval", masked, data, "--json", "--out", out)
    assert code == 0, err
    numbers = json.loads(printed)
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    for kind, ours in (("bbox", numbers), ("segm", numbers["masks"])):
        theirs = coco_eval(data, out, kind)
        for name, value in zip(names, theirs, strict=True):
            assert ours[name] == (None if value == -100 else pytest.approx(value, abs=1e-9)), (kind, name)
    assert numbers["AR100"] > 0  # there is something to compare
    assert {row["category_id"] for row in json.loads(out.read_text())} <= {3, 7, 8}
    assert numbers["n"] == 3 and numbers["objects"] == 4 and numbers["left_out"] == {} and numbers["seconds_per_image"] > 0
    assert set(numbers["mistakes"]) == {"class", "location", "both", "duplicate", "background", "missed"}
    code, _, err = run_cli("detect", "eval", masked, data, "--out", out)
    assert code == 2 and err == f"reslearn: --out {out}: already exists: choose another name, or remove it\n"


def test_eval_prints_headlines_classes_and_error_types(model: Path, data: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("detect", "eval", model, model, data, "--refinement", "--scales", "32,48")
    assert code == 0
    assert out.startswith("set, 3 images, 4 objects, ") and " ms per image\n" in out
    for words in ("AP50, IoU 0.50", "VOC07, 11 recalls", "95% interval", "boxes by class", "class 3", "missed object"):
        assert words in out
    assert "masks" not in out


def test_eval_uses_the_ensemble_and_improvements_of_detect(model: Path, data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    other = save_detector(detector(seed=3), tmp_path / "other.safetensors")
    out = tmp_path / "both.json"
    assert run_cli("detect", "eval", model, other, data, "--refinement", "--scales", "32,48", "--out", out)[0] == 0
    image = to_tensor(np.asarray(Image.open(data.parent / "b.png")).copy())
    direct = detect([detector(), detector(seed=3)], [image], refinement=True, scales=(32, 48))[0]
    rows = [row for row in json.loads(out.read_text()) if row["image_id"] == 2]
    boxes = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, direct["boxes"])
    assert [row["category_id"] for row in rows] == [(3, 7, 8)[label - 1] for label in direct["labels"]] and len(rows) > 1


def test_compare_is_the_difference_of_two_evals(model: Path, data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    other = save_detector(detector(seed=3), tmp_path / "other.safetensors")
    one, two = (json.loads(run_cli("detect", "eval", m, data, "--json")[1]) for m in (model, other))
    found = json.loads(run_cli("detect", "compare", model, other, data, "--json")[1])
    for key in ("AP", "AP50", "AP75"):
        numbers = found["numbers"][key]
        assert numbers["difference"] == pytest.approx(two[key] - one[key]) and len(numbers["interval"]) == 2
    code, out, _ = run_cli("detect", "compare", model, model, data)
    assert code == 0 and "+0.00" in out and "0.00 to 0.00" in out and "B - A" in out


@pytest.mark.parametrize("context", [False, True])
def test_ladder_has_the_rungs_of_table_9(
    context: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    one, two = (save_detector(detector(seed=s, context=context), tmp_path / f"{s}.safetensors") for s in (0, 1))
    found = json.loads(run_cli("detect", "ladder", one, data, "--with", two, "--json")[1])
    assert found["scales"] == [21, 32, 43, 53] and found["context"] is context  # 400 to 1000 for 600: for 32; not 11
    rungs = {row["name"]: row for row in found["rungs"]}
    assert list(rungs) == ["baseline", "+ box refinement", "+ context", "+ multi-scale testing", "ensemble"]
    scales = ["--scales", "21,32,43,53"]
    options = {
        "baseline": [one],
        "+ box refinement": [one, "--refinement"],
        "+ multi-scale testing": [one, "--refinement", *scales],
        "ensemble": [one, two, "--refinement", *scales],
    }
    before = None
    for name, words in options.items():
        row = rungs[name]
        models, rest = [w for w in words if isinstance(w, Path)], [w for w in words if not isinstance(w, Path)]
        alone = json.loads(run_cli("detect", "eval", *models, data, *rest, "--json")[1])
        assert row["AP50"] == pytest.approx(alone["AP50"]) and row["AP"] == pytest.approx(alone["AP"])
        assert row["seconds_per_image"] > 0
        if before:
            assert row["gain"]["AP"]["difference"] == pytest.approx(row["AP"] - before["AP"])
            low, high = row["gain"]["AP"]["interval"]
            assert low <= high
        before = row
    assert rungs["baseline"]["gain"] is None and rungs["+ context"]["AP"] is None
    assert rungs["+ multi-scale testing"]["paper"] == {"AP50": 53.8, "AP": 32.5, "of": "COCO val"}
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run_cli("detect", "ladder", one, data, "--scales", "32,48")
    assert code == 0 and "at 32, 48 px" in out and "ensemble" not in out and "53.8" in out and "32.5" in out
    assert "…" not in out  # nothing is cut in a narrow terminal
    assert f"trained with{'' if context else 'out'} it" in out


def test_predict_saves_annotated_images_and_skips_invalid_files(masked: Path, data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    folder, out = data.parent, tmp_path / "drawn"
    Image.open(folder / "a.png").convert("L").save(folder / "gray.webp")
    (folder / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (3000, 3)).save(folder / "thin.png")
    files = [folder / "a.png", folder / "broken.jpg", folder / "thin.png", folder / "gray.webp"]
    code, printed, err = run_cli("detect", "predict", masked, *files, "--out", out, "--score", "0.1")
    lines = printed.splitlines()
    assert code == 2 and err.startswith("reslearn: 2 of 4 files could not be read: ") and "broken.jpg" in err
    assert len(lines) == 4 and "class " in lines[0] and "%" in lines[0] and "not an image" in lines[1]
    assert "3000 x 3 px: too elongated" in lines[2]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "gray.webp.png"]
    plain, drawn = (np.asarray(Image.open(path)) for path in (folder / "a.png", out / "a.png"))
    (folder / "thin.png").unlink()
    factor = drawn.shape[0] // plain.shape[0]
    assert drawn.shape == (48 * factor, 64 * factor, 3) and (drawn != plain.repeat(factor, 0).repeat(factor, 1)).any()
    code, printed, err = run_cli("detect", "predict", masked, files[0], "--out", out)
    assert code == 2 and not printed and "a.png already exists" in err
    assert run_cli("detect", "predict", masked, folder / "a.png", "--score", "1")[1].endswith("  no detections\n")


def test_predict_gives_boxes_in_the_upright_image(masked: Path, tmp_path: Path, run_cli: RunCli) -> None:
    rng = np.random.default_rng(0)
    stored = Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8)).resize((72, 48))
    exif = Image.Exif()
    exif[274] = 6  # to be turned: upright it is 72 high and 48 wide
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(stored.transpose(Image.Transpose.ROTATE_270)).copy()
    direct = detector(seed=1, masks=True)([to_tensor(upright)])[0]
    code, out, _ = run_cli("detect", "predict", masked, tmp_path / "turned.png", "--json", "--score", "0")
    found = json.loads(out)
    assert code == 0 and found["file"] == str(tmp_path / "turned.png")
    rows = found["detections"]
    torch.testing.assert_close(torch.tensor([row["box"] for row in rows]), direct["boxes"].detach(), atol=0.006, rtol=0)
    assert [row["class"] for row in rows] == [f"class {label}" for label in direct["labels"]] and rows
    for row, mask in zip(rows, direct["masks"], strict=True):
        runs = parse(row["segmentation"], 72, 48) if mask.gt(0.5).any() else None
        assert runs is None or (draw(runs, 72, 48) == (mask[0] > 0.5).numpy()).all()
    target = tmp_path / "found.json"
    code, out, _ = run_cli("detect", "predict", masked, tmp_path / "turned.png", "--coco", target, "--score", "0")
    entries = json.loads(target.read_text())
    assert (
        code == 0
        and f"wrote {target}" in out
        and [e["score"] for e in entries] == pytest.approx([r["score"] for r in rows], abs=1e-6)
    )
    x, y, w, h = entries[0]["bbox"]
    assert [x, y, x + w, y + h] == pytest.approx(rows[0]["box"], abs=0.006)
    assert entries[0]["image_id"] == 1 and entries[0]["file_name"].endswith("turned.png")


def test_annotated_files_with_the_same_name_keep_their_folders(model: Path, tmp_path: Path, run_cli: RunCli) -> None:
    draw_images(tmp_path / "photos", classes=["cat", "dog"], each=1, size=(40, 40))
    out = tmp_path / "drawn"
    assert run_cli("detect", "predict", model, tmp_path / "photos", "--out", out)[0] == 0
    names = sorted(str(path.relative_to(tmp_path / "photos")) for path in (tmp_path / "photos").rglob("*.png"))
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == names and len(names) == 2


def test_images_without_detections_are_evaluated(data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    blind = save_detector(detector(score=0.999, masks=True), tmp_path / "blind.safetensors")
    code, out, _ = run_cli("detect", "eval", blind, data, "--json", "--out", tmp_path / "none.json")
    numbers = json.loads(out)
    assert code == 0 and numbers["AP"] == numbers["masks"]["AP"] == 0 and numbers["mistakes"]["missed"] == 4
    assert json.loads((tmp_path / "none.json").read_text()) == []
    assert run_cli("detect", "ladder", blind, data)[0] == 0
    assert run_cli("detect", "eval", blind, data)[0] == 0


def test_a_detector_of_gray_images_and_a_run_folder(tmp_path: Path, data: Path, run_cli: RunCli) -> None:
    """The run has left out bad boxes, and so does its evaluation."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    save_detector(detector(channels=1), run_folder / "model.safetensors")
    document = json.loads(data.read_text())
    document["annotations"][0]["bbox"][2] = 0
    data.write_text(json.dumps(document))
    code, _, err = run_cli("detect", "eval", run_folder, data)
    assert code == 2 and "set.json object 0: no area" in err and "out with --bad-boxes drop)" in err
    (run_folder / "recipe.json").write_text(json.dumps({"source": str(data), "recipe": {"data": {"bad": "drop"}}}))
    code, out, _ = run_cli("detect", "eval", run_folder, data)
    assert code == 0 and "left out or cut: no area 1" in out
    assert run_cli("detect", "eval", run_folder, data, "--bad-boxes", "fail")[0] == 2
    assert run_cli("detect", "predict", run_folder, data.parent)[0] == 0


def test_evaluating_on_training_images_is_noted(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(model.read_bytes())
    (folder / "recipe.json").write_text(json.dumps({"source": str(data), "recipe": {"data": {"train": "train"}}}))
    note = "trained on 3 of these 3 images: AP on new images is lower\n"
    monkeypatch.setenv("COLUMNS", "100")
    for words, trained in ((["eval", model, folder], 3), (["compare", model, folder], [0, 3]), (["ladder", folder], 3)):
        found = json.loads(run_cli("detect", *words, data, "--json")[1])
        assert found["trained_on"] == trained
        out = run_cli("detect", *words, data)[1]
        assert f"note: {'B: ' * (words[0] == 'compare')}{note}" in out and out.count(note) == 1
    assert json.loads(run_cli("detect", "eval", model, data, "--json")[1])["trained_on"] == 0
    assert "note" not in run_cli("detect", "eval", model, data)[1]


@pytest.mark.parametrize("command, remedy", [
    (["detect", "train"], "--bad-boxes drop"),
    (["localize", "crops", "-o", "new"], "--bad-boxes drop"),
    (["localize", "train", "--model", "resnet8", "--out", "new"], "reslearn doctor SET --fix COPY"),
    (None, "data.bad=drop"),
])  # fmt: skip
def test_errors_about_invalid_boxes_name_the_option_to_drop_them(
    command: list[str] | None, remedy: str, data: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli,
) -> None:  # fmt: skip
    document = json.loads(data.read_text())
    document["annotations"][0]["bbox"][2] = 0
    data.write_text(json.dumps(document))
    monkeypatch.chdir(tmp_path)
    if command is None:
        with pytest.raises(UserError) as error:
            train(data, model="resnet8", task="detect", out="new")
        said = f"{error.value}\n"
    else:
        said = run_cli(*command, data).err
    assert said.endswith(f"(fix the objects, or leave them out with {remedy.replace('SET', str(data))})\n")
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("words, said", [
    (["eval", "MODEL", "nowhere"], "nowhere: there is no such folder or .json file"),
    (["eval", "MODEL", "DATA", "--split", "test"], "no split 'test'; known: all"),
    (["eval", "MODEL", "DATA", "--scales", "48"], "two or more shorter sides"),
    (["eval", "MODEL", "DATA", "--scales", "8,100000"], "scales=(8, 100000): 8 is out of range: use 16 to 4096 px"),
    (["ladder", "MODEL", "DATA", "--scales", "32,4097"], "4097 is out of range: use 16 to 4096 px"),
    (["compare", "MODEL", "MODEL", "DATA", "--scales", "0,32"], "0 is out of range: use 16 to 4096 px"),
    (["predict", "MODEL", "set/a.png", "--scales", "15,32"], "15 is out of range: use 16 to 4096 px"),
    (["eval", "MODEL", "DATA", "--scales", "a,b"], "write integers separated by commas"),
    (["eval", "MODEL", "DATA", "--out", "no/where.json"], "there is no folder no"),
    (["eval", "MODEL", "MASKED", "DATA"], "must all have masks, or none"),
    (["eval", "MODEL", "GRAY", "DATA"], "must all take gray images or all take color"),
    (["compare", "MODEL", "TWO", "DATA"], "have different classes: class 1, class 2, class 3; and class 1, class 2"),
    (["eval", "MODEL"], "DATA is missing: reslearn detect eval "),
    (["compare", "MODEL", "DATA"], "Missing argument"),
    (["eval", "TWO", "DATA"], "unknown class"),
    (["eval", "CLASSIFIER", "DATA"], "holds a classification network, not a detector"),
    (["predict", "CLASSIFIER", "set/a.png"], "holds a classification network, not a detector"),
    (["predict", "MODEL", "set/a.png", "--json", "--coco", "x.json"], "choose --json or --coco"),
    (["predict", "MODEL", "set/a.png", "--score", "2"], "--score"),
    (["predict", "MODEL", "set/a.png", "--out", "set/set.json"], "is a file, not a folder"),
    (["predict", "MODEL", "set/a.png", "--out", "set"], "a.png already exists"),
    (["predict", "MODEL", "set/a.png", "./set/../set/a.png", "--out", "new"], "give each image once"),
    (["ladder", "MODEL", "DATA", "--device", "tpu"], "no device 'tpu'"),
])  # fmt: skip
def test_invalid_input_gives_a_one_line_error_and_writes_nothing(
    words: list[str], said: str, model: Path, masked: Path, data: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli,
) -> None:  # fmt: skip
    names = {"MODEL": model, "MASKED": masked, "DATA": data}
    if "TWO" in words:
        names["TWO"] = save_detector(detector(classes=2), tmp_path / "two.safetensors")
    if "GRAY" in words:
        names["GRAY"] = save_detector(detector(channels=1), tmp_path / "gray.safetensors")
    if "CLASSIFIER" in words:
        view = Preprocessing(channels=3, size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
        card = Card(net="resnet8", classes=("a", "b"), preprocessing=view)
        names["CLASSIFIER"] = save(create("resnet8", 2), tmp_path / "classifier.safetensors", card)
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    code, out, err = run_cli("detect", *(names.get(word, word) for word in words))
    assert code == 2 and not out and said in err and err.count("\n") == 1 and err.startswith("reslearn: ")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_real_process_on_real_photos(real_data: Path, tmp_path: Path) -> None:
    """On blood cells, whose VOC set has boxes without area in other splits than this one."""
    torch.manual_seed(0)
    model = create_detector("resnet8", ["Platelets", "RBC", "WBC"], anchors=(8, 16), **TINY)
    file = save_detector(model, tmp_path / "cells.safetensors")
    photo = sorted((real_data / "bccd" / "JPEGImages").glob("*.jpg"))[0]
    done = run_reslearn("detect", "eval", file, real_data / "bccd", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["n"] == 72
    done = run_reslearn("detect", "predict", file, photo, "--out", tmp_path / "out", "--score", "0.1", env={"COLUMNS": "100"})
    assert done.code == 0 and photo.name in done.out, done.err
    with Image.open(tmp_path / "out" / photo.name) as drawn:
        assert drawn.format == "JPEG" and drawn.size == (640, 480)
