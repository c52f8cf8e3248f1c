"""Reads Pascal VOC: a folder with Annotations/NAME.xml, JPEGImages/NAME.jpg and ImageSets/Main/SPLIT.txt, or a devkit.

The annotations of VOC's test sets after 2007 are not public; only its server evaluates them. A test list without any annotated
image is left out, with a note.

A devkit (VOCdevkit/VOC2007, VOCdevkit/VOC2012) is one set: a split contains the images of every year that has a list of that name.
So trainval is what papers call 07+12, and test is that of 2007. To train on 07++12 (trainval and test of 2007, trainval of 2012),
add a list of the same name to both years; its test set, that of 2012, requires the server.

VOC counts pixels from 1, and xmax, ymax are the last pixels inside: x1, y1, x2, y2 are xmin - 1, ymin - 1, xmax, ymax. A box with
xmax = xmin is a click without a drag and counts as a box without area.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from reslearn.data.boxes.box_set import BoxImage, BoxSet
from reslearn.data.boxes.checks import Findings, RawObject, check_objects, check_size
from reslearn.data.boxes.masks import turn_box
from reslearn.data.images.files import IMAGE_SUFFIXES
from reslearn.data.images.folder import for_each
from reslearn.errors import UserError, did_you_mean
from reslearn.files import read_text

MAX_BYTES = 16 << 20
"""The largest annotation file to read."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)

_NESTED = ("VOC2008", "VOC2009", "VOC2010", "VOC2011", "VOC2012")


def years(root: Path) -> list[str]:
    """The prefixes of image names and file paths: [""] for a single folder, ["VOC2007/", "VOC2012/"] for a devkit."""
    if (root / "Annotations").is_dir():
        return [""]
    folders = sorted(root.glob("VOC[0-9][0-9][0-9][0-9]"))
    return [f"{year.name}/" for year in folders if (year / "Annotations").is_dir() or (year / "ImageSets" / "Main").is_dir()]


def splits(root: Path) -> list[str]:
    """The names of the lists in ImageSets/Main, except those by class (cat_train), which repeat the others.

    Raises UserError for a devkit whose years share images or have no lists.
    """
    folders = years(root)
    if len(nested := [name for year in folders if (name := year.rstrip("/")) in _NESTED]) > 1:
        raise UserError(
            f"{root}: {nested[0]} and {nested[-1]} have images in common, as VOC2008 to VOC2012 each contain the earlier ones: "
            f"keep one of them, or open one directly, such as {root / nested[-1]}"
        )
    split_names, left_out = set(), unannotated(root)
    for year in folders:
        names = {path.stem for path in (root / f"{year}ImageSets/Main").glob("*.txt")}
        own = {name for name in names if name.rpartition("_")[2] not in names - {name}}
        if year and not own:
            raise UserError(f"{root / year}: no image lists in ImageSets/Main: add them, or move this folder out of the devkit")
        split_names |= {name for name in own if list_file(year, name) not in left_out}
    return sorted(split_names)


def unannotated(root: Path) -> dict[str, int]:
    """{test list without any annotated image: number of images}."""
    counts = {}
    for year in years(root):
        if (root / (file := list_file(year, "test"))).is_file():
            with suppress(UserError):  # an unreadable list raises when it is opened
                stems = _stems(root, file, Findings())
                if not any((root / f"{year}Annotations" / f"{stem}.xml").is_file() for stem in stems):
                    counts[file] = len(stems)
    return counts


def lists(root: Path) -> dict[str, list[tuple[str, str]]]:
    """{file name without suffix: [(image, line), ...]} of every list in ImageSets/Main. The lines of a list by class (cat_train)
    have a second column: whether the image contains the class."""
    plain = {*splits(root), *(Path(file).stem for file in unannotated(root))}
    contents = {}
    for path in sorted((root / "ImageSets" / "Main").glob("*.txt")):
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        stripped = [line.strip() for line in lines if line.strip()]
        contents[path.stem] = [(line if path.stem in plain else line.rsplit(None, 1)[0], line) for line in stripped]
    return contents


