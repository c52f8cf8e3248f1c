"""ImageNet's layouts: readable class names, and flat validation images with all kinds of lists."""

import hashlib
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torchvision.datasets.imagenet as torchvision

from planting import encoded, photo
from reslearn.data.doctor import examine
from reslearn.data.images import imagenet
from reslearn.data.images.folder import Listing, read_list, scan
from reslearn.errors import UserError

TENCH, GOLDFISH, CRANE_BIRD, CRANE = "n01440764", "n01443537", "n02012849", "n03126707"
WNIDS = (TENCH, GOLDFISH, CRANE)
# The classes of validation images 1 to 6, and the development kit's (unsorted) synset numbers.
TRUTH = (CRANE, TENCH, TENCH, GOLDFISH, CRANE, GOLDFISH)
KIT = {TENCH: 449, GOLDFISH: 450, CRANE: 7}
VAL = tuple(f"ILSVRC2012_val_{i:08d}" for i in range(1, 7))


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def lines(root: Path, name: str, *text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(text) + "\n")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Training images in class folders, and flat validation images."""
    root = tmp_path / "imagenet"
    fill(root, *(f"train/{wnid}/{wnid}_1.JPEG" for wnid in WNIDS), *(f"val/{name}.JPEG" for name in VAL))
    return root


def truth(listing: Listing, split: str = "val") -> list[str]:
    return [entry.label for entry in listing.entries if entry.split == split]


def numbers(root: Path) -> None:
    lines(root, "ILSVRC2012_validation_ground_truth.txt", *(str(KIT[wnid]) for wnid in TRUTH))


def kit_text(root: Path) -> None:
    numbers(root / "ILSVRC2012_devkit_t12" / "data")
    lines(root, "ILSVRC2012_devkit_t12/data/map_clsloc.txt", *(f"{wnid} {number} some_name" for wnid, number in KIT.items()))


def meta(file: Path) -> None:
    """Writes a meta.mat with the structure of the real one: leaf synsets and one inner node."""
    io = pytest.importorskip("scipy.io")
    numpy = pytest.importorskip("numpy")
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images"]
    rows = [(number, wnid, "a, b", "what it is", 0, [], 0, 1300) for wnid, number in KIT.items()]
    rows.append((1001, "n00001740", "entity", "all there is", 2, [449, 450], 9, 0))
    synsets = numpy.array([tuple(row) for row in rows], [(field, object) for field in fields]).reshape(-1, 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    io.savemat(file, {"synsets": synsets})


def kit_matlab(root: Path) -> None:
    numbers(root / "ILSVRC2012_devkit_t12" / "data")
    meta(root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat")


def by_rows(name: str, *head: str, row: str) -> Callable[[Path], None]:
    """Writes a list of the validation images in reverse order, formatted by `row`."""
    index = {wnid: i for i, wnid in enumerate(sorted(WNIDS))}
    rows = [row.format(file=file, wnid=wnid, index=index[wnid]) for file, wnid in zip(VAL, TRUTH, strict=True)]
    return lambda root: lines(root, name, *head, *reversed(rows))


LISTS: dict[str, Callable[[Path], None]] = {
    "the kit's numbers and map_clsloc.txt": kit_text,
    "the kit's numbers and meta.mat": kit_matlab,
    "the kit's numbers in the folder": lambda root: (
        numbers(root),
        lines(root, "map_clsloc.txt", *(f"{wnid} {number} some_name" for wnid, number in KIT.items())),
    )[0],
    "a wnid for each image in order": lambda root: lines(root, "imagenet_2012_validation_synset_labels.txt", *TRUTH),
    "a csv with a header": by_rows("val.csv", "file,wnid", row="{file}.JPEG,{wnid}"),
    "a csv without a header": by_rows("val_labels.csv", row="{file}.JPEG,{wnid}"),
    "a csv in the folder of the images": by_rows("val/validation.csv", "image,class", row="{file}.JPEG,{wnid}"),
    "paths, tabs": by_rows("val.tsv", row="val/{file}.JPEG\t{wnid}"),
    "space": by_rows("val.txt", row="{file}.JPEG {wnid}"),
    "Caffe's": by_rows("val.txt", row="{file}.JPEG {index}"),
    "Caffe's, with a header": by_rows("val.csv", "file,label", row="{file}.JPEG,{index}"),
    "Kaggle's": by_rows("LOC_val_solution.csv", "ImageId,PredictionString", row="{file},{wnid} 85 1 499 272 {wnid} 3 4 5 6"),
    "Kaggle's, three folders above": by_rows("../LOC_val_solution.csv", row="{file},{wnid} 85 1 499 272"),
}


@pytest.mark.parametrize("name", LISTS)
def test_flat_validation_images_get_classes_from_lists(name: str, flat: Path) -> None:
    LISTS[name](flat)
    listing = scan(flat)
    assert truth(listing) == list(TRUTH) and truth(listing, "train") == list(WNIDS)
    assert [entry.name for entry in listing.entries if entry.split == "val"] == [f"val/{name}.JPEG" for name in VAL]
    assert listing.classes == ("tench", "goldfish", "crane")
    if name.startswith("Caffe's"):
        with pytest.raises(UserError, match=r"numbers \(0 to 2\) in an unknown order"):
            scan(flat / "val")
    else:
        assert truth(scan(flat / "val")) == list(TRUTH), "the split folder alone"


def test_torchvision_reads_the_same_kit(flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit_matlab(flat)
    with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as archive:
        archive.add(flat / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    digest = hashlib.md5((tmp_path / "kit.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(torchvision.ARCHIVE_META, "devkit", ("kit.tar.gz", digest))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision.parse_devkit_archive(tmp_path)
    assert truth(scan(flat)) == torchvision.load_meta_file(tmp_path)[1]


def kaggle(root: Path) -> Path:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    fill(
        data,
        *(f"train/{wnid}/1.JPEG" for wnid in WNIDS),
        *(f"val/{name}.JPEG" for name in VAL),
        "test/ILSVRC2012_test_00000001.JPEG",
    )
    by_rows("LOC_val_solution.csv", "ImageId,PredictionString", row="{file},{wnid} 85 1 499 272")(root)
    return data


def test_kaggles_layout_from_any_of_its_folders(tmp_path: Path) -> None:
    inner = kaggle(tmp_path)
    for root in (tmp_path, tmp_path / "ILSVRC", inner):
        listing = scan(root)
        assert truth(listing) == list(TRUTH) and listing.left_out == {"without a class": 1}


def test_tiny_imagenet(tmp_path: Path) -> None:
    fill(tmp_path, *(f"train/{wnid}/images/{wnid}_0.JPEG" for wnid in WNIDS), *(f"train/{wnid}/{wnid}_boxes.txt" for wnid in WNIDS))
    fill(tmp_path, *(f"val/images/val_{i}.JPEG" for i in range(6)), "val/images/.hidden", "test/images/test_0.JPEG")
    lines(tmp_path, "val/val_annotations.txt", *(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62" for i, wnid in enumerate(TRUTH)))
    lines(tmp_path, "wnids.txt", *WNIDS)
    listing = scan(tmp_path)
    assert truth(listing) == list(TRUTH)
    assert listing.left_out == {"without a class": 1, "not images": 5, "hidden": 1}
    assert truth(scan(tmp_path / "val")) == list(TRUTH)


def test_validation_images_in_folders_need_no_list(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{split}/{wnid}/{i}.JPEG" for split in ("train", "val") for wnid in WNIDS for i in range(2)))
    fill(tmp_path / "ILSVRC2012_devkit_t12", "data/meta.mat", "readme.txt")
    assert len(truth(scan(tmp_path))) == 6


def write_list(name: str, *text: str) -> Callable[[Path], None]:
    return lambda root: lines(root, name, *text)


def all_but_one(root: Path) -> None:
    lines(root, "val.csv", *(f"{file}.JPEG,{wnid}" for file, wnid in list(zip(VAL, TRUTH, strict=True))[1:]))


def two_that_disagree(root: Path) -> None:
    by_rows("val.csv", row="{file}.JPEG,{wnid}")(root)
    lines(root, "val.txt", *(f"{file}.JPEG {TENCH}" for file in VAL))


def only_meta(root: Path) -> None:
    numbers(root)
    (root / "meta.mat").write_bytes(b"no matlab")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no list": (lambda root: None, "val: contains no class folders, only images (6): put"),
    "advice": (
        lambda root: None,
        "validation images need a list of labels beside them: val.csv, with one file,class per line; LOC_val",
    ),
    "a list of another split": (by_rows("train.csv", row="{file}.JPEG,{wnid}"), "only images (6)"),
    "the kit's numbers alone": (numbers, "needs map_clsloc.txt or meta.mat of the development kit beside it"),
    "a damaged meta.mat": (only_meta, "meta.mat: not the development kit's"),
    "an image less": (all_but_one, "val.csv: no class for ILSVRC2012_val_00000001.JPEG: add the class"),
    "images less": (write_list("val.csv", f"x,{TENCH}"), "no class for ILSVRC2012_val_00000001.JPEG (and 5 more)"),
    "too few lines": (
        write_list("ILSVRC2012_validation_ground_truth.txt", "7", "7"),
        "no class for ILSVRC2012_val_00000003.JPEG: the 2 lines are for",
    ),
    "a class that train lacks": (
        by_rows("val.csv", row="{file}.JPEG,n99999999"),
        "class 'n99999999' is in val, but has no images in train",
    ),
    "numbers from 1": (
        lambda root: lines(root, "val.csv", *(f"{file}.JPEG,{KIT[wnid]}" for file, wnid in zip(VAL, TRUTH, strict=True))),
        "classes are numbers (7 to 450) in an unknown order",
    ),
    "two classes": (
        write_list("val.csv", f"{VAL[0]}.JPEG,{TENCH}", f"{VAL[0]}.JPEG,{CRANE}"),
        "line 2: ILSVRC2012_val_00000001.JPEG is",
    ),
    "no class": (write_list("val.csv", f"{VAL[0]}.JPEG,"), "val.csv line 1: no class"),
    "no class in a later line": (write_list("val.csv", f"{VAL[0]}.JPEG,{TENCH}", f"{VAL[1]}.JPEG"), "val.csv line 2: no class"),
    "an image without a number": (
        lambda root: (fill(root, "val/extra.JPEG"), lines(root, "imagenet_2012_validation_synset_labels.txt", *TRUTH, TENCH))[1],
        "no class for extra.JPEG: the 7 lines are for ILSVRC2012_val_00000001",
    ),
    "nothing in it": (write_list("val.csv", ""), "val.csv: empty"),
    "lists that disagree": (two_that_disagree, f": '{CRANE}' in"),
    "no text": (lambda root: (root / "val.csv").write_bytes(b"\xff\xfe\0"), "val.csv line 1: not UTF-8 text"),  # type: ignore[dict-item]
    "no synset": (
        lambda root: (numbers(root), lines(root, "map_clsloc.txt", f"{TENCH} 1 tench"))[0],
        "line 1: '7' is not a wnid or synset number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_lists(name: str, flat: Path) -> None:
    if "meta.mat" in name:
        pytest.importorskip("scipy")
    plant, fragment = BAD[name]
    plant(flat)
    with pytest.raises(UserError) as caught:
        scan(flat)
    assert fragment in str(caught.value) and str(flat) in str(caught.value)


def test_meta_mat_requires_scipy(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers(flat)
    (flat / "meta.mat").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"meta\.mat: requires SciPy: pip install scipy"):
        scan(flat)


def test_only_official_lists_are_found_in_parent_folders(flat: Path) -> None:
    by_rows("../val.csv", row="{file}.JPEG,{wnid}")(flat)
    with pytest.raises(UserError, match="only images"):
        scan(flat)


def test_unreadable_parent_folders_are_skipped(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder == flat.parent:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match="need a list of labels beside them"):
        scan(flat)
    lines(flat, "val.csv", "file,label", *(f"{name}.JPEG,{wnid}" for name, wnid in zip(VAL, TRUTH, strict=True)))
    assert truth(scan(flat)) == list(TRUTH)


def test_the_thousand_wnids_match_timm_and_torchvision() -> None:
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    wnids = info.label_names()
    names = imagenet.readable(wnids, Path("/"))
    assert len(set(names)) == 1000
    same = sum(bool(set(name.lower().split()) & set(info.label_name_to_description(wnid).lower().replace(",", "").split()))
               for wnid, name in zip(wnids, names, strict=True))  # fmt: skip
    assert same > 990
    name_of = dict(zip(wnids, names, strict=True))
    assert [name_of[wnid] for wnid in (TENCH, CRANE_BIRD, CRANE, "n13133613")] == ["tench", "crane bird", "crane", "ear"]


def test_names_of_other_wnids_come_from_a_file(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b" / "set"
    fill(
        root, "n00000001/1.jpg", "n00000002/1.jpg", "n00000003/1.jpg", "n00000004/1.jpg", f"{TENCH}/1.jpg", "cat/1.jpg", "ant/1.jpg"
    )
    assert scan(root).classes == ("ant", "cat", "n00000001", "n00000002", "n00000003", "n00000004", "tench")
    lines(tmp_path / "a", "words.txt", "n00000001\tbee, honey bee", "n00000002\tant, pismire", "n09999999\tmoth", f"{TENCH}\tfish")
    lines(root, "LOC_synset_mapping.txt", "n00000003 bee, bumble bee", "n00000001 bee, honeybee")
    listing = scan(root)
    assert listing.labels == ("ant", "cat", "n00000001", "n00000002", "n00000003", "n00000004", "n01440764")
    assert listing.classes == ("ant", "cat", "bee, honeybee", "ant, pismire", "bee, bumble bee", "n00000004", "tench")
    lines(root, "map_clsloc.txt", "n00000004 1 carpenter_bee")
    assert scan(root).classes[5] == "carpenter bee"
    lines(root, "LOC_synset_mapping.txt", "n00000003 bee", "n00000001 bee")
    assert scan(root).classes[2:5] == ("bee (n00000001)", "ant, pismire", "bee (n00000003)")


def test_lists_get_readable_names_in_wnid_order(tmp_path: Path) -> None:
    fill(tmp_path, "1.jpg", "2.jpg")
    lines(tmp_path, "list.csv", "file,label", f"1.jpg,{GOLDFISH}", f"2.jpg,{TENCH}")
    listing = read_list(tmp_path / "list.csv")
    assert (listing.labels, listing.classes) == ((TENCH, GOLDFISH), ("tench", "goldfish"))


def test_the_doctor_examines_flat_validation_images(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    for i, wnid in enumerate(3 * WNIDS):
        fill(root, f"train/{wnid}/{i}.JPEG").joinpath(f"train/{wnid}/{i}.JPEG").write_bytes(encoded(photo(i), "JPEG"))
    for i, name in enumerate(VAL):
        fill(root, f"val/{name}.JPEG").joinpath(f"val/{name}.JPEG").write_bytes(encoded(photo(100 + i), "JPEG"))
    assert [(f.kind, f.names) for f in examine(root).findings if f.fault] == [("without classes", ("val",))]
    by_rows("val.csv", row="{file}.JPEG,{wnid}")(root)
    diagnosis = examine(root)
    assert diagnosis.clean and diagnosis.per_class["val"] == {"tench": 2, "goldfish": 2, "crane": 2}
    assert {entry.label for entry in diagnosis.entries} == set(WNIDS)
