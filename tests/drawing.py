"""Images that tests make for themselves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def draw_images(
    folder: Path, classes: Sequence[str] = "ab", each: int = 12, size: tuple[int, int] = (16, 16), mode: str = "RGB"
) -> Path:
    """Class folders of noise whose brightness tells the class, so that there is something to learn."""
    numbers = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            shape = size if mode == "L" else (*size, 3)
            pixels = numbers.integers(0, 80, shape) + 150 * label // max(len(classes) - 1, 1)
            Image.fromarray(pixels.astype(np.uint8), mode).save(folder / name / f"{i}.png")
    return folder
