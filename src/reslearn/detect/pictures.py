"""What a detector finds in image files, and pictures of it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reslearn.data.boxes.box_set import BoxImage
from reslearn.data.images.files import read
from reslearn.detect.draw import picture
from reslearn.detect.evaluate import TestOptions, look, tensor
from reslearn.detect.results import segmentation
from reslearn.errors import UserError
from reslearn.files import write_atomic, writing

QUALITY = 92  # of JPEGs
EXAMPLE = 720  # px: the longer side of a picture for the report, at most


@dataclass(frozen=True, eq=False)
class DetectedImage:
    """What was found in a file, as in evaluate.Found; or why it cannot be read."""

    file: Path
    found: dict[str, Any] | None = None
    error: str | None = None

    def as_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """detections: class, score and box (x1, y1, x2, y2 in pixels of the upright image) of each, best first, and its mask, if
        any, as COCO's packed runs; or error."""
        if self.found is None:
            return {"error": self.error}
        rows = []
        for i, (label, score) in enumerate(zip(self.found["labels"], self.found["scores"], strict=True)):
            box = [round(x, 2) for x in self.found["boxes"][i].tolist()]
            mask = {"segmentation": segmentation(self.found["masks"][i])} if "masks" in self.found else {}
            rows.append({"class": classes[label - 1], "score": round(float(score), 6), "box": box} | mask)
        return {"detections": rows}

    def in_words(self, classes: Sequence[str]) -> str:
        """`3 cat (99% to 71%), 1 dog (64%)`."""
        if self.found is None:
            return str(self.error).removeprefix(f"{self.file}: ")
        said = []
        for label, name in enumerate(classes, 1):
            scores = 100 * self.found["scores"][self.found["labels"] == label]
            if len(scores):
                lowest = f" to {scores.min():.0f}%" if len(scores) > 1 else ""
                said.append(f"{len(scores)} {name} ({scores.max():.0f}%{lowest})")
        return ", ".join(said) or "nothing found"


def places(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where in a folder the picture of each file goes: under its own name, below the folders in which the files differ; what is
    no JPEG or PNG gets .png behind it. Raises UserError where one is there already.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file, not a folder")
    whole = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100  links stay what they are called
    root = Path(os.path.commonpath([file.parent for file in whole]))
    found = {}
    for file, full in zip(files, whole, strict=True):
        name = full.relative_to(root)
        jpeg_or_png = full.suffix.lower() in (".jpg", ".jpeg", ".png")
        found[file] = folder / (name if jpeg_or_png else name.with_name(f"{name.name}.png"))
        if found[file] in list(found.values())[:-1]:
            raise UserError(f"--out {folder}: two of the images would be {found[file].relative_to(folder)}: give each once")
        if found[file].exists():
            raise UserError(f"--out {folder}: {found[file].relative_to(folder)} is there already: choose another folder")
    return found


def predictions(
    way: TestOptions, files: Sequence[Path], score: float = 0.5, targets: dict[Path, Path] | None = None
) -> Iterator[DetectedImage]:
    """What is found in each file with at least this score, as it comes. A file that cannot be read gives its error.

    targets: where to draw it (see places). Raises UserError where a picture cannot be written.
    """
    for file in files:
        try:
            views = {channels: read(file, channels) for channels in {way.channels, 3 if targets else way.channels}}
        except UserError as error:
            yield DetectedImage(file, error=str(error))
            continue
        if why := way.refuses(*views[way.channels].shape[:2]):
            yield DetectedImage(file, error=f"{file}: {why}")
            continue
        found = _surest(look(way, tensor(views[way.channels])), score)
        if targets:
            _save(picture(views[3], found, way.models[0].classes), targets[file])
        yield DetectedImage(file, found)


def save_examples(
    folder: Path, way: TestOptions, images: Sequence[BoxImage], score: float = 0.5, most: int = 6
) -> list[dict[str, Any]]:
    """Draw what is found, with at least this score, in some images evenly from first to last: RUN/images/found-NN.jpg, each
    `{"image": the file, "name"}`.
    """
    rows = []
    for rank, i in enumerate(np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int))):
        image = images[i]
        found = _surest(look(way, tensor(read(image.path, way.channels))), score)
        rows.append({"image": f"images/found-{rank:02d}.jpg", "name": image.name})
        drawn = Image.fromarray(picture(image.pixels(), found, way.models[0].classes))
        drawn.thumbnail((EXAMPLE, EXAMPLE), Image.Resampling.LANCZOS)
        _save(np.asarray(drawn), folder / rows[-1]["image"])
    return rows


def _surest(found: dict[str, Any], score: float) -> dict[str, Any]:
    """What is found with at least this score."""
    keep = found["scores"] >= score
    return {
        key: tuple(mask for mask, kept in zip(value, keep, strict=True) if kept) if key == "masks" else value[keep]
        for key, value in found.items()
    }


def _save(image: np.ndarray, target: Path) -> None:
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    form: dict[str, Any] = {"format": "PNG"}
    if target.suffix.lower() != ".png":
        form = {"format": "JPEG", "quality": QUALITY, "subsampling": 0}
    write_atomic(target, lambda temporary: Image.fromarray(image).save(temporary, **form))
