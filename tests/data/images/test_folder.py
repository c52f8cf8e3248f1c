"""Folders and lists: entries, left-out files, and one-line errors."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reslearn.data.images.folder import Listing, for_each, read_list, scan
from reslearn.errors import UserError


def fill(root: Path, *names: str) -> Path:
    """Creates files below `root`; scan uses only their names, so they need not be images."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def entries(listing: Listing) -> list[tuple[str, str, str]]:
    return [(entry.split, entry.label, entry.name) for entry in listing.entries]


def test_splits(tmp_path: Path) -> None:
    fill(tmp_path, "train/b/1.jpg", "train/a/2.PNG", "train/a/deep/er/1.jpeg", "valid/a/3.webp", "test/b/4.gif")
    listing = scan(tmp_path)
    assert listing.classes == ("a", "b")
    assert entries(listing) == [
        ("train", "a", "train/a/2.PNG"),
        ("train", "a", "train/a/deep/er/1.jpeg"),
        ("train", "b", "train/b/1.jpg"),
        ("val", "a", "valid/a/3.webp"),
        ("test", "b", "test/b/4.gif"),
    ]
    assert [entry.file for entry in listing.entries] == [tmp_path / entry.name for entry in listing.entries]
    assert listing.left_out == {}


@pytest.mark.parametrize(
    ("folder", "split"),
    [("train", "train"), ("Training", "train"), ("val", "val"), ("VALID", "val"), ("validation", "val"), ("test", "test")]
    + [("Testing", "test")],
)
def test_split_folder_names(folder: str, split: str, tmp_path: Path) -> None:
    assert entries(scan(fill(tmp_path, f"{folder}/a/1.jpg"))) == [(split, "a", f"{folder}/a/1.jpg")]


def test_class_folders_without_splits_are_all(tmp_path: Path) -> None:
    listing = scan(fill(tmp_path, "b/1.jpg", "a/1.jpg"))
    assert entries(listing) == [("all", "a", "a/1.jpg"), ("all", "b", "b/1.jpg")]
    assert scan(fill(tmp_path / "a" / "one class", "x/1.png")).classes == ("x",)


def test_left_out_files_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.jpg", "train/a/.2.jpg", "train/.git/3.jpg", "__MACOSX/4.jpg", "train/a/n/notes.txt")
    fill(tmp_path, "train/a/Thumbs.db", "readme.md", "cover.jpg", "train/5.jpg")
    listing = scan(tmp_path)
    assert entries(listing) == [("train", "a", "train/a/1.jpg")]
    assert listing.left_out == {"hidden": 3, "not images": 3, "outside a class folder": 2}


