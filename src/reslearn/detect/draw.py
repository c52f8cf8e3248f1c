"""Detections drawn on their image: boxes, masks, and labels that can be read on any ground."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reslearn.data.boxes.masks import draw

# Okabe and Ito's colors, told apart with every kind of color blindness (https://jfly.uni-koeln.de/color/): orange, sky blue,
# bluish green, reddish purple, yellow, vermilion, blue.
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178))
DARK = (20, 20, 20)
TINT = 0.4  # of the color over a mask
LEAST = 480  # px: smaller images are enlarged, so that labels fit in

Box = tuple[float, float, float, float]


def color(label: int) -> tuple[int, int, int]:
    """Of a class, by its label from 1; the eighth has the first one's."""
    return COLORS[(label - 1) % len(COLORS)]


def ink(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever can be read better on a ground (WCAG 2.2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in ground)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return DARK if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else (255, 255, 255)


def picture(image: np.ndarray, found: dict[str, Any], classes: Sequence[str]) -> np.ndarray:
    """An image, uint8 (H, W, 3), with what was found in it, as in evaluate.Found: uint8 (H', W', 3).

    Small images come out a whole number of times larger. The best detections lie on top, and their labels look first for a place.
    """
    factor = max(1, round(LEAST / max(image.shape[:2])))
    width = max(2, round(max(image.shape[:2]) * factor / 400))
    order = np.argsort(found["scores"], kind="stable").tolist()  # the best last
    if "masks" in found:
        image = _tinted(image, [(draw(found["masks"][i], *image.shape[:2]), color(found["labels"][i])) for i in order])
    canvas = Image.fromarray(image.repeat(factor, 0).repeat(factor, 1))
    pen = ImageDraw.Draw(canvas)
    boxes = {i: tuple(float(x) for x in found["boxes"][i] * factor) for i in order}
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # pixels, both ends inside
        for extra, paint in ((1, DARK), (0, color(found["labels"][i]))):  # a dark rim shows it on a ground of its own color
            outer = (corners[0] - extra, corners[1] - extra, corners[2] + extra, corners[3] + extra)
            pen.rectangle(outer, outline=paint, width=width + 2 * extra)
    font = _font(max(12, round(max(canvas.size) / 55)))
    taken: list[Box] = []
    for i in reversed(order):
        label = found["labels"][i]
        text = f"{classes[label - 1]} {100 * found['scores'][i]:.0f}%"
        _write(pen, text, boxes[i], color(label), font, canvas.size, taken)  # type: ignore[arg-type]
    return np.asarray(canvas)


def _tinted(image: np.ndarray, masks: Sequence[tuple[np.ndarray, tuple[int, int, int]]]) -> np.ndarray:
    """Each mask (H, W) as a tint with an edge in full color, which tells neighbors of one class apart."""
    tinted = image.astype(np.float32)
    for mask, paint in masks:
        tinted[mask] = (1 - TINT) * tinted[mask] + TINT * np.array(paint, np.float32)
        inner = np.pad(mask, 1)
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        tinted[mask & ~inner] = paint
    return tinted.round().astype(np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: it has the letters of most alphabets."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _write(
    pen: ImageDraw.ImageDraw,
    text: str,
    box: Box,
    ground: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    taken: list[Box],
) -> None:
    """A label at a corner of its box: the first place inside the picture where no other label is, or else the first."""
    left, top, right, bottom = font.getbbox(text)
    wide, high = right - left + 6, bottom - top + 6
    x1, y1, x2, y2 = box
    places = [(x1, y1 - high), (x1, y1), (x1, y2), (x2 - wide, y1), (x2 - wide, y2 - high), (x1, y2 - high)]
    inside = [(min(max(0.0, x), max(0, size[0] - wide)), min(max(0.0, y), max(0, size[1] - high))) for x, y in places]
    free = [(x, y) for x, y in inside if all(x >= t[2] or x + wide <= t[0] or y >= t[3] or y + high <= t[1] for t in taken)]
    x, y = (round(value) for value in (free or inside)[0])
    taken.append((x, y, x + wide, y + high))
    pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=ground, outline=DARK)
    pen.text((x + 3 - left, y + 3 - top), text, fill=ink(ground), font=font)
