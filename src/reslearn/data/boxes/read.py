"""`open_boxes(path)` reads a VOC or COCO set into one BoxSet per split."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from reslearn.data.boxes.box_set import Bad, BoxSet
from reslearn.data.boxes.checks import Findings
from reslearn.data.boxes.coco import read_coco, read_document
from reslearn.data.boxes.voc import list_file, lists, read_voc, splits, unannotated, years
from reslearn.data.images.files import IMAGE_SUFFIXES
from reslearn.data.images.folder import SPLITS
from reslearn.errors import UserError, did_you_mean
from reslearn.files import user_path

_LAYOUTS = (
    "use VOC (Annotations/, JPEGImages/, ImageSets/Main/train.txt; or a devkit with VOC2007/ and VOC2012/), "
    "COCO (annotations/instances_train.json and train/), a folder per split with _annotations.coco.json, "
    "or a .json file beside its images"
)


def open_boxes(
    path: str | Path, *, bad: Bad = "fail", classes: Sequence[str] | None = None, only: Sequence[str] | None = None
) -> dict[str, BoxSet]:
    """Opens a set with boxes. Returns its splits by name, with common classes.

    A VOCdevkit with VOC2007 and VOC2012 is one set, see voc.py; its images are named like VOC2007/000005.

    bad: "fail" raises BadBoxes for any invalid object; "drop" leaves the object out, or clips its box, and lists it in the split's
    `findings`. Faults of files (missing, unreadable, wrong size, duplicate id) always raise BadBoxes, whose `findings` are all
    faults of all splits. classes: the classes of labels 1, 2, ..., such as a model's; by default those of the first split.
    only: the splits to open, such as VOC's trainval; by default train, val and test.
    Raises UserError if there is no such set or split.
    """
    sets = survey(path, classes=classes, only=only)
    Findings(finding for split in sets.values() for finding in split.findings).raise_if(bad)
    if empty := [name for name, split in sets.items() if not any(len(image.objects) for image in split.images)]:
        raise UserError(f"{path}: split {empty[0]} has no objects")
    return sets


def survey(path: str | Path, *, classes: Sequence[str] | None = None, only: Sequence[str] | None = None) -> dict[str, BoxSet]:
    """Returns the splits like `open_boxes` with "drop", but never raises BadBoxes: all faults are in the splits' `findings`.

    Raises UserError if there is no such set or split.
    """
    if classes is not None and len(set(classes)) < len(classes):
        raise UserError(f"classes {', '.join(classes)}: names must be unique")
    root, sets = user_path(path), {}
    for name, (kind, file, images) in sources(path, only).items():
        findings = Findings()
        if kind == "voc" and not sets:
            for list_path, n in unannotated(root).items():
                findings.add("not annotated", list_path, f"none of its {n:,} images has a file in Annotations: left out")
        for other in _ignored_files(file, name):
            findings.add("file aside", other.name, f"not read: {file.name} is the {name} split")
        split = read_voc(root, name, findings, classes) if kind == "voc" else read_coco(file, images, findings, classes)
        classes = split.classes or None  # if a split has no readable objects, the next one defines the classes
        sets[name] = replace(split, findings=tuple(findings))
    return sets


def holds_boxes(path: str | Path) -> bool:
    """Whether a path looks like a set with boxes, valid or not: a .json file, or a folder in VOC's, COCO's or (unsupported) YOLO's
    layout."""
    try:
        root = user_path(path)
        if root.suffix.lower() == ".json":
            return True
        voc = any((root / f"{year}JPEGImages").is_dir() or (root / f"{year}ImageSets/Main").is_dir() for year in years(root))
        coco = any((root / "annotations").glob("instances_*.json")) or any(root.glob("*/_annotations.coco.json"))
        return voc or coco or _is_yolo(root)
    except (OSError, ValueError):  # an invalid path, an unknown user, or no permission
        return False


def boxes_alone(path: str | Path) -> bool:
    """Whether a path looks like a set with boxes but without class folders; `localize crops` writes sets with both."""
    train = user_path(path) / "train"
    return holds_boxes(path) and not (train.is_dir() and any(entry.is_dir() for entry in train.iterdir()))


def split_names(path: str | Path) -> list[str]:
    """The splits that open_boxes(path) reads, train first; ["all"] for a .json file. Raises UserError if there is no such set."""
    return list(sources(path))


def named_images(path: str | Path, split: str, among: Iterable[Path]) -> set[Path]:
    """The image files that a split names, valid or not, in the form of BoxImage.path; for VOC without suffix.

    among: the files of interest. If none is in COCO's image folder, its large file is not read.
    Raises UserError if there is no such split.
    """
    root = user_path(path)
    kind, file, folder = sources(root, [split])[split]
    if kind == "voc":
        named = {year: lists(root / year).get(split, ()) for year in years(root)}
        return {root / year / "JPEGImages" / stem for year, lines in named.items() for stem, _ in lines}
    if not any(image.is_relative_to(folder) for image in among):
        return set()
    return {folder / name for name in _file_names(file)}


def unnamed_images(path: str | Path) -> list[Path]:
    """The files in the image folders of a set that no split or list names. Raises UserError if there is no such set."""
    root = user_path(path)
    named = {
        Path(os.path.normpath(folder / name))  # a name may be ../train/a.jpg
        for kind, file, folder in sources(root).values()
        if kind == "coco"
        for name in _file_names(file)
    }
    for year in years(root) if root.is_dir() else ():
        named |= {root / year / "JPEGImages" / stem for lines in lists(root / year).values() for stem, _ in lines}
    folders = {folder for image in named if (folder := image.parent).is_dir()}
    files = sorted(file for folder in folders for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    return [file for file in files if file not in named and file.with_suffix("") not in named]


def _file_names(file: Path) -> list[str]:
    """The image file names in a COCO file, valid or not."""
    entries = read_document(file)["images"]
    return [name for entry in entries if isinstance(entry, dict) and isinstance(name := entry.get("file_name"), str)]


def sources(path: str | Path, only: Sequence[str] | None = None) -> dict[str, tuple[str, Path, Path]]:
    """(kind, annotation file, image folder) by split, train first. Raises UserError if there is no such set or split."""
    root = user_path(path)
    if root.is_file() and root.suffix.lower() == ".json":
        if (other := next((name for name in only or () if name != "all"), None)) is not None:
            raise UserError(f"{root}: no split {other!r}{did_you_mean(other, ['all'])}")
        return {"all": ("coco", root, _image_folder(root, root.parent))}
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder or .json file")
    known: dict[str, list[tuple[str, Path, Path]]] = {name: [("voc", root, root)] for name in splits(root)}
    for name in SPLITS:
        exact = root / "annotations" / f"instances_{name}.json"
        files = [exact] if exact.is_file() else sorted((root / "annotations").glob(f"instances_{name}*.json"))
        coco = [("coco", file, _image_folder(file, root)) for file in files]
        for folder in dict.fromkeys((root / name, root / {"val": "valid"}.get(name, name))):
            if (folder / "_annotations.coco.json").is_file():
                coco.append(("coco", folder / "_annotations.coco.json", folder))
        if coco:
            known[name] = known.get(name, []) + coco
    wanted = [name for name in SPLITS if name in known] if only is None else list(only)
    for name in wanted:
        if name not in known:
            if name == "test" and (left_out := unannotated(root)):
                raise UserError(f"{root}: no split 'test': the images of {', '.join(left_out)} have no annotations")
            raise UserError(f"{root}: no split {name!r}{did_you_mean(name, known)}")
    if not wanted and _is_yolo(root):
        raise UserError(f"{root}: YOLO's layout is not supported: {_LAYOUTS}")
    if not wanted:
        annotated = any(next(root.glob(pattern), None) for pattern in ("*.json", "*/*.json", "*/*.xml"))
        photos = not annotated and any(file.suffix.lower() in IMAGE_SUFFIXES for file in root.glob("*/*"))
        hint = f"; to train a classifier on class folders: reslearn train {root}" if photos else ""
        raise UserError(f"{root}: no annotations of train, val or test: {_LAYOUTS}{hint}")
    return {name: _only_one(root, name, known[name]) for name in wanted}


def _ignored_files(file: Path, split: str) -> list[Path]:
    """Files such as instances_SPLIT2017.json beside instances_SPLIT.json, which is read instead."""
    return sorted(set(file.parent.glob(f"{file.stem}*.json")) - {file}) if file.stem == f"instances_{split}" else []


def _is_yolo(root: Path) -> bool:
    """Whether root or root/train contains images/ and labels/, or images/ and a data.yaml in root."""
    folders = [folder for folder in (root, root / "train") if (folder / "images").is_dir()]
    return any((folder / "labels").is_dir() or (root / "data.yaml").is_file() for folder in folders)


def _image_folder(file: Path, default: Path) -> Path:
    """The image folder of a COCO file. For annotations/instances_train2017.json, the first existing of train2017, images, train and
    train[0-9]* beside annotations; otherwise `default`."""
    folder = file.parent if file.parent.name else file.absolute().parent
    if folder.name != "annotations":
        return default
    name = file.stem.removeprefix("instances_")
    candidates = [folder.parent / name, folder.parent / "images"]
    if (split := next((known for known in SPLITS if name.startswith(known)), None)) is not None:
        candidates += [folder.parent / split, *sorted(folder.parent.glob(f"{split}[0-9]*"))]
    return next((candidate for candidate in candidates if candidate.is_dir()), default)


def _only_one(root: Path, split: str, candidates: Sequence[tuple[str, Path, Path]]) -> tuple[str, Path, Path]:
    """Raises UserError if a split has several annotation files."""
    if len(candidates) > 1:
        files = [root / list_file("", split) if kind == "voc" else file for kind, file, _ in candidates]
        names = " and ".join(str(file.relative_to(root)) for file in files)
        raise UserError(f"{root}: {names} are both the {split} split: remove one, or open the .json file directly")
    return candidates[0]
