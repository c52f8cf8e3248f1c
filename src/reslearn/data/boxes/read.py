"""`open_boxes(path)` reads a folder or file of annotated images, VOC or COCO, into one BoxSet a split."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from reslearn.data.boxes.box_set import Bad, BoxSet
from reslearn.data.boxes.checks import Findings
from reslearn.data.boxes.coco import read_coco, read_document
from reslearn.data.boxes.voc import list_file, lists, note_left_out, read_voc, splits, unannotated, years
from reslearn.data.images.files import IMAGE_SUFFIXES
from reslearn.data.images.folder import SPLITS
from reslearn.errors import UserError, did_you_mean
from reslearn.files import user_path

_LAYOUTS = """write VOC (Annotations/, JPEGImages/, ImageSets/Main/train.txt; or such folders called VOC2007, VOC2012 in one),
COCO (annotations/instances_train.json and train/), a folder a split with _annotations.coco.json in it, or a .json file with its
images beside it""".replace("\n", " ")


def open_boxes(
    path: str | Path, *, bad: Bad = "fail", classes: Sequence[str] | None = None, only: Sequence[str] | None = None
) -> dict[str, BoxSet]:
    """Opens a set with boxes: its splits by name (train, val, test; `only` names others, as VOC's trainval), with common classes.

    A VOCdevkit with VOC2007 and VOC2012 in it is one set, see voc.py; its images are called VOC2007/000005.

    With `bad="fail"`, any invalid object raises BadBoxes; with "drop" it is left out, or its box cut to the image, and
    listed in the split's `findings`. A fault of a file (missing, unreadable, a size that is not the image's, an id twice)
    raises BadBoxes either way. All faults of all splits are in its `findings`. `classes`, a model's for one, gives the
    labels 1, 2, ...; without it, they are those of the first split, for all.
    Raises UserError where there is no such set or split.
    """
    sets = survey(path, classes=classes, only=only)
    Findings(finding for split in sets.values() for finding in split.findings).raise_if(bad)
    if empty := [name for name, one in sets.items() if not any(len(image.objects) for image in one.images)]:
        raise UserError(f"{path}: {empty[0]} has no objects to learn or to test")
    return sets


def survey(path: str | Path, *, classes: Sequence[str] | None = None, only: Sequence[str] | None = None) -> dict[str, BoxSet]:
    """The splits as `open_boxes` gives them with "drop", whatever is wrong: each one's `findings` say what was left out.

    Raises UserError only where there is no such set.
    """
    if classes is not None and len(set(classes)) < len(classes):
        raise UserError(f"classes {', '.join(classes)}: one of them is there twice")
    root, sets = user_path(path), {}
    for name, (kind, file, images) in sources(path, only).items():
        findings = Findings()
        if kind == "voc" and not sets:
            note_left_out(root, findings)
        for other in _passed_over(file, name):
            findings.add("file aside", other.name, f"not read: {file.name} is the {name} split")
        read = read_voc(root, name, findings, classes) if kind == "voc" else read_coco(file, images, findings, classes)
        classes = read.classes or None  # where no object of a split can be read, the next one has the classes
        sets[name] = replace(read, findings=tuple(findings))
    return sets


def holds_boxes(path: str | Path) -> bool:
    """Whether a path looks like a set with boxes, valid or not: a .json file, or a folder with VOC's or COCO's annotations, or in
    YOLO's layout, which `open_boxes` refuses."""
    try:
        root = user_path(path)
        if root.suffix.lower() == ".json":
            return True
        voc = any((root / f"{year}JPEGImages").is_dir() or (root / f"{year}ImageSets/Main").is_dir() for year in years(root))
        coco = any((root / "annotations").glob("instances_*.json")) or any(root.glob("*/_annotations.coco.json"))
        return voc or coco or _is_yolo(root)
    except (OSError, ValueError):  # a name too long or of no user's, a folder that may not be entered
        return False


def boxes_alone(path: str | Path) -> bool:
    """Whether a path looks like a set with boxes only: `localize crops` writes sets that have class folders as well."""
    train = user_path(path) / "train"
    return holds_boxes(path) and not (train.is_dir() and any(entry.is_dir() for entry in train.iterdir()))


def split_names(path: str | Path) -> list[str]:
    """The splits that open_boxes(path) reads, train first; ["all"] of a .json file. Raises UserError where there is no set."""
    return list(sources(path))