def read_voc(root: Path, split: str, findings: Findings, classes: Sequence[str] | None = None) -> BoxSet:
    """Returns the images of a split. Adds problems to `findings`.

    classes: the classes of labels 1, 2, ...; by default the sorted class names in the annotations. Raises UserError if there is no
    such split.
    """
    left_out = unannotated(root) if split == "test" else {}
    listed = [year for year in years(root) if (root / (file := list_file(year, split))).is_file() and file not in left_out]
    if not listed:
        raise UserError(f"{root}: no split {split!r}{did_you_mean(split, splits(root))}")
    documents = [document for year in listed for document in _documents(root, year, split, findings)]
    if classes is None:
        classes = sorted({name for *_, tree in documents for o in tree.findall("object") if (name := _text(o, "name"))})
    photos: dict[str, list[Path]] = {}
    for year in listed:
        for path in sorted((root / f"{year}JPEGImages").glob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                photos.setdefault(year + path.stem, []).append(path)
    images = []
    for year, stem, file, tree in documents:
        files = photos.get(year + stem, [root / f"{year}JPEGImages" / f"{stem}.jpg"])
        if len(files) > 1:
            names = " and ".join(path.name for path in files)
            findings.add("two images", file, f"{names} both match this annotation: remove one")
        elif image := _image(files[0], year + stem, file, tree, classes, findings):
            images.append(image)
    return BoxSet(f"{root.resolve().name}/{split}", tuple(classes), tuple(images))


Document = tuple[str, str, str, Element]


def _documents(root: Path, year: str, split: str, findings: Findings) -> Iterator[Document]:
    """Yields (year, stem, file, root element) of each readable annotation."""
    stems = _stems(root, list_file(year, split), findings)
    files = [f"{year}Annotations/{stem}.xml" for stem in stems]
    trees = for_each(lambda file: parse_xml(root / file), files)
    for stem, file, tree in zip(stems, files, trees, strict=True):
        if isinstance(tree, UserError):
            findings.add("unreadable annotation", file, str(tree))
        elif tree.tag != "annotation":
            findings.add("unreadable annotation", file, f"root element is <{tree.tag[:40]}>, not <annotation>")
        else:
            yield year, stem, file, tree


def list_file(year: str, split: str) -> str:
    """The path of a split's image list. year: a prefix from `years`."""
    return f"{year}ImageSets/Main/{split}.txt"


def _stems(root: Path, file: str, findings: Findings) -> list[str]:
    first: dict[str, int] = {}
    for number, line in enumerate(read_text(root / file).splitlines(), 1):
        if (stem := line.strip()) and first.setdefault(stem, number) != number:
            findings.add("image twice", file, f"{stem[:60]} on line {number} is already on line {first[stem]}")
    if not first:
        raise UserError(f"{root / file}: lists no images")
    return [*first]


def parse_xml(path: Path) -> Element:
    """Returns the root element of an XML file. Raises UserError if it is not XML, too large, or has a DOCTYPE.

    A DOCTYPE can declare entities that expand exponentially or read other files; annotations do not need one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as why:
        raise UserError(f"{str(path)!r}: cannot be read: {why}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: larger than the limit of {MAX_BYTES >> 20} MB for an annotation file")
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: object) -> None:
        raise UserError(f"{path}: has a DOCTYPE, which is not allowed: remove it")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
        return builder.close()
    except UserError:
        raise
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as why:  # includes unknown encodings
        raise UserError(f"{path}: not XML: {why}") from None


def _image(path: Path, name: str, file: str, tree: Element, classes: Sequence[str], findings: Findings) -> BoxImage | None:
    try:
        height, width = (_number(tree, f"size/{side}") for side in ("height", "width"))
    except ValueError as why:
        findings.add("unreadable annotation", file, str(why))
        return None
    size = check_size(path, height, width, file, findings)
    if size is None:
        return None
    rows, columns, orientation = size
    objects = []
    for index, element in enumerate(tree.findall("object")):
        try:
            label = _one(element, "name")
            if label not in classes:
                text = f"{label[:60]!r} is not one of the {len(classes)} classes{did_you_mean(label, classes)}"
                findings.add("unknown class", file, text, index)
                continue
            x1, y1, x2, y2 = (_number(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            difficult = _text(element, "difficult") or "0"
            if difficult not in ("0", "1"):
                raise ValueError(f"difficult is {difficult[:40]!r}, not 0 or 1")
        except ValueError as why:
            findings.add("unreadable object", file, str(why), index)
            continue
        box = turn_box([x1 - 1, y1 - 1, x2, y2], orientation, int(height), int(width))
        written = f"xmin {x1:g}, ymin {y1:g}, xmax {x2:g}, ymax {y2:g}"
        objects.append(RawObject(index, classes.index(label) + 1, box, difficult == "1", written=written))
    return BoxImage(path, name, rows, columns, check_objects(objects, rows, columns, file, findings, min_side=1))


def _text(element: Element, path: str) -> str:
    """The stripped text at a path of tags; "" if there is none."""
    return (element.findtext(path) or "").strip()


def _one(element: Element, path: str) -> str:
    """The stripped text of the only element at a path. Raises ValueError if there is not exactly one, or if it is empty."""
    nodes = element.findall(path)
    if len(nodes) != 1:
        raise ValueError(f"{len(nodes) or 'no'} <{path.replace('/', '><')}>")
    text = (nodes[0].text or "").strip()
    if not text:
        raise ValueError(f"empty <{path.replace('/', '><')}>")
    return text


def _number(element: Element, path: str) -> float:
    """The number at a path: decimal, nan or inf (check_objects rejects these two). Raises ValueError."""
    text = _one(element, path)
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{path.rpartition('/')[2]} is {text[:40]!r}, not a number")
    return float(text)
