"""Reads Pascal VOC: a folder with Annotations/NAME.xml, JPEGImages/NAME.jpg and ImageSets/Main/SPLIT.txt, or a devkit of such.

VOC publishes no annotations of the tests after 2007, which only its server evaluates: a test list without one annotated image is
left out, with a note.

A devkit (VOCdevkit/VOC2007, VOCdevkit/VOC2012) is one set: a split has the images of all years that have a list of that name, so
that trainval is what papers call 07+12, and test is that of 2007. So 07++12 (trainval and test of 2007, trainval of
2012) can be trained on, by a list of one name in both years, but its test, that of 2012, takes the server.

VOC counts pixels from 1 and its xmax, ymax are the last pixels inside: x1, y1, x2, y2 here are xmin - 1, ymin - 1, xmax, ymax.
A box with xmax = xmin is a click without a drag and counts as one without area.
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
"""The largest annotation of one image that is read."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)

_NESTED = ("VOC2008", "VOC2009", "VOC2010", "VOC2011", "VOC2012")


def years(root: Path) -> list[str]:
    """What the names of images and the paths of files begin with: [""] in a single folder, ["VOC2007/", "VOC2012/"] in a devkit."""
    if (root / "Annotations").is_dir():
        return [""]
    folders = sorted(root.glob("VOC[0-9][0-9][0-9][0-9]"))
    return [f"{year.name}/" for year in folders if (year / "Annotations").is_dir() or (year / "ImageSets" / "Main").is_dir()]


def splits(root: Path) -> list[str]:
    """The names in ImageSets/Main, but those of the lists by class (cat_train), which repeat the others.

    Raises UserError for a devkit whose years have images in common, or no lists.
    """
    there = years(root)
    if len(nested := [name for year in there if (name := year.rstrip("/")) in _NESTED]) > 1:
        raise UserError(
            f"{root}: {nested[0]} and {nested[-1]} have images in common, as each year from 2008 on has those of the "
            f"years before it: keep one of them here, or give one by itself, such as {root / nested[-1]}"
        )
    names_of_splits, left_out = set(), unannotated(root)
    for year in there:
        names = {path.stem for path in (root / f"{year}ImageSets/Main").glob("*.txt")}
        own = {name for name in names if name.rpartition("_")[2] not in names - {name}}
        if year and not own:
            raise UserError(
                f"{root / year}: has no lists of images in ImageSets/Main, as VOC has from 2007 on: move it out of here"
            )
        names_of_splits |= {name for name in own if list_file(year, name) not in left_out}
    return sorted(names_of_splits)


def unannotated(root: Path) -> dict[str, int]:
    """The test lists without one annotated image, and how many images each names."""
    counts = {}
    for year in years(root):
        if (root / (file := list_file(year, "test"))).is_file():
            with suppress(UserError):  # a list that cannot be read is for whoever asks for it
                stems = _stems(root, file, Findings())
                if not any((root / f"{year}Annotations" / f"{stem}.xml").is_file() for stem in stems):
                    counts[file] = len(stems)
    return counts


def note_left_out(root: Path, findings: Findings) -> None:
    """A note for each list of `unannotated`."""
    for file, n in unannotated(root).items():
        findings.add("not annotated", file, f"none of its {n:,} images has a file in Annotations: left out")


def lists(root: Path) -> dict[str, list[tuple[str, str]]]:
    """(image, line) of each line of every file in ImageSets/Main, by the file's name without suffix. A list by class (cat_train)
    has a second column after the image, whether it has such an object."""
    plain = {*splits(root), *(Path(file).stem for file in unannotated(root))}
    contents = {}
    for path in sorted((root / "ImageSets" / "Main").glob("*.txt")):
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        stripped = [line.strip() for line in lines if line.strip()]
        contents[path.stem] = [(line if path.stem in plain else line.rsplit(None, 1)[0], line) for line in stripped]
    return contents


