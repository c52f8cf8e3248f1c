"""`open_boxes(path)`: a folder or file of annotated images, whatever its layout, -> its splits as BoxSets."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from reslearn.data.boxes.box_set import Bad, BoxSet, Faults, Finding
from reslearn.data.boxes.coco import read_coco, read_document
from reslearn.data.boxes.voc import list_file, lists, note_left_out, read_voc, splits, unannotated, years
from reslearn.data.images.files import IMAGE_SUFFIXES
from reslearn.data.images.folder import SPLITS
from reslearn.errors import UserError, did_you_mean

_LAYOUTS = """write VOC (Annotations/, JPEGImages/, ImageSets/Main/train.txt; or such folders called VOC2007, VOC2012 in one),
COCO (annotations/instances_train.json and train/), a folder a split with _annotations.coco.json in it, or a .json file with its
images beside it""".replace("\n", " ")


def open_boxes(
    path: str | Path, *, bad: Bad = "fail", classes: Sequence[str] | None = None, only: Sequence[str] | None = None
) -> dict[str, BoxSet]:
    """The splits of a set with boxes, by name (train, val, test; `only` names others, as VOC's trainval), with one list of classes.

    A VOCdevkit with VOC2007 and VOC2012 in it is one set, see data/voc.py; its images are called VOC2007/000005.

    With `bad="fail"`, any unsound object raises BadBoxes; with "drop" it is left out, or its box cut to the image, and
    stands in the split's `findings`. A fault of a file (missing, unreadable, a size that is not the image's, an id twice)
    raises BadBoxes either way. All faults of all splits are in its `findings`. `classes`, a model's for one, gives the
    labels 1, 2, ...; without it, they are those of the first split, for all.
    Raises UserError where there is no such set or split.
    """
    sets, faults = _read(Path(path), classes, only)
    everything = Faults([finding for some in faults.values() for finding in some.found])
    everything.raise_if(bad)
    if empty := [name for name, one in sets.items() if not any(len(image.objects) for image in one.images)]:
        raise UserError(f"{path}: {empty[0]} has no objects to learn or to test")
    return sets


def examine(path: str | Path, *, classes: Sequence[str] | None = None, only: Sequence[str] | None = None) -> list[Finding]:
    """Every fault of a set, as data, in the order of splits and files. Raises UserError only where there is no such set."""
    return [finding for one in survey(path, classes=classes, only=only).values() for finding in one.findings]


def survey(path: str | Path, *, classes: Sequence[str] | None = None, only: Sequence[str] | None = None) -> dict[str, BoxSet]:
    """The splits as `open_boxes` gives them with "drop", whatever is wrong: each one's `findings` say what was left out.

    Raises UserError only where there is no such set.
    """
    return _read(Path(path), classes, only)[0]


def holds_boxes(path: str | Path) -> bool:
    """Whether a path looks like a set with boxes, sound or not: a .json file, or a folder with VOC's or COCO's annotations, or in
    YOLO's layout, which `open_boxes` refuses."""
    try:
        root = Path(path).expanduser()
        if root.suffix.lower() == ".json":
            return True
        voc = any((root / f"{year}JPEGImages").is_dir() or (root / f"{year}ImageSets/Main").is_dir() for year in years(root))
        coco = any((root / "annotations").glob("instances_*.json")) or any(root.glob("*/_annotations.coco.json"))
        return voc or coco or _is_yolo(root)
    except (OSError, RuntimeError, ValueError):  # a name too long or of no user's, a folder that may not be entered
        return False


def boxes_alone(path: str | Path) -> bool:
    """Whether a path looks like a set with boxes that is none of class folders, too, as `localize crops` writes them."""
    train = Path(path) / "train"
    return holds_boxes(path) and not (train.is_dir() and any(each.is_dir() for each in train.iterdir()))


def split_names(path: str | Path) -> list[str]:
    """The splits that open_boxes(path) reads, train first; ["all"] of a .json file. Raises UserError where there is no set."""
    return list(sources(Path(path), None))


def named_images(path: str | Path, split: str, among: Iterable[Path]) -> set[Path]:
    """The files of the images that a split names, sound or not, as BoxImage.path has them; VOC's without suffix, which it does not
    name. among: the files that are asked about; COCO's large file is not read where none is in its folder.

    Raises UserError where there is no such split."""
    root = Path(path)
    kind, file, folder = sources(root, [split])[split]
    if kind == "voc":
        named = {year: lists(root / year).get(split, ()) for year in years(root)}
        return {root / year / "JPEGImages" / stem for year, lines in named.items() for stem, _ in lines}
    if not any(each.is_relative_to(folder) for each in among):
        return set()
    entries = read_document(file)["images"]
    return {folder / name for one in entries if isinstance(one, dict) and isinstance(name := one.get("file_name"), str)}


