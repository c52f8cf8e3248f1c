"""Annotated sets that tests write for themselves."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reslearn.data.boxes.read import survey
from reslearn.data.findings import Finding

SIZE = (40, 60)  # height, width


def photo(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> Path:
    """A gray image of this stored height and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.full((*size, 3), 128, np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(path, exif=exif)
    return path


def voc_object(box: Sequence[Any], name: str = "cat", more: str = "") -> str:
    corners = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("ymax", "xmin", "ymin", "xmax"), box_order(box), strict=True)
    )
    return f"<object>{more}<bndbox>{corners}</bndbox><name>{name}</name></object>"


def box_order(box: Sequence[Any]) -> list[Any]:
    """xmin, ymin, xmax, ymax -> the order they are written in, which is nobody's: readers must go by the tag."""
    return [box[3], box[0], box[1], box[2]]


def voc_xml(*objects: str, size: tuple[int, int] = SIZE) -> str:
    return f"<annotation>{''.join(objects)}<size><width>{size[1]}</width><height>{size[0]}</height></size></annotation>"


def voc(root: Path, documents: dict[str, str], split: str = "train", orientation: int = 1) -> Path:
    """A VOC folder with these documents by name, an image for each, and one split of them all."""
    for name, document in documents.items():
        photo(root / "JPEGImages" / f"{name}.jpg", orientation=orientation)
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(document)
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(documents) + "\n")
    return root


def annotation(id: int = 1, image: int = 1, category: int = 3, bbox: Any = (5, 6, 7, 8), **more: Any) -> dict[str, Any]:
    return {
        "id": id,
        "image_id": image,
        "category_id": category,
        "bbox": bbox if not isinstance(bbox, tuple) else list(bbox),
    } | more


def coco(root: Path, annotations: Sequence[Any], **changes: Any) -> Path:
    """A COCO file with two images (a.jpg, id 1; b.jpg, id 2) and the categories 3 cat and 7 dog; `changes` replace its lists."""
    for name in ("a.jpg", "b.jpg"):
        photo(root / name)
    images = [{"id": i, "file_name": f"{name}.jpg", "height": SIZE[0], "width": SIZE[1]} for i, name in ((2, "b"), (1, "a"))]
    document = {"images": images, "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}], "annotations": annotations}
    (root / "set.json").write_text(json.dumps(document | changes))
    return root / "set.json"


SHAPES = ("square", "disc")


def shapes(root: Path, images: int = 8, split: str = "train", size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """A VOC split with one or two bright squares and dark discs in each image, so that there is something to learn."""
    numbers = np.random.default_rng([seed, len(split)])
    names = [f"{split}-{i}" for i in range(images)]
    for name in names:
        pixels = numbers.integers(90, 150, (*size, 3))
        objects = []
        for _ in range(numbers.integers(1, 3)):
            side = int(numbers.integers(14, 26))
            top, left = (int(numbers.integers(0, limit - side)) for limit in size)
            kind = int(numbers.integers(2))
            rows, columns = np.mgrid[: size[0], : size[1]]
            inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
            if kind:
                inside = np.hypot(rows - top - side / 2 + 0.5, columns - left - side / 2 + 0.5) <= side / 2
            pixels[inside] = 20 if kind else 235
            objects.append(voc_object((left + 1, top + 1, left + side, top + side), SHAPES[kind]))
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (root / "Annotations").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "JPEGImages" / f"{name}.png")
        document = voc_xml(*objects, size=size).replace("<annotation>", f"<annotation><filename>{name}.png</filename>")
        (root / "Annotations" / f"{name}.xml").write_text(document)
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def findings(root: Path) -> list[Finding]:
    """All findings of a set, in the order of its splits and files."""
    return [finding for split in survey(root).values() for finding in split.findings]
