"""Pictures of what a detector gets wrong: the worst mistakes from near, and the images with most of them as a whole."""

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

TRUTH, FOUND = (70, 140, 245), (245, 130, 40)  # objects and detections, told apart by everyone who sees colors at all
Color = tuple[int, int, int]
_NEAR, _WHOLE = 320, 720  # pixels of a picture's side


def save_gallery(
    folder: Path, images: Sequence[BoxImage], matches: Matches, *, most: int = 12, whole: int = 4
) -> list[dict[str, Any]]:
    """Save RUN/images/{alarm,missed,image}-NN.jpg and say what each shows, ready for result.json.

    `images` are those of `matches`, in its order. First the `most` worst false alarms and missed objects, each
    `{"image": the file, "kind", "name", ...}` with the rest of `detection_review.describe`; then the `whole` images with the
    most mistakes, `{"image", "kind": "image", "name", "objects", "detections", "mistakes": {kind: n}}`. Objects are blue,
    detections from the classes' thresholds on orange; thick is what is wrong, or missed. Raises UserError where a file
    cannot be read or written.
    """
    if len(images) != len(matches.truth):
        raise ValueError(f"{len(images)} images, but matches of {len(matches.truth)}")
    names = [image.name for image in images]
    kept = above(matches, thresholds(matches))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    counts = {"alarm": 0, "missed": 0}
    for mistake in worst_mistakes(matches, most):
        sort = "missed" if mistake.detection is None else "alarm"
        file = f"images/{sort}-{counts[sort]:02d}.jpg"
        counts[sort] += 1
        save_picture(_near(images[mistake.image], mistake, kept), folder / file)
        rows.append({"image": file, **describe(mistake, matches, names)})
    by_image: dict[int, list[Mistake]] = {}
    for mistake in mistakes(kept):
        by_image.setdefault(mistake.image, []).append(mistake)
    for rank, i in enumerate(sorted(by_image, key=lambda i: (-len(by_image[i]), i))[:whole]):
        file = f"images/image-{rank:02d}.jpg"
        save_picture(_all(images[i], i, by_image[i], kept), folder / file)
        row = {"image": file, "kind": "image", "name": names[i], "objects": len(matches.truth[i])}
        rows.append(row | {"detections": int((kept.image == i).sum()), "mistakes": count_mistakes(by_image[i])})
    return rows


def save_picture(picture: Image.Image, path: Path) -> None:
    """A JPEG, whole or not at all. Raises UserError where it cannot be written."""
    write_atomic(path, lambda temporary: picture.save(temporary, "JPEG", quality=88, subsampling=0))


def _near(image: BoxImage, mistake: Mistake, kept: Matches) -> Image.Image:
    """A square around a mistake, with twice its size of the image where there is so much."""
    found, objects = kept.detections[mistake.image], kept.truth[mistake.image]
    about = [] if mistake.detection is None else [found.boxes[mistake.detection]]
    about += [] if mistake.object is None else [objects.boxes[mistake.object]]
    low, high = np.min(about, axis=0)[:2], np.max(about, axis=0)[2:]
    limits = np.array([image.width, image.height])
    side = np.minimum(max(2 * float((high - low).max()), 48.0), limits)
    corner = np.clip((low + high - side) / 2, 0, limits - side)
    return _drawn(image, mistake.image, [mistake], kept, (*corner, *(corner + side)), _NEAR)


def _all(image: BoxImage, i: int, wrong: Sequence[Mistake], kept: Matches) -> Image.Image:
    return _drawn(image, i, wrong, kept, (0, 0, image.width, image.height), _WHOLE)


def _drawn(image: BoxImage, i: int, wrong: Sequence[Mistake], kept: Matches, view: tuple[float, ...], longer: int) -> Image.Image:
    """The part `view` (x1, y1, x2, y2) of an image with its boxes; the longer side gets so many pixels."""
    objects, found = kept.truth[i], kept.detections[i]
    detections = set(kept.index[kept.image == i].tolist())
    wrong_found = {mistake.detection for mistake in wrong if mistake.detection is not None}
    wrong_truth = {mistake.object for mistake in wrong if mistake.detection is None}
    boxes = [(box, TRUTH, g in wrong_truth) for g, box in enumerate(objects.boxes)]
    boxes += [(found.boxes[d], FOUND, d in wrong_found) for d in sorted(detections | wrong_found)]
    return draw(image.pixels(), boxes, longer, view)


def draw(
    pixels: np.ndarray, boxes: Iterable[tuple[np.ndarray, Color, bool]], longer: int, view: tuple[float, ...] | None = None
) -> Image.Image:
    """An image, uint8 (H, W, 3), or the part `view` (x1, y1, x2, y2) of it, its longer side of so many pixels, with boxes on it.

    boxes: (x1, y1, x2, y2 in the image's pixels), color, and whether it is drawn thick, with a rim to be seen on any image.
    """
    left, top, right, bottom = view or (0, 0, pixels.shape[1], pixels.shape[0])
    scale = longer / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    picture = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    pen, origin = ImageDraw.Draw(picture), np.array([left, top, left, top])
    for box, color, thick in sorted(boxes, key=lambda one: one[2]):
        corners = tuple(((box - origin) * scale).round().tolist())
        if thick:
            _rectangle(pen, corners, (255, 255, 255), 7, 1)
        _rectangle(pen, corners, color, 5 if thick else 3 if color == TRUTH else 1, 0)  # a detection on an object: both show
    return picture


def _rectangle(pen: ImageDraw.ImageDraw, corners: tuple[float, ...], color: Color, width: int, grow: int) -> None:
    x1, y1, x2, y2 = corners
    pen.rectangle((x1 - grow, y1 - grow, max(x1, x2) + grow, max(y1, y2) + grow), outline=color, width=width)
