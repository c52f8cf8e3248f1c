"""Augmentation against per-image reference implementations."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop

from reslearn.data.augment import (
    FLIP,
    LEFT,
    PCA_VALUES,
    PCA_VECTORS,
    TOP,
    Draws,
    color_noise,
    crop_boxes,
    flip_and_crop,
    grown,
    training_views,
)
from reslearn.data.images.decode import take


def draws(n: int = 64, seed: int = 5) -> Draws:
    return Draws(seed, torch.arange(n) // 10, torch.arange(n))


@pytest.mark.parametrize("pad", [0, 2, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_and_crop_is_pad_flip_crop(pad: int, flip: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 255, (64, 3, 9, 12), dtype=torch.uint8).to(dtype)
    d = draws()
    crops = flip_and_crop(images, d, flip=flip, pad=pad)
    assert crops.dtype == dtype
    u = {k: d.uniform(k) for k in (FLIP, TOP, LEFT)}
    for i, image in enumerate(images):
        mirrored = flip and u[FLIP][i] < 0.5
        padded = F.pad(image.flip(2) if mirrored else image, (pad,) * 4)
        top, left = int(u[TOP][i] * (2 * pad + 1)), int(u[LEFT][i] * (2 * pad + 1))
        if mirrored:  # the crop's offset refers to the unflipped image
            left = 2 * pad - left
        assert torch.equal(crops[i], padded[:, top : top + 9, left : left + 12])


def test_shifts_and_flips_are_uniform() -> None:
    n = 20_000
    d = Draws(1, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    shifts = (d.uniform(TOP) * 9).long().bincount(minlength=9)
    assert len(shifts) == 9 and (shifts - n / 9).abs().max() < 5 * (n / 9) ** 0.5
    assert abs((d.uniform(FLIP) < 0.5).float().mean().item() - 0.5) < 0.02


def test_crops_match_torchvision() -> None:
    """Area, aspect ratio and position against RandomResizedCrop, by two-sample Kolmogorov-Smirnov tests."""
    n = 6000
    for height, width, scale in ((375, 500, (0.08, 1.0)), (500, 333, (0.35, 1.0)), (64, 400, (0.5, 1.0))):
        d = Draws(3, torch.zeros(n, dtype=torch.int64), torch.arange(n))
        ours = crop_boxes(np.array([[height, width]] * n), d, scale)
        torch.manual_seed(0)
        image = torch.empty(3, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)])
        assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and (ours >= 0).all()
        for statistic in (
            lambda b: b[:, 2] * b[:, 3],
            lambda b: b[:, 3] / b[:, 2],
            lambda b: b[:, 0],
            lambda b: b[:, 1],
            lambda b: b[:, 0] + b[:, 2],
            lambda b: b[:, 1] + b[:, 3],
        ):
            assert distance(statistic(ours), statistic(theirs)) < 1.95 * (2 / n) ** 0.5, "p above 0.001"
        # if no attempt fits, both fall back to the largest center crop, equally often up to chance
        fallback = [(boxes == largest_center_crop(height, width)).all(1).mean() for boxes in (ours, theirs)]
        assert abs(fallback[0] - fallback[1]) < 0.03


def largest_center_crop(height: int, width: int) -> np.ndarray:
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return np.array([(height - h) // 2, (width - w) // 2, h, w])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference between two empirical distribution functions."""
    at = np.unique(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def test_crops_do_not_depend_on_the_batch() -> None:
    sizes = np.random.default_rng(0).integers(50, 300, (40, 2))
    d = draws(40)
    together = crop_boxes(sizes, d, (0.08, 1.0))
    for i in (0, 7, 39):
        one = Draws(d.seed, d.epochs[i : i + 1], d.indices[i : i + 1])
        assert (crop_boxes(sizes[i : i + 1], one, (0.08, 1.0)) == together[i]).all()


def test_unscaled_crops_are_uniform() -> None:
    n = 5000
    d = Draws(1, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    sizes = np.array([[90, 120]] * n)
    views = training_views(sizes, d, (32, 40), covered=(36, 48), scale=None, flip=True)
    assert (views[:, :6] == [0, 0, 90, 120, 36, 48]).all()
    assert sorted(set(views[:, 6])) == list(range(5)) and sorted(set(views[:, 7])) == list(range(9))
    counts = np.bincount(views[:, 7])
    assert abs(counts - n / 9).max() < 5 * (n / 9) ** 0.5 and abs(views[:, 8].mean() - 0.5) < 0.03


def test_alternating_flips_show_both_sides_in_two_epochs() -> None:
    indices = torch.arange(1000)
    sides = [Draws(5, torch.full((1000,), epoch), indices).mirrored("alternate") for epoch in range(4)]
    assert 400 < sides[0].sum() < 600, "the first side is random"
    assert torch.equal(sides[0], ~sides[1]) and torch.equal(sides[0], sides[2]) and torch.equal(sides[1], sides[3])
    assert not Draws(5, torch.zeros(1000, dtype=torch.int64), indices).mirrored(False).any()
    by_chance = [Draws(5, torch.full((1000,), epoch), indices).mirrored(True) for epoch in range(2)]
    assert 400 < (by_chance[0] == by_chance[1]).sum() < 600


@pytest.mark.parametrize("shape", [(300, 400), (500, 320), (256, 256), (40, 30)])
def test_scale_jitter_is_a_random_resize_and_crop(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    d = draws(200)
    options = {"covered": (1, 1), "scale": None, "jitter": (256, 480), "flip": True}
    views = training_views(np.array([shape] * 200), d, (224, 224), **options)
    assert 256 <= views[:, 4:6].min(1).min() < 262 and 474 < views[:, 4:6].min(1).max() <= 480
    assert (views[:, 6:8] >= 0).all() and (views[:, 6:8] + 224 <= views[:, 4:6]).all() and set(views[:, 8]) == {0, 1}
    for view in views[:4]:
        rows, columns, y, x, mirrored = view[4:].tolist()
        assert abs(rows / columns - shape[0] / shape[1]) < 0.01
        whole = Image.fromarray(image).resize((columns, shape[0]), Image.Resampling.BILINEAR)
        crop = np.asarray(whole.resize((columns, rows), Image.Resampling.BILINEAR))[y : y + 224, x : x + 224]
        assert np.array_equal(take(image, view, (224, 224)), crop[:, ::-1] if mirrored else crop)


def test_scale_jitter_samples_sides_uniformly() -> None:
    d = Draws(1, torch.zeros(5000, dtype=torch.int64), torch.arange(5000))
    views = training_views(np.full((5000, 2), 64), d, (8, 8), covered=(1, 1), scale=None, jitter=(8, 12), flip=False)
    counts = np.bincount(views[:, 4])[8:]
    assert len(counts) == 5 and (abs(counts - 1000) < 150).all()


def test_color_noise_has_the_expected_covariance() -> None:
    n = 200_000
    noise = color_noise(Draws(3, torch.zeros(n, dtype=torch.int64), torch.arange(n)), 0.1).double()
    vectors, values = torch.tensor(PCA_VECTORS).double(), torch.tensor(PCA_VALUES).double()
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    assert noise.mean(0).abs().max() < 1e-3 * 0.2175
    assert (torch.cov(noise.T) - expected).abs().max() < 0.01 * expected.abs().max()
    assert (vectors.T @ vectors - torch.eye(3)).abs().max() < 1e-3, "eigenvectors"


def test_views_grow_from_a_third_to_five_sixths() -> None:
    assert [grown((128, 192), done) for done in (0, 0.33, 0.5, 0.6, 0.75, 0.84, 1)] == [128, 128, 160, 160, 192, 192, 192]
    assert grown((20, 33), 0) == 20 and grown((20, 33), 1) == 33
