"""Functions that open data expand ~, and paths take precedence over data set names."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boxed import voc, voc_object, voc_xml
from planting import clean, photo
from reslearn import cli
from reslearn.data import open as open_data
from reslearn.data.boxes.read import (
    boxes_alone,
    holds_boxes,
    named_images,
    open_boxes,
    sources,
    split_names,
    survey,
    unnamed_images,
)
from reslearn.data.doctor import check_fix, examine, repair
from reslearn.data.doctor.boxes import examine_boxes
from reslearn.data.doctor.classes import examine_classes
from reslearn.data.doctor.repair_boxes import count_named
from reslearn.data.images.pack import PackFormat, pack
from reslearn.errors import UserError
from reslearn.files import user_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with photos/ (class folders), list.csv and cells/ (VOC)."""
    clean(tmp_path / "photos")
    photo(5, (60, 80)).save(tmp_path / "photos/train/cat/larger.jpg")  # images of one size would be kept in memory
    (tmp_path / "list.csv").write_text("file,label\nphotos/train/cat/0.jpg,cat\nphotos/train/dog/0.jpg,dog\n")
    voc(tmp_path / "cells", {f"a{i}": voc_xml(voc_object((5, 6, 24, 30))) for i in range(6)})
    for i in range(6):
        photo(i, (40, 60)).save(tmp_path / f"cells/JPEGImages/a{i}.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


OPENERS: dict[str, Callable[[str], Any]] = {
    "open": lambda home: {name: split.names for name, split in open_data(f"{home}/photos").splits.items()},
    "open, a list": lambda home: open_data(f"{home}/list.csv").splits["all"].names,
    "open_boxes": lambda home: len(open_boxes(f"{home}/cells")["train"]),
    "survey": lambda home: len(survey(f"{home}/cells")["train"]),
    "split_names": lambda home: split_names(f"{home}/cells"),
    "sources": lambda home: sources(f"{home}/cells"),
    "named_images": lambda home: named_images(f"{home}/cells", "train", []),
    "unnamed_images": lambda home: unnamed_images(f"{home}/cells"),
    "holds_boxes": lambda home: [holds_boxes(f"{home}/{name}") for name in ("cells", "photos")],
    "boxes_alone": lambda home: [boxes_alone(f"{home}/{name}") for name in ("cells", "photos")],
    "examine": lambda home: [examine(f"{home}/{name}").as_json() for name in ("cells", "photos")],
    "examine_classes": lambda home: examine_classes(f"{home}/photos").as_json(),
    "examine_boxes": lambda home: examine_boxes(f"{home}/cells").as_json(),
    "count_named": lambda home: count_named(f"{home}/cells"),
}


@pytest.mark.parametrize("opener", OPENERS.values(), ids=list(OPENERS))
def test_openers_expand_a_home_folder(opener: Callable[[str], Any], home: Path) -> None:
    assert opener("~") == opener(str(home))


@pytest.mark.parametrize("data", ["photos", "cells"])
def test_the_doctor_writes_to_a_home_folder(data: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reslearn", "doctor", f"~/{data}", "--fix", "~/copy"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code and (home / "copy" / {"photos": "train/cat/0.jpg", "cells": "JPEGImages/a0.jpg"}[data]).is_file()
    with pytest.raises(UserError, match="already exists"):
        check_fix(f"~/{data}", Path("~/copy"))
    repair(examine(f"~/{data}"), f"~/{data}", Path("~/again"))
    assert (home / "again").is_dir()


def test_pack_works_in_a_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(pack("~/photos", Path("~/packed"), PackFormat(None)).index) == 23
    assert open_data("~/packed").packed and (home / "packed/pack.json").is_file()
    with pytest.raises(UserError, match="a packed set"):
        check_fix("~/packed", home / "copy")
    with pytest.raises(UserError, match="is inside"):
        pack("~/photos", Path("~/photos/packed"))
    monkeypatch.setattr(sys, "argv", ["reslearn", "pack", "~/packed", "--verify"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code


@pytest.mark.parametrize("opener", [open_data, open_boxes, survey, split_names, examine])
def test_an_unknown_user_is_an_error(opener: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match=r"^~nobody-at-all/x: "):
        opener("~nobody-at-all/x")
    assert not holds_boxes("~nobody-at-all/x")


def test_a_path_named_like_a_known_set_is_opened_as_a_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for name in ("fashion-sample", "fashion-mnist", "fashion-mine"):
        shutil.copytree(home / "photos", home / name)
        for path in (home / name, Path(name), str(home / name), f"./{name}", f"~/{name}"):
            assert open_data(path).classes == ("cat", "dog"), path
        assert examine_classes(Path(name)).classes == ("cat", "dog") and not check_fix(home / name, home / "copy")
    assert open_data("fashion-mine").classes == ("cat", "dog")
    assert len(open_data("fashion-sample").classes) == 10, "a str that is a known name opens that set"
    assert user_path("~/x") == home / "x"
