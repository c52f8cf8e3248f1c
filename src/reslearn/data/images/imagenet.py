"""Supports common ImageNet layouts: folders named by WordNet ids (wnids), and flat validation images with a list beside them.

Layouts: the official archives unpacked, Kaggle's (ILSVRC/Data/CLS-LOC with LOC_*.csv and LOC_synset_mapping.txt), Tiny ImageNet's
(images in a folder `images`, val_annotations.txt, words.txt).
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from reslearn.errors import UserError
from reslearn.files import read_text

WNID = re.compile(r"n\d{8}")
# The 1000 synsets of ILSVRC 2012 in the usual order of classes, which is that of their numbers.
_WNIDS = Path(__file__).with_name("imagenet_wnids.txt")
_WORDS = ("LOC_synset_mapping.txt", "words.txt", "synset_words.txt", "map_clsloc.txt")
_KAGGLE = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_LISTS = {"val": re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)"), "test": re.compile(r"(^|[^a-z])test(ing)?([^a-z]|$)")}
_OFFICIAL = re.compile(r"LOC_val_solution\.csv|ILSVRC\w*_validation_ground_truth\.txt")
_NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})")


def inside(root: Path) -> Path:
    """Where the images are below Kaggle's folder; any other folder as it is."""
    return next((root / inner for inner in _KAGGLE if (root / inner).is_dir()), root)


def is_devkit(folder: Path) -> bool:
    """Whether a folder beside train/ and val/ is the development kit."""
    return "devkit" in folder.name.lower()


def is_unlabeled(split: str, classes: Sequence[str]) -> bool:
    """Whether the flat images of this split are ImageNet's test images, whose classes were never published."""
    return split == "test" and bool(classes) and all(map(WNID.fullmatch, classes))


def what_is_needed(flat: Sequence[Path], split: str) -> str:
    """The end of an error about the flat images of a split."""
    if not flat or split not in _LISTS:
        return ""
    return (
        f"; ImageNet's own validation images need a list beside them: {split}.csv, with a file and its class a line; "
        "LOC_val_solution.csv; or ILSVRC2012_validation_ground_truth.txt with map_clsloc.txt or meta.mat"
    )


def readable(labels: Sequence[str], where: Path) -> tuple[str, ...]:
    """Readable, distinct names of the classes: `labels`, with a name for each wnid that has one.

    ImageNet's 1000 have the names that torchvision's models have, so that one class is called the same in data and in models; other
    wnids those of a file (LOC_synset_mapping.txt, words.txt, synset_words.txt, map_clsloc.txt) in the folder `where`, or up to
    three above it.
    """
    wanted = {label for label in labels if WNID.fullmatch(label)}
    if not wanted:
        return tuple(labels)
    words: dict[str, str] = {}
    for file in (place / name for place in reversed(_places(where)) for name in reversed(_WORDS)):
        if file.is_file():
            words |= _words(file, wanted)
    firsts = {wnid: synonyms.split(",")[0].strip() for wnid, synonyms in words.items()}
    firsts |= _usual(wanted)
    for longer in (words, {wnid: f"{name} ({wnid})" for wnid, name in firsts.items()}):
        count = Counter(firsts.get(label, label) for label in labels)
        firsts = {wnid: longer.get(wnid, name) if count[name] > 1 else name for wnid, name in firsts.items()}
    return tuple(firsts.get(label, label) for label in labels)


def _places(where: Path) -> list[Path]:
    """The folder of the data, and the three above it."""
    folder = where.absolute()
    folder = folder if folder.is_dir() else folder.parent
    return [folder, *list(folder.parents)[:3]]


def _words(file: Path, wanted: set[str]) -> dict[str, str]:
    """{wnid: synonyms} of the wanted wnids, from lines "n01440764 tench, Tinca tinca" or "n01440764 1 tench"."""
    words = {}
    for line in read_text(file).splitlines():
        wnid, _, rest = line.replace("\t", " ", 1).partition(" ")
        name = re.sub(r"^\d+ (?=\S+$)", "", rest.strip()).replace("_", " ")
        if wnid in wanted and name:
            words[wnid] = name
    return words


def _usual(wanted: set[str]) -> dict[str, str]:
    """torchvision's names of those of the 1000 that are wanted."""
    wnids = _WNIDS.read_text().split()
    if wanted.isdisjoint(wnids):
        return {}
    from torchvision.models import ResNet50_Weights

    names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    return {wnid: name for wnid, name in zip(wnids, names, strict=True) if wnid in wanted}


def labels_of(images: Sequence[Path], part: Path, root: Path, split: str, classes: Sequence[str]) -> dict[Path, str] | None:
    """The class of each flat image of a split, from the lists beside it; None where there is no list.

    A list is any .csv, .tsv or .txt with the split's name in its own, in `part` or beside it; or an official one in a development
    kit or up to three folders above. classes: train's. Raises UserError for a list that cannot be used, and for two that disagree.
    """
    for place in dict.fromkeys((part.absolute(), *_places(root))):
        own = place in (part.absolute(), part.absolute().parent)
        lists = {file: _read(file, images, classes) for file in _beside(place) if _is_list(file, split, own)}
        if lists:
            (first, labels), *others = lists.items()
            for file, other in others:
                for image, label in other.items():
                    if label != labels[image]:
                        raise UserError(
                            f"{image}: is {labels[image]!r} in {first}, but {label!r} in {file}: remove one of the lists"
                        )
            return labels
    return None