def test_links_are_followed_without_loops(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "in/1.jpg")
    root = fill(tmp_path / "set", "a/0.jpg", "a/n/2.jpg")
    (root / "a" / "far").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "a" / "n" / "up").symlink_to(root / "a", target_is_directory=True)
    (root / "a" / "n" / "root").symlink_to(root, target_is_directory=True)
    (root / "a" / "again").symlink_to(root / "a" / "n", target_is_directory=True)
    (root / "a" / "self").symlink_to("self")
    (root / "a" / "one.jpg").symlink_to(tmp_path / "elsewhere/in/1.jpg")
    (root / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    listing = scan(root)
    names = [entry.name for entry in listing.entries]
    assert names == ["a/0.jpg", "a/again/2.jpg", "a/far/in/1.jpg", "a/one.jpg", "b/in/1.jpg"]
    assert listing.classes == ("a", "b")


BAD_FOLDERS: dict[str, tuple[list[str], list[str], str]] = {
    # name: files, empty folders, part of the message
    "empty": ([], [], "contains no images or class folders: put the images of each class into a separate folder"),
    "flat": (["1.jpg", "2.jpg"], [], "contains no class folders, only images (2): put"),
    "flat split": (["train/a/1.jpg", "test/1.jpg"], [], "test: contains no class folders, only images (1)"),
    "empty split": (["train/a/1.jpg"], ["val"], "val: contains no images or class folders"),
    "empty class": (["train/a/1.jpg"], ["train/b"], "train/b: contains no images: add images of this class"),
    "no image in a class": (["a/1.jpg", "b/1.txt"], [], "b: contains no images"),
    "empty class of test": (["train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg"], ["test/b"], "test/b: contains no images"),
    "unknown class": (
        ["train/cat/1.jpg", "train/dog/1.jpg", "val/cats/1.jpg"],
        [],
        "class 'cats' is in val, but has no images in train; did you mean 'cat'?",
    ),
    "mixed": (["train/a/1.jpg", "cats/1.jpg"], [], "contains train/ beside cats/: use only class folders, or"),
    "two of one split": (["val/a/1.jpg", "valid/a/1.jpg"], [], "contains val/ and valid/, which are both the val split: keep one"),
    "a set in a folder": (["pets/train/a/1.jpg", "pets/test/a/1.jpg"], [], "pets/test: split folder inside a class folder"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(name: str, tmp_path: Path) -> None:
    files, folders, fragment = BAD_FOLDERS[name]
    fill(tmp_path, *files)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        scan(tmp_path)
    assert fragment in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: cannot be listed: No such file"):
        scan(tmp_path / "gone")


def write(path: Path, text: str | bytes) -> Path:
    fill(path.parent, "a.png", "b.png", "sub/c.png")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


GOOD_LISTS: dict[str, tuple[str | bytes, list[tuple[str, str, str]]]] = {
    "plain.csv": ("file,label\nb.png,dog\na.png,cat\n", [("all", "cat", "a.png"), ("all", "dog", "b.png")]),
    "bom and crlf.csv": (b"\xef\xbb\xbffile,label\r\na.png,caf\xc3\xa9\r\n\r\n", [("all", "café", "a.png")]),
    "order, quotes, space.CSV": (
        'split, label ,file\ntest,"a, b", a.png \ntrain,"a, b",sub/c.png',
        [("train", "a, b", "sub/c.png"), ("test", "a, b", "a.png")],
    ),
    "plain.jsonl": (
        '{"file": "a.png", "label": "x\u2028y", "split": "val"}\n\n{"file": "b.png", "label": " 7", "split": "val"}',
        [("val", "x\u2028y", "a.png"), ("val", "7", "b.png")],
    ),
    "number.jsonl": ('\ufeff{"file": "./a.png", "label": 7}\r\n', [("all", "7", "./a.png")]),
}


@pytest.mark.parametrize("name", GOOD_LISTS)
def test_lists(name: str, tmp_path: Path) -> None:
    text, expected = GOOD_LISTS[name]
    listing = read_list(write(tmp_path / name, text))
    assert entries(listing) == expected
    assert all(entry.file == tmp_path / entry.name for entry in listing.entries)
    assert listing.classes == tuple(sorted({label for _, label, _ in expected}))
    assert listing.left_out == {}


BAD_LISTS: dict[str, tuple[str | bytes, str]] = {
    "empty.csv": ("", "empty.csv: lists no images"),
    "header.csv": ("file,label\n", "header.csv: lists no images"),
    "unknown.csv": ("file,labell\na.png,cat\n", "line 1: unknown column 'labell'; did you mean 'label'?"),
    "semicolons.csv": ("file;label\na.png;cat\n", "line 1: unknown column 'file;label'"),
    "no label.csv": ("file\na.png\n", "line 1: no column 'label'"),
    "no header.csv": ("a.png,cat\n", "line 1: unknown column 'a.png'"),
    "twice.csv": ("file,label,file\na.png,cat,b.png\n", "line 1: duplicate column 'file'"),
    "fields.csv": ("file,label\na.png,cat\nb.png\n", "line 3: 1 fields instead of the 2 in the header"),
    "blank file.csv": ("file,label\n,\n", "line 2: file is empty"),
    "blank label.csv": ("file,label\na.png, \n", "line 2: label is empty"),
    "blank split.csv": ("file,label,split\na.png,cat,\n", "line 2: split is empty"),
    "split.csv": (
        "file,label,split\na.png,cat,valid\n",
        "line 2: split must be train, val or test, not 'valid'; did you mean 'val'?",
    ),
    "all.csv": ("file,label,split\na.png,cat,all\n", "line 2: split must be train, val or test, not 'all'"),
    "missing.csv": ("file,label\na.png,cat\nx.png,cat\ny.png,cat\nz.png,cat\n", "x.png does not exist (and 2 more missing)"),
    "missing one.csv": ("file,label\nsub,cat\n", "missing one.csv line 2: file "),
    "again.csv": ("file,label\na.png,cat\nsub/../a.png,dog\n", "line 3: sub/../a.png is already listed on line 2"),
    "class.csv": (
        "file,label,split\na.png,cat,train\nb.png,bat,test\n",
        "class 'bat' is in test, but has no images in train; did you mean 'cat'?",
    ),
    "quote.csv": ('file,label\n"a.png"x,cat\n', "line 2: not CSV: "),
    "open quote.csv": ('file,label\n"a.png,cat\n', "not CSV: unexpected end of data"),
    "long.csv": ("file,label\na.png," + "x" * 200_000, "line 2: not CSV: field larger than field limit"),
    "latin.csv": (b"file,label\na.png,cat\nb.png,caf\xe9\n", "latin.csv line 3: not UTF-8 text"),
    "utf-16.csv": ("file,label\na.png,cat\n".encode("utf-16"), "utf-16.csv line 1: not UTF-8 text"),
    "json.jsonl": ('{"file": "a.png", "label": "x"}\n{"file": \n', "line 2: not JSON: "),
    "deep.jsonl": ("[" * 100_000, "line 1: not JSON: "),
    "array.jsonl": ('["a.png", "cat"]', "line 1: not an object"),
    "key.jsonl": ('{"fil": "a.png", "label": "x"}', "line 1: unknown column 'fil'; did you mean 'file'?"),
    "no file.jsonl": ('{"label": "x"}', "line 1: no column 'file'"),
    "type.jsonl": ('{"file": ["a.png"], "label": "x"}', 'line 1: file must be a string, not ["a.png"]'),
    "bool.jsonl": ('{"file": "a.png", "label": true}', "line 1: label must be a string, not true"),
    "some splits.jsonl": (
        '{"file": "a.png", "label": "x"}\n{"file": "b.png", "label": "x", "split": "val"}',
        "line 2: split must be set on every line or on none",
    ),
    "zero byte.jsonl": (json.dumps({"file": "a\0b", "label": "x"}), "line 1: file "),
    "surrogate.jsonl": ('{"file": "\\ud800", "label": "x"}', "line 1: file "),
}


@pytest.mark.parametrize("name", BAD_LISTS)
def test_bad_lists(name: str, tmp_path: Path) -> None:
    text, fragment = BAD_LISTS[name]
    with pytest.raises(UserError) as caught:
        read_list(write(tmp_path / name, text))
    assert fragment in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_list_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(UserError, match=r"a\.csv: cannot be read: Is a directory"):
        read_list(tmp_path / "a.csv")


FIELDS = st.sampled_from(["a.png", "b.png", "sub/c.png", "cat", "train", "val", "test", "", '"', "file", "label", "\0", "é"])
CSV = st.lists(st.lists(FIELDS, max_size=3).map(",".join), max_size=4).map(lambda lines: "file,label,split\n" + "\n".join(lines))
KEYS = st.sampled_from(["file", "label", "split", "x"])
JSONL = st.lists(st.dictionaries(KEYS, st.one_of(FIELDS, st.integers(), st.none())).map(json.dumps), max_size=4).map("\n".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["a.csv", "a.jsonl"]),
    st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass"))).flatmap(
        lambda noise: st.one_of(st.just(noise), CSV.map(str.encode), JSONL.map(str.encode))
    ),
)
@example("a.csv", b"file,label\na.png,cat\n")
def test_any_bytes_are_a_list_or_a_user_error(tmp_path: Path, name: str, data: bytes) -> None:
    try:
        listing = read_list(write(tmp_path / name, data))
    except UserError as why:
        assert name in str(why)
        return
    assert listing.entries and all(entry.file.is_file() and entry.label for entry in listing.entries)
    assert set(listing.classes) == {entry.label for entry in listing.entries}


def test_for_each_keeps_order_and_errors() -> None:
    def half(number: int) -> int:
        if number % 100 == 99:
            raise UserError(f"{number} is odd")
        return number // 2

    results = for_each(half, range(1000))
    assert [str(result) if isinstance(result, UserError) else result for result in results] == [
        f"{i} is odd" if i % 100 == 99 else i // 2 for i in range(1000)
    ]

    def broken(_: int) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        for_each(broken, range(3))
