"""Batches of images: preprocessing, held-out splits, resident images, and photos with and without the cache."""

import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from drawing import draw_images
from reslearn import UserError, data
from reslearn.classify import sources as setup
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.classify.sources import make_sources
from reslearn.data.augment import Draws
from reslearn.data.images import decode, stream
from reslearn.data.images.resident import Resident, to_channels
from reslearn.data.images.statistics import measure
from reslearn.data.images.stream import Photos, ahead, cache_fits
from reslearn.data.preprocess import Preprocessing, cover
from reslearn.data.sets import Split
from reslearn.data.splits import divide, stratified
from reslearn.files import cache_folder
from reslearn.training.recipe import validate

VIEW = Preprocessing(channels=3, size=(32, 48), crop_ratio=0.875, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
DRAWS = Draws(3, torch.zeros(8, dtype=torch.int64), torch.arange(8))


@pytest.mark.parametrize(
    ("size", "covered"), [((100, 200), (37, 74)), ((90, 60), (82, 55)), ((10, 10), (55, 55)), ((37, 55), (37, 55))]
)
def test_cover_keeps_the_aspect_ratio(size: tuple[int, int], covered: tuple[int, int]) -> None:
    assert VIEW.covered == (37, 55)
    assert cover(np.zeros((*size, 3), np.uint8), *VIEW.covered).shape == (*covered, 3)


def test_fit_is_pillows_resize_and_a_center_crop() -> None:
    image = np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((55, 82), Image.Resampling.BILINEAR))
    expected = resized[25 : 25 + 32, 3 : 3 + 48].transpose(2, 0, 1)
    assert np.array_equal(VIEW.fit(image).numpy(), expected)


def test_normalize_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    normalize = VIEW.normalizer()
    expected = (pixels / 255 - torch.tensor(VIEW.mean)[:, None, None]) / torch.tensor(VIEW.std)[:, None, None]
    torch.testing.assert_close(normalize(pixels), expected, rtol=0, atol=1e-6)
    assert torch.equal(normalize.invert(normalize(pixels)), pixels)


@pytest.mark.parametrize(
    "change", [{"std": (0.0, 1, 1)}, {"mean": (0.1,)}, {"size": (0, 5)}, {"pixel_mean": "AAAA"}, {"mean": (float("nan"),) * 3}]
)
def test_invalid_preprocessing_is_rejected(change: dict) -> None:
    with pytest.raises(ValueError, match=r"size|std|pixel_mean|finite"):
        Preprocessing.model_validate(VIEW.model_dump() | change)


def test_gray_matches_pillow() -> None:
    pixels = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for color, gray in zip(pixels, to_channels(pixels, 1), strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(color.permute(1, 2, 0).numpy()).convert("L")), gray[0].numpy())
    assert torch.equal(to_channels(pixels[:, :1], 3)[:, 2], pixels[:, 0])


def test_stratified_is_proportional_and_leaves_one_image_per_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 10, 1])
    chosen = stratified(labels, 40, seed=1, stream=1)
    assert np.bincount(labels[chosen], minlength=4).tolist() == [25, 12, 3, 0]
    assert not np.array_equal(chosen, stratified(labels, 40, seed=2, stream=1))
    assert np.array_equal(chosen, stratified(labels, 40, seed=1, stream=1))
    assert not stratified(np.arange(200), 30, 0, 1).any(), "one image per class: none can be held out"


def test_divide_puts_each_image_into_one_split(tmp_path: Path) -> None:
    opened = data.open(draw_images(tmp_path / "d", each=40))
    splits, held_out = divide(opened, val=0.1, test=0.15, seed=0)
    assert {name: len(split) for name, split in splits.items()} == {"train": 60, "test": 12, "val": 8}
    names = [name for split in splits.values() for name in split.names]
    assert sorted(names) == sorted(opened.splits["all"].names) and set(held_out) == {"val", "test"}
    with pytest.raises(UserError, match=r"data\.val=80 would hold out 80 of 80"):
        divide(opened, val=80, test=0, seed=0)


def test_existing_splits_are_kept(tmp_path: Path) -> None:
    for split, images in (("train", 20), ("val", 3), ("test", 4)):
        draw_images(tmp_path / split, each=images)
    splits, held_out = divide(data.open(tmp_path), val=0.5, test=0.5, seed=0)
    assert {name: len(split) for name, split in splits.items()} == {"train": 40, "val": 6, "test": 8} and not held_out


