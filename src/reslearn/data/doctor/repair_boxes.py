"""Writes a clean copy of a set with boxes in its own format; valid entries are copied unchanged."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, tostring

from reslearn.data.boxes.box_set import BoxImage, BoxSet
from reslearn.data.boxes.coco import read_document
from reslearn.data.boxes.read import sources, survey
from reslearn.data.boxes.voc import list_file, lists, parse_xml, unannotated, years
from reslearn.data.doctor.diagnosis import Diagnosis
from reslearn.data.doctor.target import check_target, new_folder
from reslearn.data.findings import Finding
from reslearn.data.images.folder import for_each
from reslearn.data.images.stream import Progress, silent
from reslearn.errors import UserError
from reslearn.files import user_path


def check_folder(target: Path) -> None:
    """Raises UserError unless `target` is a new folder."""
    if target.suffix:
        raise UserError(f"--fix {target}: sets with boxes are copied to a folder: use a name without a suffix")
    check_target(target)


def repair_boxes(diagnosis: Diagnosis, data: str | Path, target: Path, progress: Progress = silent) -> Path:
    """Copies the usable images and objects of the examined set `data` to a new folder, atomically.

    VOC stays VOC, with all its lists; COCO stays COCO, with all valid fields. Leaves out unusable images, duplicates and invalid
    objects, and clips boxes to the image. Returns the path that opens the copy: the folder, or the .json file in it if `data` is a
    .json file. Raises UserError if the set cannot be repaired.
    """
    target, root = user_path(target), user_path(data)
    check_folder(target)
    total, done = sum(len(boxes) for boxes in diagnosis.sets.values()), 0
    if not total:
        raise UserError(f"--fix {target}: nothing to write: '{diagnosis.name}' has no usable images")
    with new_folder(target) as fresh:
        for split, (form, file, _) in sources(root).items():
            images = diagnosis.sets[split].images
            findings = [finding for finding in diagnosis.sets[split].findings if finding.index is not None]
            if not images:
                continue
            if form == "coco":
                copies = _write_coco(file, fresh, split, images, findings, diagnosis)
            else:
                copies = []
                for year in years(root):
                    if images_of_year := [image for image in images if image.name.startswith(year)]:
                        copies += _write_voc(root, fresh, year, split, images_of_year, findings, diagnosis)
            for image, path in zip(images, copies, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(image.path, path)
                done += 1
                progress("copying", done, total)
        for year in years(root):
            if (fresh / year / "ImageSets" / "Main").is_dir():
                _write_other_lists(root, fresh, year, diagnosis.sets)
        inside = root.name if root.is_file() else ""
        faults = [finding for boxes in survey(fresh / inside).values() for finding in boxes.findings if finding.fault]
        if faults:
            raise UserError(f"--fix {target}: cannot repair this set automatically; the copy would still have: {faults[0]}")
    return target / inside


def count_named(data: str | Path) -> tuple[int, int]:
    """(number of images, number of objects) that a set's splits name, valid or not. Raises UserError if there is no such set."""
    images = objects = 0
    root = user_path(data)
    for split, (form, file, _) in sources(root).items():
        if form == "coco":
            document = read_document(file)
            images, objects = images + len(document["images"]), objects + len(document["annotations"])
            continue
        left_out = unannotated(root)
        annotated = [year for year in years(root) if list_file(year, split) not in left_out]
        named = dict.fromkeys((year, image) for year in annotated for image, _ in lists(root / year).get(split, ()))
        trees = for_each(lambda key: parse_xml(root / key[0] / "Annotations" / f"{key[1]}.xml"), list(named))
        images += len(named)
        objects += sum(0 if isinstance(tree, UserError) else len(tree.findall("object")) for tree in trees)
    return images, objects


