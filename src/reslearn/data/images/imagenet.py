"""Supports common ImageNet layouts: class folders named by WordNet ids (wnids), and flat validation images with a list of labels.

Layouts: the unpacked official archives, Kaggle's (ILSVRC/Data/CLS-LOC with LOC_*.csv and LOC_synset_mapping.txt), and Tiny
ImageNet's (images in a folder `images`, val_annotations.txt, words.txt).
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from reslearn.errors import UserError
from reslearn.files import read_text

WNID = re.compile(r"n\d{8}")
# The 1000 synsets of ILSVRC 2012 in the usual class order: sorted by wnid.
_WNIDS = Path(__file__).with_name("imagenet_wnids.txt")
_WORDS = ("LOC_synset_mapping.txt", "words.txt", "synset_words.txt", "map_clsloc.txt")
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_LISTS = {"val": re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)"), "test": re.compile(r"(^|[^a-z])test(ing)?([^a-z]|$)")}
_OFFICIAL = re.compile(r"LOC_val_solution\.csv|ILSVRC\w*_validation_ground_truth\.txt")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")


def inside(root: Path) -> Path:
    """The image folder inside Kaggle's layout; any other folder unchanged."""
    return next((root / inner for inner in _KAGGLE if (root / inner).is_dir()), root)


def is_devkit(folder: Path) -> bool:
    """Whether a folder is ImageNet's development kit."""
    return "devkit" in folder.name.lower()


def is_unlabeled(split: str, classes: Sequence[str]) -> bool:
    """Whether this split is ImageNet's test set, whose labels were never published."""
    return split == "test" and bool(classes) and all(map(WNID.fullmatch, classes))


def list_advice(flat: Sequence[Path], split: str) -> str:
    """The advice on lists to append to an error about a split's flat images; "" if it does not apply."""
    if not flat or split not in _LISTS:
        return ""
    return (
        f"; ImageNet's flat validation images need a list of labels beside them: {split}.csv, with one file,class per line; "
        "LOC_val_solution.csv; or ILSVRC2012_validation_ground_truth.txt with map_clsloc.txt or meta.mat"
    )


def readable(labels: Sequence[str], where: Path) -> tuple[str, ...]:
    """Returns readable, distinct class names: `labels` with known wnids replaced by names.

    ImageNet's 1000 classes get the names of torchvision's models, so that data and models agree. Other wnids get theirs from
    LOC_synset_mapping.txt, words.txt, synset_words.txt or map_clsloc.txt in the folder `where` or up to three folders above it.
    """
    wanted = {label for label in labels if WNID.fullmatch(label)}
    if not wanted:
        return tuple(labels)
    words: dict[str, str] = {}
    for file in (folder / name for folder in reversed(_folders(where)) for name in reversed(_WORDS)):
        if file.is_file():
            words |= _words(file, wanted)
    firsts = {wnid: synonyms.split(",")[0].strip() for wnid, synonyms in words.items()}
    firsts |= _torchvision_names(wanted)
    for longer in (words, {wnid: f"{name} ({wnid})" for wnid, name in firsts.items()}):
        count = Counter(firsts.get(label, label) for label in labels)
        firsts = {wnid: longer.get(wnid, name) if count[name] > 1 else name for wnid, name in firsts.items()}
    return tuple(firsts.get(label, label) for label in labels)


def _folders(where: Path) -> list[Path]:
    """The data's folder and the three above it."""
    folder = where.absolute()
    folder = folder if folder.is_dir() else folder.parent
    return [folder, *list(folder.parents)[:3]]


def _words(file: Path, wanted: set[str]) -> dict[str, str]:
    """{wnid: synonyms} of the wanted wnids, from lines like "n01440764 tench, Tinca tinca" or "n01440764 1 tench"."""
    words = {}
    for line in read_text(file).splitlines():
        wnid, _, rest = line.replace("\t", " ", 1).partition(" ")
        name = re.sub(r"^\d+ (?=\S+$)", "", rest.strip()).replace("_", " ")
        if wnid in wanted and name:
            words[wnid] = name
    return words


def _torchvision_names(wanted: set[str]) -> dict[str, str]:
    """{wnid: torchvision's name} of the wanted wnids among the 1000 classes."""
    wnids = _WNIDS.read_text().split()
    if wanted.isdisjoint(wnids):
        return {}
    from torchvision.models import ResNet50_Weights

    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return {wnid: name for wnid, name in zip(wnids, names, strict=True) if wnid in wanted}


def labels_of(images: Sequence[Path], base: Path, root: Path, split: str, classes: Sequence[str]) -> dict[Path, str] | None:
    """Returns the class of each flat image of a split, or None if there is no list of labels.

    A list is any .csv, .tsv or .txt file in the split's folder `base` or beside it whose name contains the split's; or an official
    list in a development kit or up to three folders above `root`. classes: train's. Raises UserError if a list is invalid or two
    lists disagree.
    """
    for folder in dict.fromkeys((base.absolute(), *_folders(root))):
        near = folder in (base.absolute(), base.absolute().parent)
        lists = {file: _read_list(file, images, classes) for file in _files_in(folder) if _is_list(file, split, near)}
        if lists:
            (first, labels), *others = lists.items()
            for file, other in others:
                for image, label in other.items():
                    if label != labels[image]:
                        raise UserError(f"{image}: {labels[image]!r} in {first}, but {label!r} in {file}: remove one of the lists")
            return labels
    return None


