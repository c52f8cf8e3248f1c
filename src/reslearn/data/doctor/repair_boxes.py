"""Writes a clean copy of a set with boxes in its own format: what is valid stays as it was written."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, tostring

from reslearn.data.boxes.box_set import BoxImage
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
    """Raises UserError where `repair_boxes` cannot write: it writes a folder, and never overwrites."""
    if target.suffix:
        raise UserError(f"--fix {target}: a set with boxes is copied to a folder: give a name without a suffix")
    check_target(target)


def repair_boxes(diagnosis: Diagnosis, data: str | Path, target: Path, progress: Progress = silent) -> Path:
    """Copies what is usable of the examined set `data` to a new folder, whole or not at all.

    VOC stays VOC, with all of its lists, and COCO stays COCO, with every field that is not at fault. Unusable images and
    further copies of one are left out, and so are invalid objects; boxes that stick out are cut to the image. Raises UserError
    where that is impossible. Returns what opens the copy: the folder, or the .json file in it where `data` is one.
    """
    target, root = user_path(target), user_path(data)
    check_folder(target)
    total, done = sum(len(one) for one in diagnosis.sets.values()), 0
    if not total:
        raise UserError(f"--fix {target}: nothing to write of '{diagnosis.name}': none of its images is usable")
    with new_folder(target) as fresh:
        for split, (form, file, _) in sources(root).items():
            images = diagnosis.sets[split].images
            findings = [finding for finding in diagnosis.sets[split].findings if finding.index is not None]
            if not images:
                continue
            names = (
                _coco(file, fresh, split, images, findings, diagnosis)
                if form == "coco"
                else [
                    place
                    for year in years(root)
                    if (own := _images_of(year, images))
                    for place in _voc(root / year, fresh / year, split, own, _findings_of(year, findings), diagnosis)
                ]
            )
            for image, name in zip(images, names, strict=True):
                name.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(image.path, name)
                done += 1
                progress("copying", done, total)
        for year in years(root):
            if (fresh / year / "ImageSets" / "Main").is_dir():
                kept = {split: _images_of(year, one.images) for split, one in diagnosis.sets.items()}
                _other_lists(root / year, fresh / year, kept)
        inside = root.name if root.is_file() else ""
        left = [finding for one in survey(fresh / inside).values() for finding in one.findings if finding.fault]
        if left:
            raise UserError(f"--fix {target}: leaving out does not repair this set, its copy still has {left[0]}")
    return target / inside


def count_named(data: str | Path) -> tuple[int, int]:
    """How many images and objects the files of a set name in its splits, valid or not. Raises UserError where there is no set."""
    images = objects = 0
    root = user_path(data)
    for split, (form, file, _) in sources(root).items():
        if form == "coco":
            document = read_document(file)
            images, objects = images + len(document["images"]), objects + len(document["annotations"])
            continue
        left_out = unannotated(root)
        there = [year for year in years(root) if list_file(year, split) not in left_out]
        named = dict.fromkeys((year, image) for year in there for image, _ in lists(root / year).get(split, ()))
        trees = for_each(lambda place: parse_xml(root / place[0] / "Annotations" / f"{place[1]}.xml"), list(named))
        images += len(named)
        objects += sum(0 if isinstance(tree, UserError) else len(tree.findall("object")) for tree in trees)
    return images, objects


def _images_of(year: str, images: Sequence[BoxImage]) -> list[BoxImage]:
    """The images of one folder of a devkit, with their names in that folder."""
    return [replace(image, name=image.name.removeprefix(year)) for image in images if image.name.startswith(year)]


def _findings_of(year: str, findings: Sequence[Finding]) -> list[Finding]:
    return [replace(f, names=(f.names[0].removeprefix(year),)) for f in findings if f.names[0].startswith(year)]


def _voc(
    root: Path, fresh: Path, split: str, images: Sequence[BoxImage], findings: Sequence[Finding], diagnosis: Diagnosis
) -> list[Path]:
    """Writes a split's list and annotations. Returns where its images belong."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (fresh / folder).mkdir(parents=True, exist_ok=True)
    (fresh / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{image.name}\n" for image in images), encoding="utf-8")
    sticking = {(finding.names[0], finding.index) for finding in findings if finding.kind == "sticks out"}
    for image in images:
        file = f"Annotations/{image.name}.xml"
        tree, valid = parse_xml(root / file), set(image.objects.ids.tolist())
        for index, element in enumerate(tree.findall("object")):
            if index not in valid:
                tree.remove(element)
            elif (file, index) in sticking:
                _cut(element, tree)
        (fresh / file).write_bytes(tostring(tree, encoding="utf-8") + b"\n")
    return [fresh / "JPEGImages" / _renamed(image.path.name, image, diagnosis) for image in images]


def _other_lists(root: Path, fresh: Path, images: Mapping[str, Sequence[BoxImage]]) -> None:
    """Writes the other lists, such as trainval and those by class, with the images that are kept. images: by split.

    A list that contains a whole split loses what the split loses: an image kept only in test is no longer in trainval.
    """
    all_lists = lists(root)
    listed = {split: {image for image, _ in all_lists[split]} for split in images if split in all_lists}
    kept = {split: {image.name for image in images[split]} for split in listed}
    for name, lines in all_lists.items():
        if name in listed:
            continue
        whole = [split for split in listed if listed[split] <= {image for image, _ in lines}]
        lost = {image for split in whole for image in listed[split]} - {image for split in whole for image in kept[split]}
        some = set().union(*kept.values()) - lost
        text = "".join(f"{line}\n" for image, line in lines if image in some)
        if text:
            (fresh / "ImageSets" / "Main" / f"{name}.txt").write_text(text, encoding="utf-8", errors="surrogateescape")


def _cut(element: Element, tree: Element) -> None:
    """Cuts a box to the size that its annotation gives, before any turning by EXIF. VOC counts from 1 to the last pixel."""
    for side, axis in (("xmin", "width"), ("ymin", "height"), ("xmax", "width"), ("ymax", "height")):
        node = element.find(f"bndbox/{side}")
        assert node is not None
        node.text = f"{min(max(float(node.text or 0), 1), float(tree.findtext(f'size/{axis}') or 0)):g}"


def _coco(
    file: Path, fresh: Path, split: str, images: Sequence[BoxImage], findings: Sequence[Finding], diagnosis: Diagnosis
) -> list[Path]:
    """Writes a split's file. Returns where its images belong: beside a single file, else in the split's folder."""
    document = read_document(file)
    kept = {image.id: image for image in images}
    sticking = {finding.index for finding in findings if finding.kind == "sticks out"}
    invalid = {finding.index for finding in findings} - sticking
    entries, sizes = {}, {}
    for entry in document["images"]:
        id = entry.get("id") if isinstance(entry, dict) else None
        if type(id) is int and id in kept and id not in entries and entry.get("file_name") == kept[id].name:
            place = PurePosixPath(kept[id].name)
            if place.is_absolute() or ".." in place.parts:
                raise UserError(f"--fix: {file}: the image {kept[id].name} is outside its folder, so it has no place in a copy")
            entries[id] = entry | {"file_name": _renamed(kept[id].name, kept[id], diagnosis)}
            sizes[id] = entry["width"], entry["height"]
    annotations = []
    for index, one in enumerate(document["annotations"]):
        if index not in invalid and one.get("image_id") in kept:
            annotations.append(_inside(one, *sizes[one["image_id"]]) if index in sticking else one)
    document |= {"images": [entries[image.id] for image in images], "annotations": annotations}
    document["categories"] = _valid_categories(document["categories"], diagnosis.classes)
    whole = split == "all"
    folder = fresh if whole else fresh / split
    target = fresh / file.name if whole else fresh / "annotations" / f"instances_{split}.json"
    for path in (folder, target.parent):
        path.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document), encoding="utf-8")
    return [folder / entries[image.id]["file_name"] for image in images]


def _inside(annotation: dict[str, Any], width: float, height: float) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    left, top = max(x, 0), max(y, 0)
    return annotation | {"bbox": [left, top, min(x + w, width) - left, min(y + h, height) - top]}


def _valid_categories(categories: list[Any], classes: Sequence[str]) -> list[Any]:
    """The valid categories of these classes; of several with one id or name, the first."""
    kept: list[Any] = []
    for one in categories:
        valid = isinstance(one, dict) and type(one.get("id")) is int and one.get("name") in classes
        if valid and not any(one["id"] == other["id"] or one["name"] == other["name"] for other in kept):
            kept.append(one)
    return kept


def _renamed(name: str, image: BoxImage, diagnosis: Diagnosis) -> str:
    """A name with the suffix that fits the image's format, unless another file has that name."""
    suffix = diagnosis.suffixes.get(image.path)
    if suffix is None:
        return name
    better = name.removesuffix(image.path.suffix) + suffix
    return name if image.path.with_name(Path(better).name).exists() else better
