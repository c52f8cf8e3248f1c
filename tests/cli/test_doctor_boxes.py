"""reslearn doctor on sets with boxes: output, exit codes and inapplicable options."""

import json
from pathlib import Path

import pytest

from boxed import voc, voc_object, voc_xml
from command_line import RunCli
from planting import photo


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    bad = [voc_object((k, 9, k, 20)) for k in range(1, 8)]
    documents = {f"a{i}": voc_xml(voc_object((5, 6, 24, 30))) for i in range(5)} | {"bad": voc_xml(*bad)}
    root = voc(tmp_path / "boxes", documents)
    for i, name in enumerate(documents):
        photo(i, (40, 60)).save(root / "JPEGImages" / f"{name}.jpg")
    return root


def test_faults_are_printed_and_repaired(boxes: Path, tmp_path: Path, run_cli: RunCli) -> None:
    code, out, err = run_cli("doctor", boxes, "--size", "40", "--fix", tmp_path / "clean")
    assert code == 1 and err == "" and out.startswith("boxes: 1 class, 6 train images, 5 objects, ")
    for words in (
        "  no objects   1 images of train\n",
        "  objects      0 to 1 per image, median 1\n",
        "  class  train  small  medium  large             side, px\n  cat        5      5       0      0  22 to 22, median 22\n",
        "  C4             40, 67          128, 256, 512",
        "  no area, 7: boxes without width or height: they make losses NaN (--fix: left out)\n",
        "    Annotations/bad.xml object 0: box xmin 1, ymin 9, xmax 1, ymax 20\n",
        "    and 2 more (see --json)\n",
    ):
        assert words in out, (words, out)
    assert out.endswith(f"wrote {tmp_path / 'clean'}: 6 of 6 images, 5 of 12 objects\n")
    code, out, _ = run_cli("doctor", tmp_path / "clean")
    assert code == 0 and out.endswith("nothing wrong\n")
    code, out, _ = run_cli("doctor", boxes, "--json")
    found = json.loads(out)
    assert code == 1 and found["counts"] == {"no area": 7} and [one["index"] for one in found["findings"]] == list(range(7))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--fix", "clean.csv"), "--fix clean.csv: sets with boxes are copied to a folder: use a name without a suffix"),
        (("--size", "huge"), "--size huge: must be SHORTER or SHORTER,LONGEST in px (16 to 4096), such as 600,1000"),
    ],
)
def test_invalid_options(boxes: Path, words: tuple[str, ...], says: str, run_cli: RunCli) -> None:
    assert run_cli("doctor", boxes, *words) == (2, "", f"reslearn: {says}\n")


def test_size_is_of_sets_with_boxes(images: Path, tmp_path: Path, run_cli: RunCli) -> None:
    says = f"reslearn: --size applies only to sets with boxes, and {images} has no boxes\n"
    assert run_cli("doctor", images, "--size", "600") == (2, "", says)
    code, out, err = run_cli("doctor", tmp_path / "none.json")
    assert (code, out) == (2, "") and "there is no such folder or .json file" in err


@pytest.mark.parametrize("files", [("labels/train/a.txt", "images/train/a.jpg"), ("data.yaml", "train/images/a.jpg")])
@pytest.mark.parametrize("words", [("doctor",), ("detect", "train")])
def test_yolo_layout_is_rejected(files: tuple[str, str], words: tuple[str, ...], tmp_path: Path, run_cli: RunCli) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("0 0.5 0.5 0.2 0.2\n")
    photo(0, (40, 60)).save(tmp_path / files[1])
    code, out, err = run_cli(*words, tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"reslearn: {tmp_path}: YOLO's layout is not supported: use VOC (Annotations/, ")
