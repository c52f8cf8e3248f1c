"""Pictures of a detector's mistakes: close-ups of the worst ones, and the images with the most."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from reslearn.data.boxes.box_set import BoxImage
from reslearn.evaluation.detection_errors import Mistake, count_mistakes, mistakes
from reslearn.evaluation.detection_review import above, describe, thresholds, worst_mistakes
from reslearn.evaluation.matching import Matches
from reslearn.files import write_atomic

TRUTH, FOUND = (70, 140, 245), (245, 130, 40)  # objects and detections: blue and orange, safe for color blindness
Color = tuple[int, int, int]
_CLOSE_UP, _WHOLE = 320, 720  # px: longer side of a picture


def save_gallery(
    folder: Path, images: Sequence[BoxImage], matches: Matches, *, most: int = 12, whole: int = 4
) -> list[dict[str, Any]]:
    """Saves RUN/images/{alarm,missed,image}-NN.jpg. Returns a row for each, ready for result.json.

    images: those of `matches`, in order. First come up to `most` of the worst false alarms and missed objects, with rows
    `{"image": file, "kind", "name", ...}` (see detection_review.describe); then the `whole` images with the most mistakes, with
    rows `{"image", "kind": "image", "name", "objects", "detections", "mistakes": {kind: n}}`. Objects are blue; detections at or
    above their class' threshold are orange; mistakes are thick. Raises UserError if a file cannot be read or written.
    """
    if len(images) != len(matches.truth):
        raise ValueError(f"{len(images)} images, but matches of {len(matches.truth)}")
    names = [image.name for image in images]
    kept = above(matches, thresholds(matches))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    counts = {"alarm": 0, "missed": 0}
    for mistake in worst_mistakes(matches, most):
        kind = "missed" if mistake.detection is None else "alarm"
        file = f"images/{kind}-{counts[kind]:02d}.jpg"
        counts[kind] += 1
        save_picture(_close_up(images[mistake.image], mistake, kept), folder / file)
        rows.append({"image": file, **describe(mistake, matches, names)})
    by_image: dict[int, list[Mistake]] = {}
    for mistake in mistakes(kept):
        by_image.setdefault(mistake.image, []).append(mistake)
    for rank, i in enumerate(sorted(by_image, key=lambda i: (-len(by_image[i]), i))[:whole]):
        file = f"images/image-{rank:02d}.jpg"
        save_picture(_drawn(images[i], i, by_image[i], kept, (0, 0, images[i].width, images[i].height), _WHOLE), folder / file)
        row = {"image": file, "kind": "image", "name": names[i], "objects": len(matches.truth[i])}
        rows.append(row | {"detections": int((kept.image == i).sum()), "mistakes": count_mistakes(by_image[i])})
    return rows


def save_picture(picture: Image.Image, path: Path) -> None:
    """Saves a JPEG, atomically. Raises UserError if it cannot be written."""
    write_atomic(path, lambda temporary: picture.save(temporary, "JPEG", quality=88, subsampling=0))


def _close_up(image: BoxImage, mistake: Mistake, kept: Matches) -> Image.Image:
    """A square of the image around a mistake, twice its size where the image is large enough."""
    detections, objects = kept.detections[mistake.image], kept.truth[mistake.image]
    boxes = [] if mistake.detection is None else [detections.boxes[mistake.detection]]
    boxes += [] if mistake.object is None else [objects.boxes[mistake.object]]
    low, high = np.min(boxes, axis=0)[:2], np.max(boxes, axis=0)[2:]
    limits = np.array([image.width, image.height])
    side = np.minimum(max(2 * float((high - low).max()), 48.0), limits)
    corner = np.clip((low + high - side) / 2, 0, limits - side)
    return _drawn(image, mistake.image, [mistake], kept, (*corner, *(corner + side)), _CLOSE_UP)


def _drawn(image: BoxImage, i: int, wrong: Sequence[Mistake], kept: Matches, view: tuple[float, ...], longer: int) -> Image.Image:
    """The region `view` (x1, y1, x2, y2) of image i with its boxes, the longer side scaled to `longer` px."""
    objects, detections = kept.truth[i], kept.detections[i]
    shown = set(kept.index[kept.image == i].tolist())
    alarms = {mistake.detection for mistake in wrong if mistake.detection is not None}
    missed = {mistake.object for mistake in wrong if mistake.detection is None}
    boxes = [(box, TRUTH, g in missed) for g, box in enumerate(objects.boxes)]
    boxes += [(detections.boxes[d], FOUND, d in alarms) for d in sorted(shown | alarms)]
    return draw(image.pixels(), boxes, longer, view)


def draw(
    pixels: np.ndarray, boxes: Iterable[tuple[np.ndarray, Color, bool]], longer: int, view: tuple[float, ...] | None = None
) -> Image.Image:
    """Draws boxes on an image, uint8 (H, W, 3), or its region `view` (x1, y1, x2, y2), the longer side scaled to `longer` px.

    boxes: (x1, y1, x2, y2 in the image's pixels), color, and whether to draw it thick, with a white rim.
    """
    left, top, right, bottom = view or (0, 0, pixels.shape[1], pixels.shape[0])
    scale = longer / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    pen, origin = ImageDraw.Draw(picture), np.array([left, top, left, top])
    for box, color, thick in sorted(boxes, key=lambda item: item[2]):
        corners = tuple(((box - origin) * scale).round().tolist())
        if thick:
            _rectangle(pen, corners, (255, 255, 255), 7, 1)
        # different widths: both show where a detection covers an object
        _rectangle(pen, corners, color, 5 if thick else 3 if color == TRUTH else 1, 0)
    return picture


def _rectangle(pen: ImageDraw.ImageDraw, corners: tuple[float, ...], color: Color, width: int, grow: int) -> None:
    x1, y1, x2, y2 = corners
    pen.rectangle((x1 - grow, y1 - grow, max(x1, x2) + grow, max(y1, y2) + grow), outline=color, width=width)
