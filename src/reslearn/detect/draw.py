"""Draws detections on an image: boxes, masks and legible labels."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reslearn.data.boxes.masks import draw

# Okabe and Ito's colorblind-safe palette (https://jfly.uni-koeln.de/color/): orange, sky blue, bluish green, reddish purple,
# yellow, vermilion, blue.
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178))
DARK = (20, 20, 20)
TINT = 0.4  # opacity of a mask's color
LEAST = 480  # px: smaller images are enlarged, so that labels fit

Box = tuple[float, float, float, float]


def color(label: int) -> tuple[int, int, int]:
    """The color of a class, by its label from 1. Colors repeat after seven classes."""
    return COLORS[(label - 1) % len(COLORS)]


def ink(background: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever has more contrast with the background (WCAG 2.2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in background)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return DARK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else (255, 255, 255)


def picture(image: np.ndarray, detections: dict[str, Any], classes: Sequence[str]) -> np.ndarray:
    """Draws detections (see evaluate.Predictions) on an image, uint8 (H, W, 3). Returns uint8 (H', W', 3).

    Small images are enlarged by a whole factor. The highest-scored detections are drawn on top, and their labels placed first.
    """
    factor = max(1, round(LEAST / max(image.shape[:2])))
    width = max(2, round(max(image.shape[:2]) * factor / 400))
    order = np.argsort(detections["scores"], kind="stable").tolist()  # the best last
    if "masks" in detections:
        image = _tinted(image, [(draw(detections["masks"][i], *image.shape[:2]), color(detections["labels"][i])) for i in order])
    canvas = Image.fromarray(image.repeat(factor, 0).repeat(factor, 1))
    pen = ImageDraw.Draw(canvas)
    boxes = {i: tuple(float(x) for x in detections["boxes"][i] * factor) for i in order}
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        x2, y2 = max(x1, x2 - 1), max(y1, y2 - 1)  # the last pixels inside
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=DARK, width=width + 2)  # a rim, for images of the same color
        pen.rectangle((x1, y1, x2, y2), outline=color(detections["labels"][i]), width=width)
    font = _font(max(12, round(max(canvas.size) / 55)))
    taken: list[Box] = []
    for i in reversed(order):
        label = detections["labels"][i]
        text = f"{classes[label - 1]} {100 * detections['scores'][i]:.0f}%"
        _write(pen, text, boxes[i], color(label), font, canvas.size, taken)  # type: ignore[arg-type]
    return np.asarray(canvas)


def _tinted(image: np.ndarray, masks: Sequence[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
    """Tints each mask (H, W), with an edge in full color that separates neighbors of the same class."""
    tinted = image.astype(np.float32)
    for mask, paint in masks:
        tinted[mask] = (1 - TINT) * tinted[mask] + TINT * np.array(paint, np.float32)
        inner = np.pad(mask, 1)
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        tinted[mask & ~inner] = paint
    return tinted.round().astype(np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, shipped with matplotlib, which covers most alphabets."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: Box,
    background: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: list[Box],
) -> None:
    """Draws a label at a corner of its box: the first position that overlaps no other label, otherwise the first."""
    left, top, right, bottom = font.getbbox(text)
    wide, high = right - left + 6, bottom - top + 6
    x1, y1, x2, y2 = box
    places = [(x1, y1 - high), (x1, y1), (x1, y2), (x2 - wide, y1), (x2 - wide, y2 - high), (x1, y2 - high)]
    inside = [(min(max(0.0, x), max(0, size[0] - wide)), min(max(0.0, y), max(0, size[1] - high))) for x, y in places]
    free = [(x, y) for x, y in inside if all(x >= t[2] or x + wide <= t[0] or y >= t[3] or y + high <= t[1] for t in taken)]
    x, y = (round(value) for value in (free or inside)[0])
    taken.append((x, y, x + wide, y + high))
    pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=background, outline=DARK)
    pen.text((x + 3 - left, y + 3 - top), text, fill=ink(background), font=font)