def _write_voc(
    root: Path, fresh: Path, year: str, split: str, images: Sequence[BoxImage], findings: Sequence[Finding], diagnosis: Diagnosis
) -> list[Path]:
    """Writes the list and annotations of a split's images of one year. Returns the paths to copy the images to."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (fresh / year / folder).mkdir(parents=True, exist_ok=True)
    stems = [image.name.removeprefix(year) for image in images]
    (fresh / list_file(year, split)).write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    to_clip = {(finding.names[0], finding.index) for finding in findings if finding.kind == "sticks out"}
    for image, stem in zip(images, stems, strict=True):
        file = f"{year}Annotations/{stem}.xml"
        tree, valid = parse_xml(root / file), set(image.objects.ids.tolist())
        for index, element in enumerate(tree.findall("object")):
            if index not in valid:
                tree.remove(element)
            elif (file, index) in to_clip:
                _clip_voc(element, tree)
        (fresh / file).write_bytes(tostring(tree, encoding="utf-8") + b"\n")
    return [fresh / f"{year}JPEGImages" / _renamed(image.path.name, image, diagnosis) for image in images]


def _write_other_lists(root: Path, fresh: Path, year: str, sets: Mapping[str, BoxSet]) -> None:
    """Writes a year's other lists, such as trainval and the lists by class, with the images kept in `sets`.

    A list that contains a whole split loses the images that the split loses: one kept only in test is no longer in trainval.
    """
    all_lists = lists(root / year)
    listed = {split: {image for image, _ in all_lists[split]} for split in sets if split in all_lists}
    kept = {
        split: {image.name.removeprefix(year) for image in sets[split].images if image.name.startswith(year)} for split in listed
    }
    for name, lines in all_lists.items():
        if name in listed:
            continue
        whole = [split for split in listed if listed[split] <= {image for image, _ in lines}]
        dropped = {image for split in whole for image in listed[split]} - {image for split in whole for image in kept[split]}
        remaining = set().union(*kept.values()) - dropped
        text = "".join(f"{line}\n" for image, line in lines if image in remaining)
        if text:
            (fresh / list_file(year, name)).write_text(text, encoding="utf-8", errors="surrogateescape")


def _clip_voc(element: Element, tree: Element) -> None:
    """Clips a box to the annotated size, before any EXIF rotation. VOC pixels count from 1 to the size, inclusive."""
    for side, axis in (("xmin", "width"), ("ymin", "height"), ("xmax", "width"), ("ymax", "height")):
        node = element.find(f"bndbox/{side}")
        assert node is not None
        node.text = f"{min(max(float(node.text or 0), 1), float(tree.findtext(f'size/{axis}') or 0)):g}"


def _write_coco(
    file: Path, fresh: Path, split: str, images: Sequence[BoxImage], findings: Sequence[Finding], diagnosis: Diagnosis
) -> list[Path]:
    """Writes a split's file. Returns the paths to copy its images to: beside a single file, else in the split's folder."""
    document = read_document(file)
    kept = {image.id: image for image in images}
    to_clip = {finding.index for finding in findings if finding.kind == "sticks out"}
    invalid = {finding.index for finding in findings} - to_clip
    entries, sizes = {}, {}
    for entry in document["images"]:
        id = entry.get("id") if isinstance(entry, dict) else None
        if type(id) is int and id in kept and id not in entries and entry.get("file_name") == kept[id].name:
            path = PurePosixPath(kept[id].name)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(f"--fix: {file}: image {path} is outside the image folder: move it there and correct file_name")
            entries[id] = entry | {"file_name": _renamed(kept[id].name, kept[id], diagnosis)}
            sizes[id] = entry["width"], entry["height"]
    annotations = []
    for index, annotation in enumerate(document["annotations"]):
        if index not in invalid and annotation.get("image_id") in kept:
            annotations.append(_clip_coco(annotation, *sizes[annotation["image_id"]]) if index in to_clip else annotation)
    document |= {"images": [entries[image.id] for image in images], "annotations": annotations}
    document["categories"] = _valid_categories(document["categories"], diagnosis.classes)
    single = split == "all"
    folder = fresh if single else fresh / split
    target = fresh / file.name if single else fresh / "annotations" / f"instances_{split}.json"
    for path in (folder, target.parent):
        path.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document), encoding="utf-8")
    return [folder / entries[image.id]["file_name"] for image in images]


def _clip_coco(annotation: dict[str, Any], width: float, height: float) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    left, top = max(x, 0), max(y, 0)
    return annotation | {"bbox": [left, top, min(x + w, width) - left, min(y + h, height) - top]}


def _valid_categories(categories: list[Any], classes: Sequence[str]) -> list[Any]:
    """The valid categories of these classes; the first if several share an id or a name."""
    kept: list[Any] = []
    for category in categories:
        valid = isinstance(category, dict) and type(category.get("id")) is int and category.get("name") in classes
        if valid and not any(category["id"] == other["id"] or category["name"] == other["name"] for other in kept):
            kept.append(category)
    return kept


def _renamed(name: str, image: BoxImage, diagnosis: Diagnosis) -> str:
    """The image's name with the correct suffix, or unchanged if that name is taken."""
    suffix = diagnosis.suffixes.get(image.path)
    if suffix is None:
        return name
    better = name.removesuffix(image.path.suffix) + suffix
    return name if image.path.with_name(Path(better).name).exists() else better