def _files_in(folder: Path) -> list[Path]:
    """The files in a folder and in its development kits; none if permission is denied, as for a cluster's /home."""
    try:
        folders = [folder, *sorted(path for path in folder.glob("*devkit*/data") if path.is_dir())]
        return [file for path in folders for file in sorted(path.iterdir())]
    except PermissionError:
        return []


def _is_list(file: Path, split: str, near: bool) -> bool:
    if _OFFICIAL.fullmatch(file.name):
        return split == "val" and file.is_file()
    named = split in _LISTS and bool(_LISTS[split].search(file.stem.lower()))
    return near and named and file.suffix.lower() in (".csv", ".tsv", ".txt") and file.is_file()


def _read_list(file: Path, images: Sequence[Path], classes: Sequence[str]) -> dict[Path, str]:
    """The class of each image, from one list. Raises UserError."""
    rows = _rows(file)
    if all(len(fields) == 1 for _, fields in rows):
        return _by_number(file, rows, images)
    by_name = {image.name: image for image in images} | {image.stem: image for image in images}
    labels: dict[Path, str] = {}
    all_labels: list[str] = []
    for row, (line, fields) in enumerate(rows):
        image = by_name.get(Path(fields[0]).name)
        label = fields[1] if len(fields) > 1 else ""
        label = label.split()[0] if WNID.match(label) else label  # Kaggle's list has boxes after the wnid
        if row == 0 and image is None:  # the header
            continue
        if not label:
            raise UserError(f"{file} line {line}: no class: write one file,class per line")
        all_labels.append(label)
        if image is not None and labels.setdefault(image, label) != label:
            raise UserError(f"{file} line {line}: {image.name} is {label!r} here, but {labels[image]!r} above: remove one")
    missing = [image for image in images if image not in labels]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{file}: no class for {missing[0].name}{more}: add the class, or remove the image")
    if all(label.isdecimal() for label in all_labels) and not set(all_labels) <= set(classes):
        numbers = {int(label) for label in all_labels}
        if 0 not in numbers or max(numbers) >= len(classes):
            raise UserError(f"{file}: classes are numbers ({min(numbers)} to {max(numbers)}) in an unknown order: use class names")
        labels = {image: sorted(classes)[int(label)] for image, label in labels.items()}  # as in Caffe's val.txt
    return labels


def _by_number(file: Path, rows: list[tuple[int, list[str]]], images: Sequence[Path]) -> dict[Path, str]:
    """Reads a list whose line i is the class of image ILSVRC2012_val_i: a wnid or a number of the development kit."""
    lines = [fields[0] for _, fields in rows]
    numbers = {image: int(match[1]) for image in images if (match := _NUMBERED.fullmatch(image.stem))}
    unmatched = next((image for image in images if not 1 <= numbers.get(image, 0) <= len(lines)), None)
    if unmatched is not None:
        raise UserError(f"{file}: no class for {unmatched.name}: the {len(lines):,} lines are for ILSVRC2012_val_00000001, ...")
    wnid = {line: line for line in lines} if all(map(WNID.fullmatch, lines)) else _synsets(file)
    unknown = next((row for row in rows if row[1][0] not in wnid), None)
    if unknown is not None:
        raise UserError(f"{file} line {unknown[0]}: {unknown[1][0]!r} is not a wnid or synset number")
    return {image: wnid[lines[number - 1]] for image, number in numbers.items()}


def _synsets(truth: Path) -> dict[str, str]:
    """Maps the development kit's synset numbers to wnids, from map_clsloc.txt or meta.mat."""
    text, matlab = truth.with_name("map_clsloc.txt"), truth.with_name("meta.mat")
    if text.is_file():
        rows = [line.split() for line in read_text(text).splitlines()]
        return {row[1]: row[0] for row in rows if len(row) > 1 and WNID.fullmatch(row[0])}
    if not matlab.is_file():
        raise UserError(f"{truth}: needs map_clsloc.txt or meta.mat of the development kit beside it to map its numbers to classes")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{matlab}: requires SciPy: pip install scipy (or put map_clsloc.txt beside it)") from None
    try:
        synsets = loadmat(matlab, squeeze_me=True)["synsets"]
        return {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
    except Exception as why:  # SciPy can raise anything on damaged files
        raise UserError(f"{matlab}: not the development kit's meta.mat: {why}") from None


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line except blank lines. Fields are separated by commas, tabs or spaces."""
    text = read_text(file)
    delimiter = "," if file.suffix.lower() == ".csv" else "\t" if "\t" in text else "," if "," in text else None
    rows = []
    try:
        lines = csv.reader(text.splitlines(), delimiter=delimiter) if delimiter else (line.split() for line in text.splitlines())
        for line, fields in enumerate(lines, 1):
            if any(fields):
                rows.append((line, [field.strip() for field in fields]))
    except csv.Error as why:
        raise UserError(f"{file}: not CSV: {why}") from None
    if not rows:
        raise UserError(f"{file}: empty: write one file,class per line")
    return rows