def unnamed_images(path: str | Path) -> list[Path]:
    """The images that lie beside those of a set, and that no split and no list of it names.

    Raises UserError where there is no set."""
    root = Path(path)
    named = {
        Path(os.path.normpath(folder / name))  # as ../train/a.jpg is train's
        for kind, file, folder in sources(root, None).values()
        if kind == "coco"
        for one in read_document(file)["images"]
        if isinstance(one, dict) and isinstance(name := one.get("file_name"), str)
    }
    for year in years(root) if root.is_dir() else ():
        named |= {root / year / "JPEGImages" / stem for lines_of in lists(root / year).values() for stem, _ in lines_of}
    beside = {folder for each in named if (folder := each.parent).is_dir()}
    files = sorted(file for folder in beside for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return [file for file in files if file not in named and file.with_suffix("") not in named]


def _read(root: Path, classes: Sequence[str] | None, only: Sequence[str] | None) -> tuple[dict[str, BoxSet], dict[str, Faults]]:
    if classes is not None and len(set(classes)) < len(classes):
        raise UserError(f"classes {', '.join(classes)}: one of them is there twice")
    sets, faults = {}, {}
    for name, (kind, file, images) in sources(root, only).items():
        faults[name] = some = Faults()
        if kind == "voc" and len(faults) == 1:
            note_left_out(root, some)
        for other in _passed_over(file, name):
            some.add("note", "file aside", other.name, None, f"not read: {file.name} is the {name} split")
        one = read_voc(root, name, some, classes) if kind == "voc" else read_coco(file, images, some, classes)
        classes = one.classes or None  # of a split without one object that can be read, the next has the classes
        sets[name] = replace(one, findings=tuple(some.found))
    return sets, faults


def sources(root: Path, only: Sequence[str] | None) -> dict[str, tuple[str, Path, Path]]:
    """(kind, annotation file, folder of images) by split, train first."""
    if root.is_file() and root.suffix.lower() == ".json":
        if (other := next((name for name in only or () if name != "all"), None)) is not None:
            raise UserError(f"{root}: no split {other!r}{did_you_mean(other, ['all'])}")
        return {"all": ("coco", root, _photos(root, root.parent))}
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder or .json file")
    found: dict[str, list[tuple[str, Path, Path]]] = {name: [("voc", root, root)] for name in splits(root)}
    for name in SPLITS:
        exact = root / "annotations" / f"instances_{name}.json"
        files = [exact] if exact.is_file() else sorted((root / "annotations").glob(f"instances_{name}*.json"))
        own = [("coco", file, _photos(file, root)) for file in files]
        for folder in dict.fromkeys((root / name, root / {"val": "valid"}.get(name, name))):
            if (folder / "_annotations.coco.json").is_file():
                own.append(("coco", folder / "_annotations.coco.json", folder))
        if own:
            found[name] = found.get(name, []) + own
    wanted = [name for name in SPLITS if name in found] if only is None else list(only)
    for name in wanted:
        if name not in found:
            if name == "test" and (left_out := unannotated(root)):
                raise UserError(f"{root}: no split 'test': the images of {', '.join(left_out)} have no annotations")
            raise UserError(f"{root}: no split {name!r}{did_you_mean(name, found)}")
    if not wanted and _is_yolo(root):
        raise UserError(f"{root}: this is YOLO's layout, which is not read: {_LAYOUTS}")
    if not wanted:
        raise UserError(f"{root}: no annotations of train, val or test: {_LAYOUTS}")
    return {name: _the_one(root, name, found[name]) for name in wanted}


def _passed_over(file: Path, split: str) -> list[Path]:
    """What lies beside instances_SPLIT.json, read as that split, and could be meant as well, such as instances_SPLIT2017.json."""
    return sorted(set(file.parent.glob(f"{file.stem}*.json")) - {file}) if file.stem == f"instances_{split}" else []


def _is_yolo(root: Path) -> bool:
    """Whether images/ lies beside labels/, or a data.yaml describes it; or so in train/."""
    places = [place for place in (root, root / "train") if (place / "images").is_dir()]
    return any((place / "labels").is_dir() or (root / "data.yaml").is_file() for place in places)


def _photos(file: Path, otherwise: Path) -> Path:
    """The folder of a COCO file's images: of annotations/instances_NAME.json, what is there beside annotations of NAME, images and,
    where NAME is train2, train or such as train2017."""
    beside = file.parent if file.parent.name else file.absolute().parent
    if beside.name != "annotations":
        return otherwise
    name = file.stem.removeprefix("instances_")
    folders = [beside.parent / name, beside.parent / "images"]
    if (split := next((each for each in SPLITS if name.startswith(each)), None)) is not None:
        folders += [beside.parent / split, *sorted(beside.parent.glob(f"{split}[0-9]*"))]
    return next((folder for folder in folders if folder.is_dir()), otherwise)


def _the_one(root: Path, split: str, found: Sequence[tuple[str, Path, Path]]) -> tuple[str, Path, Path]:
    """Raises UserError where a split is there several times."""
    if len(found) > 1:
        files = [root / list_file("", split) if kind == "voc" else file for kind, file, _ in found]
        names = " and ".join(str(file.relative_to(root)) for file in files)
        raise UserError(
            f"{root}: {names} are both its {split} split: move one away, or give the .json file that is meant instead of the folder"
        )
    return found[0]
