"""Views of photos: jpeg.cpp matches Pillow bit for bit, and Pillow decodes everything but plain JPEGs."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from reslearn import UserError, data
from reslearn.data.augment import Draws
from reslearn.data.images import decode
from reslearn.data.images.files import read
from reslearn.data.images.stream import Photos
from reslearn.data.preprocess import Preprocessing

needs_jpeg = pytest.mark.skipif(bool(decode.why_not()), reason=f"no jpeg.cpp: {decode.why_not()}")


def photo(height: int = 120, width: int = 90) -> np.ndarray:
    """An image with edges, colors and noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    return (np.stack([(x * y // 7) % 200, (3 * x + y) % 200, (x // 9 + y // 5) % 2 * 200], 2) + noise).astype(np.uint8)


def views(height: int, width: int, n: int, seed: int = 0) -> tuple[np.ndarray, tuple[int, int]]:
    """Random views of one window size."""
    rng = np.random.default_rng(seed)
    size = tuple(int(side) for side in rng.integers(1, 60, 2))
    result = np.zeros((n, 9), np.int32)
    for view in result:
        view[2:4] = rng.integers(1, height + 1), rng.integers(1, width + 1)
        view[:2] = rng.integers(0, height - view[2] + 1), rng.integers(0, width - view[3] + 1)
        view[6:8] = rng.integers(0, 30, 2)
        view[4:6] = view[6:8] + size + rng.integers(0, 30, 2)
        view[8] = rng.integers(2)
    return result, size


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


@needs_jpeg
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("side", [(120, 90), (33, 257), (8, 8), (1, 1), (17, 640)])
def test_views_match_pillow_bit_for_bit(tmp_path: Path, subsampling: str, progressive: bool, side: tuple[int, int]) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(jpeg(photo(*side), subsampling=subsampling, progressive=progressive, quality=80))
    whole = read(file, 3)
    for seed in range(6):
        rows, size = views(*side, 4, seed)
        pixels = np.zeros((4, *size, 3), np.uint8)
        assert not decode.Jpeg().views([file.read_bytes()] * 4, rows, pixels), "all are decoded"
        assert all(np.array_equal(crop, decode.take(whole, view, size)) for crop, view in zip(pixels, rows, strict=True))


@needs_jpeg
def test_real_photos_match_pillow_bit_for_bit(real_data: Path) -> None:
    files = sorted((real_data / "imagenet-sample").rglob("*.jpg"))[::20]
    for seed, file in enumerate(files):
        whole = read(file, 3)
        rows, size = views(*whole.shape[:2], 2, seed)
        pixels = np.zeros((2, *size, 3), np.uint8)
        assert not decode.Jpeg().views([file.read_bytes()] * 2, rows, pixels)
        assert all(np.array_equal(crop, decode.take(whole, view, size)) for crop, view in zip(pixels, rows, strict=True))


def test_crops_match_torchvision_within_one_level() -> None:
    """Pillow may scale vertically first, which rounds differently."""
    image = photo(200, 150)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        top, left, height, width = (int(n) for n in (*rng.integers(0, 60, 2), *rng.integers(20, 90, 2)))
        view = np.array([top, left, height, width, 48, 64, 0, 0, 1], np.int32)
        theirs = F.resized_crop(Image.fromarray(image), top, left, height, width, [48, 64])
        difference = decode.take(image, view, (48, 64)).astype(int) - np.asarray(theirs)[:, ::-1]
        assert abs(difference).max() <= 1


def save(mode: str, name: str = "a.jpg", turn: int = 1, **options: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        image = Image.fromarray(photo()).convert(mode)
        exif = Image.Exif()
        if turn > 1:
            exif[0x112] = turn
        image.save(folder / name, exif=exif, **options)
        return folder / name

    return write


def xmp_turn(folder: Path) -> Path:
    Image.fromarray(photo()).save(folder / "x.jpg", xmp=b'<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>')
    return folder / "x.jpg"


def trailing(folder: Path) -> Path:
    (folder / "t.jpg").write_bytes(jpeg(photo()) + b"and more")
    return folder / "t.jpg"


ODD = {
    "CMYK": save("CMYK"),
    "gray": save("L"),
    "png": save("RGB", "a.png"),
    "png called jpg": save("RGB", "a.jpg", format="PNG"),
    "palette": save("P", "a.gif"),
    "transparent": save("RGBA", "a.png"),
    "16 bit": save("I;16", "a.png"),
    "webp": save("RGB", "a.webp"),
    "xmp": xmp_turn,
    "trailing bytes": trailing,
    **{f"turned {turn}": save("RGB", turn=turn) for turn in range(2, 9)},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("reader", ["fast", "pillow"])
def test_other_files_match_pillow(tmp_path: Path, odd: str, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reader == "pillow":
        monkeypatch.setattr(decode, "fast", lambda: None)
    file = ODD[odd](tmp_path) if odd != "16 bit" else _sixteen(tmp_path)
    whole = read(file, 3)
    requests: list[np.ndarray] = []

    def view_of(sizes: np.ndarray) -> np.ndarray:
        requests.append(sizes.copy())
        return np.array([[5, 9, 61, 70, 40, 50, 3, 2, 1]], np.int32)

    pixels = np.zeros((1, 30, 40, 3), np.uint8)
    assert not decode.read_views([file], view_of, pixels)
    assert requests[0].tolist() == [list(whole.shape[:2])]
    assert np.array_equal(pixels[0], decode.take(whole, view_of(requests[0])[0], (30, 40)))


def _sixteen(folder: Path) -> Path:
    Image.fromarray(photo()[:, :, 0].astype(np.uint16) * 257).save(folder / "a.png")
    return folder / "a.png"


def spoiled(folder: Path) -> dict[str, Path]:
    good = jpeg(photo(), quality=95)
    kinds = {
        "cut": good[: len(good) // 2],
        "cut with an end": good[: len(good) // 3] + b"\xff\xd9",
        "header only": good[:300],
        "text": b"hello, this is no image at all",
        "empty": b"",
    }
    for name, content in kinds.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return {name: folder / f"{name}.jpg" for name in kinds} | {"missing": folder / "missing.jpg"}


def test_errors_match_pillow(tmp_path: Path) -> None:
    files = spoiled(tmp_path)
    (tmp_path / "good.jpg").write_bytes(jpeg(photo()))
    order = [*files.values(), tmp_path / "good.jpg"]
    pixels = np.zeros((len(order), 20, 20, 3), np.uint8)
    whole = np.array([[0, 0, 120, 90, 20, 20, 0, 0, 0]] * len(order), np.int32)
    bad = decode.read_views(order, lambda sizes: np.minimum(whole, [[0, 0, h, w, *[99] * 5] for h, w in sizes]), pixels)
    for i, file in enumerate(order):
        try:
            expected = decode.take(read(file, 3), whole[i], (20, 20))
        except UserError as error:
            assert str(bad[i]) == str(error) and str(file) in str(error)
        else:
            assert i not in bad and np.array_equal(pixels[i], expected)
    assert {"cut", "text", "empty", "missing"} <= {order[i].stem for i in bad} and len(order) - 1 not in bad


def test_unexpected_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save("CMYK")(tmp_path)
    monkeypatch.setattr(decode, "read", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"a\.jpg: cannot be read: ZeroDivisionError"):
        decode.read_views([file], lambda sizes: np.zeros((1, 9)), np.zeros((1, 2, 2, 3), np.uint8))


def test_pixels_are_the_same_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, label in enumerate("aabb"):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{i}.jpg").write_bytes(jpeg(photo(100 + 9 * i, 140 - 9 * i)))
    split = data.open(tmp_path).splits["all"]
    view = Preprocessing(channels=3, size=(32, 48), crop_ratio=0.875, mean=(0, 0, 0), std=(1, 1, 1))
    draws = Draws(0, torch.arange(12) // 4, torch.arange(12) % 4)

    def batches(direct: bool, crop_scale: tuple[float, float] | None) -> list[torch.Tensor]:
        source = Photos(split, view, flip=True, crop_scale=crop_scale, direct=direct)
        return [source.train_batch(draws)[0], source.eval_batch(0, 4)]

    cases = [(True, (0.1, 1.0)), (False, (0.1, 1.0)), (False, None)]
    fast = [batches(*case) for case in cases]
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decode.fast.cache_clear(), decode.why_not.cache_clear()
    try:
        assert decode.why_not().endswith("cannot compile jpeg.cpp with libjpeg")
        slow = [batches(*case) for case in cases]
    finally:
        decode.fast.cache_clear(), decode.why_not.cache_clear()
    assert all(torch.equal(a, b) for one, other in zip(fast, slow, strict=True) for a, b in zip(one, other, strict=True))
    expected = view.normalizer()(torch.stack([view.fit(read(file, 3)) for file in split.files or ()]))
    assert torch.equal(fast[0][1], expected), "evaluation and predict use the same view"