def _beside(place: Path) -> list[Path]:
    """The files in a folder, and in development kits there; none where it may not be listed, as /home of a cluster."""
    try:
        kits = [place, *sorted(path for path in place.glob("*devkit*/data") if path.is_dir())]
        return [file for kit in kits for file in sorted(kit.iterdir())]
    except PermissionError:
        return []


def _is_list(file: Path, split: str, own: bool) -> bool:
    if _OFFICIAL.fullmatch(file.name):
        return split == "val" and file.is_file()
    named = split in _LISTS and bool(_LISTS[split].search(file.stem.lower()))
    return own and named and file.suffix.lower() in (".csv", ".tsv", ".txt") and file.is_file()


def _read(file: Path, images: Sequence[Path], classes: Sequence[str]) -> dict[Path, str]:
    """The class of each of the images from one list. Raises UserError."""
    rows = _rows(file)
    if all(len(fields) == 1 for _, fields in rows):
        return _by_number(file, rows, images)
    by_name = {image.name: image for image in images} | {image.stem: image for image in images}
    labels: dict[Path, str] = {}
    every: list[str] = []
    for row, (line, fields) in enumerate(rows):
        image = by_name.get(Path(fields[0]).name)
        label = fields[1] if len(fields) > 1 else ""
        label = label.split()[0] if WNID.match(label) else label  # Kaggle's lists boxes behind it
        if row == 0 and image is None:  # the header
            continue
        if not label:
            raise UserError(f"{file} line {line}: no class: write a file and its class a line")
        every.append(label)
        if image is not None and labels.setdefault(image, label) != label:
            raise UserError(f"{file} line {line}: {image.name} is {label!r} here, but {labels[image]!r} above: remove one")
    _complete(file, images, labels)
    if all(label.isdecimal() for label in every) and not set(every) <= set(classes):
        numbers = {int(label) for label in every}
        if 0 not in numbers or max(numbers) >= len(classes):
            raise UserError(
                f"{file}: its classes are numbers from {min(numbers)} to {max(numbers)}, whose order is unknown: write names"
            )
        labels = {image: sorted(classes)[int(label)] for image, label in labels.items()}  # as in Caffe's val.txt
    return labels


def _complete(file: Path, images: Sequence[Path], labels: dict[Path, str]) -> None:
    lacking = [image for image in images if image not in labels]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"{file}: says nothing of {lacking[0].name}{more}: add the class, or remove the image")


def _by_number(file: Path, rows: list[tuple[int, list[str]]], images: Sequence[Path]) -> dict[Path, str]:
    """Line i is the class of image ILSVRC2012_val_i: a wnid, or the development kit's own number of it."""
    lines = [fields[0] for _, fields in rows]
    numbers = {image: int(match[1]) for image in images if (match := _NUMBERED.fullmatch(image.stem))}
    odd = next((image for image in images if not 1 <= numbers.get(image, 0) <= len(lines)), None)
    if odd is not None:
        raise UserError(f"{file}: has {len(lines):,} lines without names of files, which do not tell the class of {odd.name}")
    wnid = {line: line for line in lines} if all(map(WNID.fullmatch, lines)) else _synsets(file)
    unknown = next((row for row in rows if row[1][0] not in wnid), None)
    if unknown is not None:
        raise UserError(f"{file} line {unknown[0]}: {unknown[1][0]!r} is no wnid and no number of a synset")
    return {image: wnid[lines[number - 1]] for image, number in numbers.items()}


def _synsets(truth: Path) -> dict[str, str]:
    """Maps the development kit's numbers, which follow no order, to wnids: from map_clsloc.txt or meta.mat."""
    text, matlab = truth.with_name("map_clsloc.txt"), truth.with_name("meta.mat")
    if text.is_file():
        rows = [line.split() for line in read_text(text).splitlines()]
        return {row[1]: row[0] for row in rows if len(row) > 1 and WNID.fullmatch(row[0])}
    if not matlab.is_file():
        raise UserError(f"{truth}: its numbers need the kit's map_clsloc.txt or meta.mat beside it, which say what they mean")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{matlab}: is read with SciPy: pip install scipy (or put map_clsloc.txt beside it)") from None
    try:
        synsets = loadmat(matlab, squeeze_me=True)["synsets"]
        return {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
    except Exception as why:  # SciPy raises nearly anything on damaged files
        raise UserError(f"{matlab}: not the development kit's: {why}") from None


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line but blank ones; fields are parted by commas, tabs or, in a .txt, space."""
    text = read_text(file)
    mark = "," if file.suffix.lower() == ".csv" else "\t" if "\t" in text else "," if "," in text else None
    rows = []
    try:
        lines = csv.reader(text.splitlines(), delimiter=mark) if mark else (line.split() for line in text.splitlines())
        for line, fields in enumerate(lines, 1):
            if any(fields):
                rows.append((line, [field.strip() for field in fields]))
    except csv.Error as why:
        raise UserError(f"{file}: not CSV: {why}") from None
    if not rows:
        raise UserError(f"{file}: is empty: write a file and its class a line")
    return rows