def named_images(path: str | Path, split: str, among: Iterable[Path]) -> set[Path]:
    """The files of the images that a split names, valid or not, as BoxImage.path has them; VOC's without suffix, which it does not
    name. among: the files in question; COCO's large file is not read where its folder has none of them.

    Raises UserError where there is no such split."""
    root = user_path(path)
    kind, file, folder = sources(root, [split])[split]
    if kind == "voc":
        named = {year: lists(root / year).get(split, ()) for year in years(root)}
        return {root / year / "JPEGImages" / stem for year, lines in named.items() for stem, _ in lines}
    if not any(image.is_relative_to(folder) for image in among):
        return set()
    return {folder / name for name in _file_names(file)}


def unnamed_images(path: str | Path) -> list[Path]:
    """The images that lie beside those of a set, and that no split and no list of it names.

    Raises UserError where there is no set."""
    root = user_path(path)
    named = {
        Path(os.path.normpath(folder / name))  # as ../train/a.jpg is train's
        for kind, file, folder in sources(root).values()
        if kind == "coco"
        for name in _file_names(file)
    }
    for year in years(root) if root.is_dir() else ():
        named |= {root / year / "JPEGImages" / stem for lines in lists(root / year).values() for stem, _ in lines}
    beside = {folder for image in named if (folder := image.parent).is_dir()}
    files = sorted(file for folder in beside for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return [file for file in files if file not in named and file.with_suffix("") not in named]


def _file_names(file: Path) -> list[str]:
    """The file names of the images of a COCO file, valid or not."""
    entries = read_document(file)["images"]
    return [name for entry in entries if isinstance(entry, dict) and isinstance(name := entry.get("file_name"), str)]


def sources(path: str | Path, only: Sequence[str] | None = None) -> dict[str, tuple[str, Path, Path]]:
    """(kind, annotation file, folder of images) by split, train first. Raises UserError where there is no such set or split."""
    root = user_path(path)
    if root.is_file() and root.suffix.lower() == ".json":
        if (other := next((name for name in only or () if name != "all"), None)) is not None:
            raise UserError(f"{root}: no split {other!r}{did_you_mean(other, ['all'])}")
        return {"all": ("coco", root, _photos(root, root.parent))}
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder or .json file")
    known: dict[str, list[tuple[str, Path, Path]]] = {name: [("voc", root, root)] for name in splits(root)}
    for name in SPLITS:
        exact = root / "annotations" / f"instances_{name}.json"
        files = [exact] if exact.is_file() else sorted((root / "annotations").glob(f"instances_{name}*.json"))
        own = [("coco", file, _photos(file, root)) for file in files]
        for folder in dict.fromkeys((root / name, root / {"val": "valid"}.get(name, name))):
            if (folder / "_annotations.coco.json").is_file():
                own.append(("coco", folder / "_annotations.coco.json", folder))
        if own:
            known[name] = known.get(name, []) + own
    wanted = [name for name in SPLITS if name in known] if only is None else list(only)
    for name in wanted:
        if name not in known:
            if name == "test" and (left_out := unannotated(root)):
                raise UserError(f"{root}: no split 'test': the images of {', '.join(left_out)} have no annotations")
            raise UserError(f"{root}: no split {name!r}{did_you_mean(name, known)}")
    if not wanted and _is_yolo(root):
        raise UserError(f"{root}: this is YOLO's layout, which is not read: {_LAYOUTS}")
    if not wanted:
        raise UserError(f"{root}: no annotations of train, val or test: {_LAYOUTS}")
    return {name: _only_one(root, name, known[name]) for name in wanted}


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
    if (split := next((known for known in SPLITS if name.startswith(known)), None)) is not None:
        folders += [beside.parent / split, *sorted(beside.parent.glob(f"{split}[0-9]*"))]
    return next((folder for folder in folders if folder.is_dir()), otherwise)


def _only_one(root: Path, split: str, candidates: Sequence[tuple[str, Path, Path]]) -> tuple[str, Path, Path]:
    """Raises UserError where a split is there several times."""
    if len(candidates) > 1:
        files = [root / list_file("", split) if kind == "voc" else file for kind, file, _ in candidates]
        names = " and ".join(str(file.relative_to(root)) for file in files)
        raise UserError(
            f"{root}: {names} are both its {split} split: move one away, or give the .json file that is meant instead of the folder"
        )
    return candidates[0]