def read_voc(root: Path, split: str, findings: Findings, classes: Sequence[str] | None = None) -> BoxSet:
    """The images of a split with their objects; what is wrong goes into `findings`, whose policy is the caller's.

    `classes` gives the labels 1, 2, ...; without it they are the sorted names in these files. Raises UserError where there
    is no such split.
    """
    left_out = unannotated(root) if split == "test" else {}
    there = [year for year in years(root) if (root / (file := list_file(year, split))).is_file() and file not in left_out]
    if not there:
        raise UserError(f"{root}: no split {split!r}{did_you_mean(split, splits(root))}")
    documents = [document for year in there for document in _documents(root, year, split, findings)]
    if classes is None:
        classes = sorted({name for *_, tree in documents for o in tree.findall("object") if (name := _text(o, "name"))})
    photos: dict[str, list[Path]] = {}
    for year in there:
        for path in sorted((root / f"{year}JPEGImages").glob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                photos.setdefault(year + path.stem, []).append(path)
    images = []
    for year, stem, file, tree in documents:
        files = photos.get(year + stem, [root / f"{year}JPEGImages" / f"{stem}.jpg"])
        if len(files) > 1:
            names = " and ".join(path.name for path in files)
            findings.add("two images", file, f"{names} are both its image: remove one")
        elif image := _image(files[0], year + stem, file, tree, classes, findings):
            images.append(image)
    return BoxSet(f"{root.resolve().name}/{split}", tuple(classes), tuple(images))


Document = tuple[str, str, str, Element]


def _documents(root: Path, year: str, split: str, findings: Findings) -> Iterator[Document]:
    """(year, stem, file, its root) of each annotation that can be read."""
    stems = _stems(root, list_file(year, split), findings)
    files = [f"{year}Annotations/{stem}.xml" for stem in stems]
    trees = for_each(lambda file: parse_xml(root / file), files)
    for stem, file, tree in zip(stems, files, trees, strict=True):
        if isinstance(tree, UserError):
            findings.add("unreadable annotation", file, str(tree))
        elif tree.tag != "annotation":
            findings.add("unreadable annotation", file, f"its root is <{tree.tag[:40]}>, not <annotation>")
        else:
            yield year, stem, file, tree


def list_file(year: str, split: str) -> str:
    """Where a folder of a devkit ("VOC2007/"; "" is a single one) lists the images of a split."""
    return f"{year}ImageSets/Main/{split}.txt"


def _stems(root: Path, file: str, findings: Findings) -> list[str]:
    first: dict[str, int] = {}
    for number, line in enumerate(read_text(root / file).splitlines(), 1):
        if (stem := line.strip()) and first.setdefault(stem, number) != number:
            text = f"{stem[:60]} on line {number} is on line {first[stem]} already"
            findings.add("image twice", file, text)
    if not first:
        raise UserError(f"{root / file}: names no images")
    return [*first]


def parse_xml(path: Path) -> Element:
    """The document's root. Raises UserError, naming the file, for what is no XML, too large, or has a DOCTYPE.

    Documents with a DOCTYPE can declare entities that grow without end or read other files; annotations have none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as why:
        raise UserError(f"{str(path)!r}: cannot be read: {why}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES >> 20} MB, which no annotation of an image needs")
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = builder.start, builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: object) -> None:
        raise UserError(f"{path}: has a DOCTYPE, which annotations do not need and which is not read: remove it")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
        return builder.close()
    except UserError:
        raise
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as why:  # an encoding that is unknown, too
        raise UserError(f"{path}: not XML: {why}") from None


def _image(path: Path, called: str, file: str, tree: Element, classes: Sequence[str], findings: Findings) -> BoxImage | None:
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
            name = _one(element, "name")
            if name not in classes:
                text = f"{name[:60]!r} is none of the {len(classes)} classes{did_you_mean(name, classes)}"
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
        objects.append(RawObject(index, classes.index(name) + 1, box, difficult == "1", written=written))
    return BoxImage(path, called, rows, columns, check_objects(objects, rows, columns, file, findings, min_side=1))


def _text(element: Element, path: str) -> str:
    """The text at a path of tags, without the space around it; "" where there is none."""
    return (element.findtext(path) or "").strip()


def _one(element: Element, path: str) -> str:
    """The text at a path that is there once. Raises ValueError."""
    nodes = element.findall(path)
    if len(nodes) != 1:
        raise ValueError(f"{len(nodes) or 'no'} <{path.replace('/', '><')}>")
    text = (nodes[0].text or "").strip()
    if not text:
        raise ValueError(f"an empty <{path.replace('/', '><')}>")
    return text


def _number(element: Element, path: str) -> float:
    """The number at a path, as decimals, or nan and inf (which check_objects rejects). Raises ValueError."""
    text = _one(element, path)
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{path.rpartition('/')[2]} is {text[:40]!r}, not a number")
    return float(text)
