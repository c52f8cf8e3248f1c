"""Augmentation against plain loops over one image at a time."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from reslearn.data.augment import (
    FLIP,
    LEFT,
    PCA_VALUES,
    PCA_VECTORS,
    SIDE,
    TOP,
    Draws,
    colour_noise,
    crop_box,
    flip_and_crop,
    grown,
    jittered_crop,
    resized_crop,
)


def draws(n: int = 64, seed: int = 5) -> Draws:
    return Draws(seed, torch.arange(n) // 10, torch.arange(n))


@pytest.mark.parametrize("pad", [0, 2, 4])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flip_and_crop_is_pad_flip_crop(pad: int, flip: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 255, (64, 3, 9, 12), dtype=torch.uint8).to(dtype)
    d = draws()
    got = flip_and_crop(images, d, flip=flip, pad=pad)
    assert got.dtype == dtype
    u = {k: d.uniform(k) for k in (FLIP, TOP, LEFT)}
    for i, image in enumerate(images):
        mirrored = flip and u[FLIP][i] < 0.5
        padded = F.pad(image.flip(2) if mirrored else image, (pad,) * 4)
        top, left = int(u[TOP][i] * (2 * pad + 1)), int(u[LEFT][i] * (2 * pad + 1))
        if mirrored:  # the crop is drawn in the unflipped image's columns
            left = 2 * pad - left
        assert torch.equal(got[i], padded[:, top : top + 9, left : left + 12])


def test_every_shift_and_both_sides_come_equally_often() -> None:
    n = 20_000
    d = Draws(1, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    shifts = (d.uniform(TOP) * 9).long().bincount(minlength=9)
    assert len(shifts) == 9 and (shifts - n / 9).abs().max() < 5 * (n / 9) ** 0.5
    assert abs((d.uniform(FLIP) < 0.5).float().mean().item() - 0.5) < 0.02


def test_crop_box_stays_inside_and_has_the_area() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        u = dict(enumerate(generator.random(5)))
        left, top, right, bottom = crop_box(100, 150, (0.35, 1.0), u)
        assert 0 <= left < right <= 150 and 0 <= top < bottom <= 100
        assert (right - left) * (bottom - top) <= 15_000 * 1.0001
        assert 0.7 < (right - left) / (bottom - top) < 1.51  # 3/4 to 4/3, or cut by the image's own 3/2
    whole = crop_box(100, 100, (1.0, 1.0), {3: 1.0, 4: 0.5, 1: 0.3, 2: 0.9})
    assert whole == pytest.approx((0, 0, 100, 100))


@pytest.mark.parametrize("channels", [1, 3])
def test_resized_crop_of_the_whole_is_the_image_flipped_or_not(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 255, (16, 16, channels), np.uint8)
    u = {FLIP: 0.1, TOP: 0.5, LEFT: 0.5, 3: 1.0, 4: 0.5}
    plain = torch.from_numpy(image.transpose(2, 0, 1).copy())
    assert torch.equal(resized_crop(image, u, (16, 16), scale=(1.0, 1.0), mirrored=False), plain)
    assert torch.equal(resized_crop(image, u, (16, 16), scale=(1.0, 1.0), mirrored=True), plain.flip(2))
    assert torch.equal(resized_crop(image, u, (16, 16), scale=None, mirrored=False), plain)
    small = resized_crop(image, u, (8, 8), scale=None, mirrored=False)
    assert torch.equal(small, plain[:, 4:12, 4:12])


def test_alternating_flips_show_both_sides_in_two_epochs() -> None:
    indices = torch.arange(1000)
    sides = [Draws(5, torch.full((1000,), epoch), indices).mirrored("alternate") for epoch in range(4)]
    assert 400 < sides[0].sum() < 600, "the first side is drawn"
    assert torch.equal(sides[0], ~sides[1]) and torch.equal(sides[0], sides[2]) and torch.equal(sides[1], sides[3])
    assert not Draws(5, torch.zeros(1000, dtype=torch.int64), indices).mirrored(False).any()
    by_chance = [Draws(5, torch.full((1000,), epoch), indices).mirrored(True) for epoch in range(2)]
    assert 400 < (by_chance[0] == by_chance[1]).sum() < 600


@pytest.mark.parametrize("shape", [(300, 400), (500, 320), (256, 256)])
def test_scale_jitter_is_a_resize_and_a_crop(shape: tuple[int, int]) -> None:
    """Against the photo resized as a whole and then cut, where the crop falls on whole pixels."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), np.uint8))
    image = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    for side_draw in (0.0, 0.5, 0.999):
        side = 256 + int(side_draw * (480 - 256 + 1))
        scale = side / min(shape)
        height, width = round(shape[0] * scale), round(shape[1] * scale)
        for top, left in ((0.0, 0.0), (1.0, 1.0)):
            u = {SIDE: side_draw, TOP: top, LEFT: left}
            view = jittered_crop(image, u, (224, 224), (256, 480), mirrored=False)
            whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            cut = whole[-224:, -224:] if top else whole[:224, :224]
            assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - cut).mean() < 1.0
            assert torch.equal(jittered_crop(image, u, (224, 224), (256, 480), mirrored=True), view.flip(2))


def test_scale_jitter_draws_every_side_of_its_range() -> None:
    sides = {8 + int(u * 5) for u in (0.0, 0.19, 0.2, 0.45, 0.65, 0.85, 0.9999)}
    assert sides == {8, 9, 10, 11, 12}
    tiny = np.zeros((4, 4, 1), np.uint8)
    assert jittered_crop(tiny, {SIDE: 0.9, TOP: 0.9, LEFT: 0.9}, (8, 8), (8, 12), mirrored=False).shape == (1, 8, 8)


def test_colour_noise_has_the_covariance_that_the_eigenvectors_say() -> None:
    n = 200_000
    noise = colour_noise(Draws(3, torch.zeros(n, dtype=torch.int64), torch.arange(n)), 0.1).double()
    vectors, values = torch.tensor(PCA_VECTORS).double(), torch.tensor(PCA_VALUES).double()
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    assert noise.mean(0).abs().max() < 1e-3 * 0.2175
    assert (torch.cov(noise.T) - expected).abs().max() < 0.01 * expected.abs().max()
    assert (vectors.T @ vectors - torch.eye(3)).abs().max() < 1e-3, "eigenvectors"


def test_views_grow_from_a_third_to_five_sixths() -> None:
    assert [grown((128, 192), done) for done in (0, 0.33, 0.5, 0.6, 0.75, 0.84, 1)] == [128, 128, 160, 160, 192, 192, 192]
    assert grown((20, 33), 0) == 20 and grown((20, 33), 1) == 33
