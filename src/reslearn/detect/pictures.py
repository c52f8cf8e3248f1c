"""Detection in image files, and annotated images."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reslearn.data.boxes.box_set import BoxImage
from reslearn.data.boxes.source import to_tensor
from reslearn.data.images.files import read
from reslearn.detect.draw import picture
from reslearn.detect.evaluate import TestOptions, predict
from reslearn.detect.results import segmentation
from reslearn.errors import UserError
from reslearn.files import write_atomic, writing

QUALITY = 92  # JPEG quality
EXAMPLE = 720  # px: longest side of a picture for the report


@dataclass(frozen=True, eq=False, repr=False)
class DetectedImage:
    """The detections in a file (see evaluate.Predictions), or the error why it cannot be used."""

    file: Path
    detections: dict[str, Any] | None = None
    error: str | None = None
    classes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.file}: {self.summary()}"

    def as_json(self) -> dict[str, Any]:
        """`detections`, best first, each with its class, score, box (x1, y1, x2, y2 in pixels of the upright image) and, from Mask
        R-CNN, segmentation (COCO's compressed RLE); or `error`."""
        if self.detections is None:
            return {"error": self.error}
        rows = []
        for i, (label, score) in enumerate(zip(self.detections["labels"], self.detections["scores"], strict=True)):
            box = [round(x, 2) for x in self.detections["boxes"][i].tolist()]
            mask = {"segmentation": segmentation(self.detections["masks"][i])} if "masks" in self.detections else {}
            rows.append({"class": self.classes[label - 1], "score": round(float(score), 6), "box": box} | mask)
        return {"detections": rows}

    def summary(self) -> str:
        """One line, such as `3 cat (99% to 71%), 1 dog (64%)`."""
        if self.detections is None:
            return str(self.error).removeprefix(f"{self.file}: ")
        counts = []
        for label, name in enumerate(self.classes, 1):
            scores = 100 * self.detections["scores"][self.detections["labels"] == label]
            if len(scores):
                lowest = f" to {scores.min():.0f}%" if len(scores) > 1 else ""
                counts.append(f"{len(scores)} {name} ({scores.max():.0f}%{lowest})")
        return ", ".join(counts) or "no detections"


def output_files(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """The file in `folder` for each annotated image: its path relative to the files' common folder, with .png appended if it is
    neither JPEG nor PNG. Raises UserError if an output file exists or two are the same.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file, not a folder")
    absolute = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100  unlike resolve, keeps the names of links
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    targets = {}
    for file, full in zip(files, absolute, strict=True):
        name = full.relative_to(root)
        if full.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            name = name.with_name(f"{name.name}.png")
        if folder / name in targets.values():
            raise UserError(f"--out {folder}: two of the images would be written to {name}: give each image once")
        if (folder / name).exists():
            raise UserError(f"--out {folder}: {name} already exists: choose another folder")
        targets[file] = folder / name
    return targets


def predictions(
    options: TestOptions, files: Sequence[Path], score: float = 0.5, targets: dict[Path, Path] | None = None
) -> Iterator[DetectedImage]:
    """Yields the detections of each file with at least this score, or its error.

    targets: files for the annotated images (see output_files). Raises UserError if one cannot be written.
    """
    for file in files:
        try:
            views = {channels: read(file, channels) for channels in {options.channels, 3 if targets else options.channels}}
        except UserError as error:
            yield DetectedImage(file, error=str(error))
            continue
        if problem := options.problem(*views[options.channels].shape[:2]):
            yield DetectedImage(file, error=f"{file}: {problem}")
            continue
        detections = _filtered(predict(options, to_tensor(views[options.channels])), score)
        if targets:
            _save(picture(views[3], detections, options.models[0].classes), targets[file])
        yield DetectedImage(file, detections, classes=tuple(options.models[0].classes))


def save_examples(
    folder: Path, options: TestOptions, images: Sequence[BoxImage], score: float = 0.5, most: int = 6
) -> list[dict[str, Any]]:
    """Saves up to `most` evenly spaced images with their detections of at least this score: RUN/images/found-NN.jpg.

    Returns a row {"image": file, "name"} for each.
    """
    rows = []
    for rank, i in enumerate(np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int))):
        image = images[i]
        detections = _filtered(predict(options, to_tensor(read(image.path, options.channels))), score)
        rows.append({"image": f"images/found-{rank:02d}.jpg", "name": image.name})
        drawn = Image.fromarray(picture(image.pixels(), detections, options.models[0].classes))
        drawn.thumbnail((EXAMPLE, EXAMPLE), Image.Resampling.LANCZOS)
        _save(np.asarray(drawn), folder / rows[-1]["image"])
    return rows


def _filtered(detections: dict[str, Any], score: float) -> dict[str, Any]:
    keep = detections["scores"] >= score
    return {
        key: tuple(mask for mask, kept in zip(value, keep, strict=True) if kept) if key == "masks" else value[keep]
        for key, value in detections.items()
    }


def _save(image: np.ndarray, target: Path) -> None:
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    png = target.suffix.lower() == ".png"
    options: dict[str, Any] = {"format": "PNG"} if png else {"format": "JPEG", "quality": QUALITY, "subsampling": 0}
    write_atomic(target, lambda temporary: Image.fromarray(image).save(temporary, **options))
