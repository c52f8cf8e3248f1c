"""reslearn doctor: output, exit codes, --fix and Ctrl-C."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from command_line import RunCli, start_reslearn
from planting import FAULTS, NOTES, clean, encoded, photo


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return clean(tmp_path / "photos")


def test_a_clean_set_exits_with_0_and_notes_do_not_count(photos: Path, run_cli: RunCli) -> None:
    code, out, _ = run_cli("doctor", photos)
    assert code == 0 and out.startswith("photos: 2 classes, 12 train + 10 val images, ") and out.endswith("\nnothing wrong\n")
    assert "  train        cat 6, dog 6\n" in out and "  height       48 to 48, median 48\n" in out and "notes" not in out
    NOTES["CMYK"][0](photos)
    code, out, _ = run_cli("doctor", photos)
    assert code == 0 and "nothing wrong" in out and "  modes        RGB 22, CMYK 1\n" in out
    assert "color space, 1: not RGB: converted without a color profile\n    train/cat/x.jpg: CMYK\n" in out


def test_faults_exit_with_1_and_are_named(photos: Path, run_cli: RunCli) -> None:
    for name in ("html", "in train and val, in pixels", "a line break in a name"):
        FAULTS[name][0](photos)
    for i in range(7):
        (photos / "val" / "dog" / f"empty{i}.jpg").touch()
    code, out, err = run_cli("doctor", photos)
    assert code == 1 and err == "" and "nothing wrong" not in out
    assert "  empty, 7: files of 0 bytes (--fix: left out)\n    val/dog/empty0.jpg: not an image: empty file (0 bytes)\n" in out
    assert "    and 2 more (see --json)\n" in out
    assert "  leak, 1: the same image in several" in out and "train/cat/0.jpg, val/cat/x.png: the same pixels in train, val" in out
    assert "    'train/cat/a\\nb.jpg': unprintable character\n" in out
    code, out, _ = run_cli("doctor", photos, "--json")
    found = json.loads(out)
    assert (
        code == 1 and not found["clean"] and found["per_class"]["train"] == {"cat": 8, "dog": 6} and found["images"]["train"] == 14
    )
    empty = [finding for finding in found["findings"] if finding["kind"] == "empty"]
    assert len(empty) == 7 and empty[6]["names"] == ["val/dog/empty6.jpg"] and empty[6]["fault"] is True
    assert {"mean", "std", "eigenvalues", "eigenvectors", "formats", "modes", "height"} <= set(found)


def test_fix_writes_a_clean_list_or_copy(photos: Path, tmp_path: Path, run_cli: RunCli) -> None:
    FAULTS["a JPEG cut short"][0](photos)
    for target in (tmp_path / "clean.csv", tmp_path / "copy"):
        code, out, _ = run_cli("doctor", photos, "--fix", target)
        assert code == 1 and out.endswith(f"wrote {target}: 21 of 22 images\n")
        assert run_cli("doctor", target)[0] == 0
        code, out, err = run_cli("doctor", photos, "--fix", target)
        assert (code, out) == (2, "") and err == f"reslearn: --fix {target}: already exists: choose another name, or remove it\n"


def test_fix_writes_no_copy_into_a_data_set(photos: Path, tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "other" / "train" / "cat").mkdir(parents=True)
    code, _, err = run_cli("doctor", photos, "--fix", tmp_path / "other" / "new")
    assert code == 2 and "is a data set (it contains train/)" in err and not (tmp_path / "other" / "new").exists()


def test_findings_are_printed_even_if_no_image_is_usable(tmp_path: Path, run_cli: RunCli) -> None:
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "1.jpg").write_bytes(encoded(photo(0), "JPEG"))
    code, out, err = run_cli("doctor", tmp_path / "data", "--fix", tmp_path / "clean.csv", "--json")
    assert code == 2 and "no image is usable" in err and not (tmp_path / "clean.csv").exists()
    assert [finding["kind"] for finding in json.loads(out)["findings"]] == ["contradiction", "few images"]


def test_unreadable_data_exits_with_2(tmp_path: Path, run_cli: RunCli) -> None:
    for data, fragment in ((tmp_path, "contains no images or class folders"), ("fotos", "no data set or folder called 'fotos'")):
        code, out, err = run_cli("doctor", data)
        assert (code, out) == (2, "") and fragment in err and err.count("\n") == 1


def test_ctrl_c_stops_at_once_and_writes_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (data / "b").mkdir()
    (data / "a" / "0.png").write_bytes(encoded(photo(0, (1500, 1500)), "PNG"))
    for i in range(1, 3000):
        os.link(data / "a" / "0.png", data / "ab"[i % 2] / f"{i}.png")
    process = start_reslearn("doctor", data, "--fix", tmp_path / "copy")
    assert process.stderr is not None and "inspecting images" in process.stderr.readline()  # a line after ten seconds
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "") and "Traceback" not in err
    assert time.monotonic() - sent < 30 and [path.name for path in tmp_path.iterdir()] == ["data"]
    shutil.rmtree(data)
