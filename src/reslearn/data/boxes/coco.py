"""Reads COCO: a JSON file with images, categories and annotations, and a folder of images.

COCO's `bbox` is x, y, width, height, with x and y from 0: x1, y1, x2, y2 are x, y, x + width, y + height.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reslearn.data.boxes.box_set import BoxImage, BoxSet
from reslearn.data.boxes.checks import Findings, RawObject, check_objects, check_size
from reslearn.data.boxes.masks import parse, turn, turn_box
from reslearn.data.images.folder import for_each
from reslearn.errors import UserError, did_you_mean


def read_coco(path: Path, images: Path, findings: Findings, classes: Sequence[str] | None = None) -> BoxSet:
    """Returns the images of a COCO file, ordered by id. Adds problems to `findings`.

    images: the folder that file names are relative to. classes: the classes of labels 1, 2, ...; by default the categories in the
    order of their ids. `iscrowd` (default 0), `area` (default the box's) and `segmentation` are optional. Raises UserError if it is
    not a COCO file.
    """
    document = read_document(path)
    file = path.name
    labels, unknown, classes = _categories(document["categories"], file, findings, classes)
    owners: dict[int, list[RawObject]] = {}
    sizes: dict[int, tuple[Path, str, int, int]] = {}
    names: dict[str, int] = {}
    for i, entry in enumerate(document["images"]):
        try:
            id, name = _integer(entry, "id"), _string(entry, "file_name")
            height, width = _integer(entry, "height"), _integer(entry, "width")
        except ValueError as why:
            findings.add("unreadable image entry", file, f"images[{i}]: {why}")
            continue
        if id in sizes:
            findings.add("duplicate id", file, f"images[{i}]: id {id} is already used by {sizes[id][1]}")
        elif names.setdefault(name, i) != i:
            findings.add("image twice", file, f"images[{i}]: {name} is already images[{names[name]}]")
        else:
            sizes[id], owners[id] = (images / name, name, height, width), []
    ids = sorted(sizes)
    size_findings = [Findings() for _ in ids]

    def size_of(n: int) -> tuple[int, int, int] | None:
        path, name, height, width = sizes[ids[n]]
        return check_size(path, height, width, f"{file} image {name}", size_findings[n])

    true_sizes = for_each(size_of, range(len(ids)))
    for image_findings in size_findings:
        findings += image_findings
    seen: dict[int, int] = {}
    for index, entry in enumerate(document["annotations"]):
        try:
            item, image = _raw_object(index, entry, labels, unknown, sizes)
            if item.id is not None and seen.setdefault(item.id, index) != index:
                raise _ObjectError("duplicate id", f"id {item.id} is already used by annotation {seen[item.id]}")
            owners[image].append(item)
        except _ObjectError as why:
            findings.add(why.kind, file, str(why), index)
    valid = []
    for id, true_size in zip(ids, true_sizes, strict=True):
        if true_size is None or isinstance(true_size, UserError):
            continue
        source, name, height, width = sizes[id]
        rows, columns, orientation = true_size
        if orientation > 1:
            for item in owners[id]:
                item.box = turn_box(item.box, orientation, height, width)
                item.segmentation = item.segmentation and turn(item.segmentation, orientation, height, width)
        objects = check_objects(owners[id], rows, columns, file, findings)
        valid.append(BoxImage(source, name, rows, columns, objects, id))
    category_ids = tuple(sorted(labels, key=labels.__getitem__)) if len(labels) == len(classes) else None
    return BoxSet(path.stem, tuple(classes), tuple(valid), category_ids=category_ids)


class _ObjectError(ValueError):
    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def read_document(path: Path) -> dict[str, list[Any]]:
    """The content of a COCO file, with its three lists. Raises UserError."""
    try:
        document = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as why:
        raise UserError(f"{path}: cannot be read: {why.strerror}") from None
    except (ValueError, RecursionError) as why:
        raise UserError(f"{path}: not JSON: {why}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise UserError(f"{path}: not a COCO file: no list {key!r}")
    if not document["images"]:
        raise UserError(f"{path}: lists no images")
    return document


def _categories(
    entries: list[Any], file: str, findings: Findings, classes: Sequence[str] | None
) -> tuple[dict[int, int], dict[int, str], Sequence[str]]:
    """Returns ({category id: label}, {id of a category outside `classes`: error message}, class names in label order)."""
    names: dict[int, str] = {}
    unknown: dict[int, str] = {}
    for i, entry in enumerate(entries):
        try:
            id, name = _integer(entry, "id"), _string(entry, "name")
        except ValueError as why:
            findings.add("unreadable category", file, f"categories[{i}]: {why}")
            continue
        if id in names:
            findings.add("duplicate id", file, f"categories[{i}]: id {id} is already used by {names[id]!r}")
        elif name in names.values():
            findings.add("category twice", file, f"categories[{i}]: {name!r} already exists")
        elif classes is not None and name not in classes:
            unknown[id] = f"{name[:60]!r} is not one of the {len(classes)} classes{did_you_mean(name, classes)}"
            findings.add("unknown category", file, f"categories[{i}]: {unknown[id]}")
        else:
            names[id] = name
    listed = [names[id] for id in sorted(names)] if classes is None else classes
    return {id: listed.index(name) + 1 for id, name in names.items()}, unknown, listed


def _raw_object(
    index: int, entry: Any, labels: dict[int, int], unknown: dict[int, str], sizes: dict[int, tuple[Path, str, int, int]]
) -> tuple[RawObject, int]:
    """Returns (object, id of its image). Raises _ObjectError."""
    try:
        image, category = _integer(entry, "image_id"), _integer(entry, "category_id")
        id = _integer(entry, "id") if "id" in entry else None
        crowd = entry.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise ValueError(f"iscrowd is {_short(crowd)}, not 0 or 1")
        bbox, area = entry.get("bbox"), entry.get("area")
        if not isinstance(bbox, list) or len(bbox) != 4:
            raise ValueError(f"bbox is {_short(bbox)}, not x, y, width, height")
        x, y, width, height = (_real(number, "bbox") for number in bbox)
        if area is not None and not 0 <= (area := _real(area, "area")) < math.inf:
            raise ValueError(f"area is {area:g}")
    except ValueError as why:
        raise _ObjectError("unreadable object", str(why)) from None
    if image not in sizes:
        raise _ObjectError("unknown image", f"image_id {image} is not the id of a valid image")
    if category not in labels:
        text = unknown.get(category, f"category_id {category} is not the id of one of the {len(labels)} categories")
        raise _ObjectError("unknown class", text)
    _, name, rows, columns = sizes[image]
    try:
        raw = entry.get("segmentation")
        segmentation = None if raw is None else parse(raw, rows, columns)
    except ValueError as why:
        raise _ObjectError("bad segmentation", f"{why} (in {name})") from None
    return RawObject(index, labels[category], (x, y, x + width, y + height), False, bool(crowd), area, id, segmentation), image


def _integer(entry: Any, key: str) -> int:
    """The integer at a key. Raises ValueError if it is not an integer (nor is true), or if the entry is not an object."""
    if not isinstance(entry, dict):
        raise ValueError(f"{_short(entry)} is not an object")
    if key not in entry:
        raise ValueError(f"no {key}")
    value = entry[key]
    if type(value) is not int or abs(value) >= 1 << 62:
        raise ValueError(f"{key} is {_short(value)}, not an integer")
    return value


def _string(entry: dict[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a non-empty string, not {_short(value)}")
    return value


def _real(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (isinstance(value, int) and abs(value) >= 1 << 62):
        raise ValueError(f"{key} contains {_short(value)}, not a number")
    return float(value)


def _short(value: Any) -> str:
    return repr(value)[:40]