@pytest.mark.parametrize("pad_with", ["black", "mean"])
def test_resident_batches_are_augmented_and_normalized(images: Path, pad_with: str) -> None:
    split = data.open(images).splits["all"]
    view = VIEW.model_copy(update={"size": (16, 16), "crop_ratio": 1.0})
    source = Resident(split, view)
    batch, labels = source.train_batch(DRAWS)
    torch.testing.assert_close(batch, source.eval_batch(0, 8))
    assert labels.tolist() == split.labels[:8].tolist()
    padded, _ = Resident(split, view, pad=15, pad_with=pad_with).train_batch(DRAWS)
    border = torch.zeros(3) if pad_with == "mean" else -torch.tensor(view.mean) / torch.tensor(view.std)
    corners = padded[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert ((corners - border[:, None]).abs() < 1e-6).any()


def test_resident_views_match_fit(images: Path) -> None:
    split = data.open(images).splits["all"]
    view = VIEW.model_copy(update={"size": (16, 16), "crop_ratio": 0.5})
    source = Resident(split, view)
    assert split.pixels is not None
    for i in (0, 5):
        assert torch.equal(source.view(i), view.fit(split.pixels[i].permute(1, 2, 0).numpy()))


def test_statistics_skip_unreadable_photos(photos: Path) -> None:
    spoil(photos)
    split = data.open(photos).splits["all"]
    good = split.take([i for i, name in enumerate(split.names) if name != "a/3.png"])
    assert measure(Photos(split, VIEW, on_bad="skip"), VIEW, "channel") == measure(Photos(good, VIEW), VIEW, "channel")


def test_holding_out_all_images_is_an_error(images: Path) -> None:
    with pytest.raises(UserError, match=r"data.val and data.test would hold out 28 of 24 images"):
        divide(data.open(images), val=0.6, test=0.6, seed=0)


def test_resident_images_of_another_size_are_fitted(images: Path) -> None:
    source = Resident(data.open(images).splits["all"], VIEW)
    assert source.pixels.shape == (24, 3, 32, 48)


def test_statistics_match_the_pixels(images: Path) -> None:
    source = Resident(data.open(images).splits["all"], VIEW.model_copy(update={"size": (16, 16), "crop_ratio": 1.0}))
    x = source.pixels.double() / 255
    view = measure(source, VIEW.model_copy(update={"size": (16, 16)}), "channel")
    assert view.mean == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert view.std == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), abs=1e-5)
    per_pixel = measure(source, VIEW.model_copy(update={"size": (16, 16)}), "pixel-mean")
    assert per_pixel.std == (1.0,) * 3
    normalized = per_pixel.normalizer()(source.pixels)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(3, 16, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize("crop_scale", [None, (0.4, 1.0)])
def test_the_cache_does_not_change_pixels(photos: Path, crop_scale: tuple[float, float] | None) -> None:
    split = data.open(photos).splits["all"]
    decoded: list[int] = []
    direct = Photos(split, VIEW, flip=True, crop_scale=crop_scale)

    def cached(subset: Split) -> Photos:
        files = split.files or ()
        return Photos(subset, VIEW, flip=True, crop_scale=crop_scale, cache=files, progress=lambda task, i, n: decoded.append(i))

    first, again, subset = cached(split), cached(split), cached(split.take([20, 3, 7]))
    assert decoded == list(range(1, 25)), "every photo is decoded once"
    assert torch.equal(subset.eval_batch(0, 3), direct.eval_batch(0, 24)[[20, 3, 7]])
    for source in (first, again):
        assert all(torch.equal(a, b) for a, b in zip(source.train_batch(DRAWS), direct.train_batch(DRAWS), strict=True))
        assert torch.equal(source.eval_batch(0, 99), direct.eval_batch(0, 99))
    assert len(direct.eval_batch(0, 99)) == 24


def test_changed_photos_are_decoded_again(photos: Path) -> None:
    def first() -> Tensor:
        split = data.open(photos).splits["all"]
        return Photos(split, VIEW, cache=split.files or ()).view(0)

    before = first()
    Image.new("RGB", (120, 90), "white").save(photos / "a" / "0.png")
    after = first()
    assert not torch.equal(before, after) and (after == 255).all()


def spoil(photos: Path) -> str:
    path = photos / "a" / "3.png"
    path.write_bytes(path.read_bytes()[:2000])
    return "a/3.png"


@pytest.mark.parametrize("cache", [False, True])
def test_unreadable_photos_are_reported_or_left_out(photos: Path, cache: bool) -> None:
    name = spoil(photos)
    split = data.open(photos).splits["all"]
    files = split.files or ()
    with pytest.raises(UserError, match=r"3\.png"):
        Photos(split, VIEW, cache=files if cache else ()).eval_batch(0, 99)
    cached = Photos(split, VIEW, cache=files, on_bad="skip")
    without = split.take([i for i, title in enumerate(split.names) if title != name])
    assert torch.equal(cached.eval_batch(0, 99), Photos(without, VIEW).eval_batch(0, 99)), "later rows are correct"
    (cache_folder() / "photos" / next(p.name for p in (cache_folder() / "photos").glob("*.bin"))).unlink()
    assert len(Photos(split, VIEW, cache=files, on_bad="skip")) == 23, "the cache is rebuilt without its pixels"
    assert len(cached) == 23 and list(cached.bad) == [name] and name not in cached.names


def test_without_a_cache_training_replaces_bad_photos(photos: Path) -> None:
    spoil(photos)
    split = data.open(photos).splits["all"]
    bad = list(split.names).index("a/3.png")
    split = replace(split, labels=np.arange(24))
    exact = VIEW.model_copy(update={"size": (36, 48), "crop_ratio": 1.0})  # exactly the shrunk size of 90x120
    source = Photos(split, exact, on_bad="skip")
    batch, labels = source.train_batch(Draws(0, torch.tensor([0]), torch.tensor([bad])))
    assert labels.tolist() == [bad + 1], "with the label of the replacement"
    assert torch.equal(batch, source.normalize(source.view(bad + 1)[None])) and not source.holes
    source.eval_batch(0, 24)
    assert source.holes == {bad} and "3.png" in source.bad["a/3.png"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ahead_keeps_order_and_raises_errors(workers: int) -> None:
    assert list(ahead(lambda i: i * i, range(5, 20), workers)) == [i * i for i in range(5, 20)]

    def fail(i: int) -> int:
        if i == 3:
            raise UserError("three")
        return i

    seen = []
    with pytest.raises(UserError, match="three"):
        for value in ahead(fail, range(10), workers):
            seen.append(value)
    assert seen == [0, 1, 2]


def test_huge_sets_are_not_cached() -> None:
    assert cache_fits(1000, VIEW, (375, 500))
    assert not cache_fits(10_000_000, VIEW, (375, 500))


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_hanging_read_times_out(photos: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(stream, "TIMEOUT", 0.3)
    monkeypatch.setattr(stream, "CHECK_EVERY", 0.1)
    split = data.open(photos).splits["all"]
    source = Photos(split, VIEW, crop_scale=(0.5, 1.0))
    real, release = stream.read, Event()

    def hang(path: Path, channels: int) -> np.ndarray:
        if path.name == "5.png":
            release.wait(30)
        return real(path, channels)

    for module in (stream, decode):
        monkeypatch.setattr(module, "read", hang)
    started = time.monotonic()
    batches = ahead(lambda i: source.train_batch(Draws(0, torch.tensor([0]), torch.tensor([i]))), range(24), 2, source.stuck)
    with pytest.raises(UserError, match=r"[ab]/5\.png( \(and 1 more\))?: read timed out"):
        for _ in batches if mode == "training" else [source.eval_batch(0, 24)]:
            pass
    assert time.monotonic() - started < 20, "does not wait for the hanging thread"
    release.set()


def test_unexpected_errors_name_the_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = data.open(photos).splits["all"]
    source, index = Photos(split, VIEW, crop_scale=(0.5, 1.0), direct=True), list(split.names).index("a/7.png")

    def fail(path: Path, channels: int) -> np.ndarray:
        raise MemoryError if path.name == "7.png" else UserError("no")

    monkeypatch.setattr(decode, "read", fail)
    with pytest.raises(RuntimeError, match=r"7\.png: cannot be read: MemoryError"):
        list(ahead(lambda i: source.train_batch(Draws(0, torch.tensor([0]), torch.tensor([index]))), range(3), 2))


def test_only_small_sets_are_cached(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def direct(cache: str, **view: Any) -> tuple[bool, bool]:
        opened = data.open(photos)
        options = {"size": 32, "cache": cache} | (view or {"crop_scale": (0.3, 1.0)})
        recipe = validate({"net": {"name": "resnet20"}, "schedule": {"steps": 1}, "data": options}, ClassifyRecipe)
        splits = opened.splits | {"train": opened.splits["all"]}
        source = make_sources(opened, splits, recipe, torch.device("cpu"), lambda *_: None).train
        assert isinstance(source, Photos)
        return source.direct, source.shrunk is not None

    assert [direct(cache) for cache in ("auto", "on", "off")] == [(False, True), (False, True), (False, False)]
    assert direct("auto", jitter=(40, 60)) == (True, False), "jitter needs the original photos"
    monkeypatch.setattr(setup, "CACHE_BYTES", 1000)
    monkeypatch.setattr(stream, "CACHE_BYTES", 1000)
    assert [direct(cache) for cache in ("auto", "on", "off")] == [(True, False), (False, True), (True, False)]
