"""Pictures of detections: positions of boxes, colorblind-safe colors, legible labels."""

from itertools import combinations

import numpy as np
import pytest

from reslearn.data.boxes.masks import runs_of
from reslearn.detect.draw import COLORS, DARK, color, ink, picture

# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0: on linear RGB
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip


def linear(paint: tuple[int, int, int]) -> np.ndarray:
    value = np.array(paint) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB, white D65."""
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(matrix @ rgb / matrix.sum(axis=1), 0.008856, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colors_are_distinguishable_with_color_blindness(kind: str) -> None:
    """A difference of 2.3 is just noticeable; these differ by several times that."""
    seen = [lab(np.clip(BLINDNESS[kind] @ linear(paint), 0, 1)) for paint in COLORS]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 10
    assert len(set(COLORS)) == 7 and color(8) == color(1) != color(2)


def test_labels_are_legible_on_every_color() -> None:
    """A contrast of 4.5 to 1 is WCAG's level AA."""
    for paint in (*COLORS, DARK, (255, 255, 255)):
        light, dark = sorted((0.05 + linear(each) @ [0.2126, 0.7152, 0.0722] for each in (paint, ink(paint))), reverse=True)
        assert light / dark >= 4.5, paint


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_a_box_is_drawn_at_its_position(ground: int) -> None:
    image = np.full((500, 600, 3), ground, np.uint8)
    found = {"boxes": np.array([[100.0, 200, 300, 400]]), "labels": np.array([2]), "scores": np.array([0.9])}
    drawn = picture(image, found, ["cat", "dog"])
    assert drawn.shape == image.shape and (image == ground).all()
    painted = np.argwhere((drawn == COLORS[1]).all(axis=2) & (np.arange(500) >= 200)[:, None])
    assert painted.min(axis=0).tolist() == [200, 100] and painted.max(axis=0).tolist() == [399, 299]
    assert (drawn[210:390, 110:290] == ground).all() and (drawn[:150] == ground).all() and (drawn[410:] == ground).all()
    assert (drawn[300, 99] == DARK).all() or ground == 0  # the rim
    label = drawn[170:200, 100:200]
    assert (label == COLORS[1]).all(axis=2).any() and (label.reshape(-1, 3) == ink(COLORS[1])).all(axis=1).any()


def test_masks_are_tinted_and_outlined() -> None:
    image = np.full((500, 600, 3), 100, np.uint8)
    mask = np.zeros((500, 600), bool)
    mask[250:350, 150:250] = True
    found = {"boxes": np.array([[100.0, 200, 300, 400]]), "labels": np.array([1]), "scores": np.array([0.9])}
    drawn = picture(image, found | {"masks": (runs_of(mask),)}, ["cat"])
    assert (drawn[250, 150:250] == COLORS[0]).all() and (drawn[350, 160:240] == 100).all()
    assert drawn[300, 200].tolist() == [round(0.6 * 100 + 0.4 * c) for c in COLORS[0]]


def test_no_detections_small_images_and_boxes_at_the_border() -> None:
    image = np.full((28, 36, 3), 100, np.uint8)
    nothing = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, np.int64), "scores": np.zeros(0)}
    assert (picture(image, nothing, ["cat"]) == 100).all()
    found = {"boxes": np.array([[0, 0, 36, 28], [35, 27, 36, 28.0]]), "labels": np.array([1, 1]), "scores": np.array([0.9, 0.8])}
    drawn = picture(image, found, ["a very long name that does not fit into this small image at all" * 2])
    assert drawn.shape == (28 * 13, 36 * 13, 3)
    assert (drawn == COLORS[0]).all(axis=2).any()


def test_labels_do_not_overlap() -> None:
    image = np.full((480, 640, 3), 255, np.uint8)
    found = {"boxes": np.array([[200.0, 200, 400, 400]] * 2), "labels": np.array([1, 2]), "scores": np.array([0.9, 0.8])}
    one, both = (picture(image, {key: array[:n] for key, array in found.items()}, ["cat", "dog"]) for n in (1, 2))
    label = (slice(170, 200), slice(200, 400))
    first = (one[label] == COLORS[0]).all(axis=2)
    assert first.sum() > 300 and (both[label][first] == COLORS[0]).all()
    assert (both == COLORS[1]).all(axis=2).sum() > 300
