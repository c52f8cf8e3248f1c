"""Image files: decoded pixels against values computed by hand, and errors of bad files."""

import gzip
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reslearn.data.images.files import MAX_PIXELS, probe, read, read_cifar, read_idx
from reslearn.errors import UserError

RAMP = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [255, 255, 255]]], np.uint8)
ALPHA = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)


def over_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255 if values.ndim == 3 else alpha / 255
    return np.rint(values * share + 255 * (1 - share)).astype(np.uint8)


def luminance(rgb: np.ndarray) -> np.ndarray:
    return np.rint(rgb @ [0.299, 0.587, 0.114]).astype(np.uint8)


def png(depth: int, color: int, rows: list[bytes], width: int, *chunks: tuple[bytes, bytes], after: bytes = b"") -> bytes:
    """A PNG built from its chunks, for variants that Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", body), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(bits: int, photometric: int, data: bytes, width: int, height: int) -> bytes:
    """A gray little-endian TIFF with one strip, for variants that Pillow cannot write."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 200), (277, 1), (278, height)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(data))])
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags) + 1) + entries + struct.pack("<I", 0)
    return head.ljust(200, b"\0") + data


def saved(image: Image.Image, **options: object) -> Callable[[Path], None]:
    return lambda path: image.save(path, **options)  # type: ignore[arg-type]


def raw(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def palette(transparency: object = None) -> Callable[[Path], None]:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).convert("P")
    image.putpalette(COLORS.tobytes())
    return saved(image, **({} if transparency is None else {"transparency": transparency}))


def with_info(image: Image.Image, **info: object) -> Image.Image:
    image.info.update(info)
    return image


def cmyk(flip_to_ycck: bool = False) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Image.new("CMYK", (16, 16), (55, 127, 127, 0)).save(path, "JPEG", quality=100, subsampling=0)
        data = path.read_bytes()
        marker = data.index(b"Adobe")
        path.write_bytes(data[: marker + 11] + bytes([2]) + data[marker + 12 :] if flip_to_ycck else data)

    return write


GRAY16 = np.array([[0, 128, 129], [257 * 100, 65535 - 129, 65535]], np.uint16)
GRAY16_AS_8 = np.rint(GRAY16 / 257).astype(np.uint8)
COLOR_FRAMES = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
FLOATS = np.array([[0, 0.2, 0.5], [0.7, 0.998, 1]], np.float32)
IN_4095 = np.array([[0, 8, 9, 4095]], np.uint16)  # as 12 bits: 0 008 009 fff

GOOD = {
    "gray.png": (saved(Image.fromarray(RAMP)), RAMP),
    "gray.jpg": (saved(Image.new("L", (3, 2), 77), quality=100), np.full((2, 3), 77)),
    "bilevel.png": (saved(Image.fromarray(RAMP > 128)), (RAMP > 128) * 255),
    "bilevel.pbm": (saved(Image.fromarray(RAMP > 128)), (RAMP > 128) * 255),
    "gray-2-bit.png": (raw(png(2, 0, [bytes([0b00011011])], 4)), np.array([[0, 85, 170, 255]])),
    "gray-alpha.png": (saved(Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)])), over_white(RAMP, ALPHA)),
    "gray-key.png": (raw(png(8, 0, [bytes([0, 51, 102])], 3, (b"tRNS", b"\0\x33"))), np.array([[0, 255, 102]])),
    "bilevel-key.png": (raw(png(1, 0, [bytes([0b01000000])], 2, (b"tRNS", b"\0\0"))), np.array([[255, 255]])),
    "gray-4-bit-key.png": (raw(png(4, 0, [bytes([0x01, 0x20])], 3, (b"tRNS", b"\0\1"))), np.array([[0, 255, 34]])),
    "16-bit.png": (saved(Image.fromarray(GRAY16)), GRAY16_AS_8),
    "16-bit.tif": (saved(Image.fromarray(GRAY16)), GRAY16_AS_8),
    "16-bit-key.png": (
        raw(png(16, 0, [GRAY16[1].astype(">u2").tobytes()], 3, (b"tRNS", struct.pack(">H", 25700)))),
        np.array([[255, GRAY16_AS_8[1, 1], 255]]),
    ),
    "16-bit.pgm": (raw(b"P5 3 2 65535\n" + GRAY16.astype(">u2").tobytes()), GRAY16_AS_8),
    "1000-levels.pgm": (raw(b"P2 3 1 1000\n0 500 1000\n"), np.array([[0, 128, 255]])),
    "16-bit-inverse.tif": (raw(tiff(16, 0, GRAY16.tobytes(), 3, 2)), 255 - GRAY16_AS_8),
    "12-bit.tif": (raw(tiff(12, 1, bytes.fromhex("000008009fff"), 4, 1)), np.rint(IN_4095 / 4095 * 255)),
    "32-bit.tif": (saved(Image.fromarray(GRAY16.astype(np.int32))), GRAY16_AS_8),
    "float.tif": (saved(Image.fromarray(FLOATS)), np.rint(FLOATS * 255)),
    "palette.png": (palette(), COLORS),
    "palette.gif": (palette(), COLORS),
    "palette.bmp": (palette(), COLORS),
    "palette-clear.png": (palette(transparency=4), over_white(COLORS, np.array([[255, 255, 255], [255, 0, 255]]))),
    "palette-clear.gif": (palette(transparency=4), over_white(COLORS, np.array([[255, 255, 255], [255, 0, 255]]))),
    "palette-alpha.png": (palette(transparency=ALPHA.tobytes()), over_white(COLORS, ALPHA)),
    "rgb.png": (saved(Image.fromarray(COLORS)), COLORS),
    "rgb.ppm": (saved(Image.fromarray(COLORS)), COLORS),
    "rgb.tif": (saved(Image.fromarray(COLORS)), COLORS),
    "rgb.webp": (saved(Image.fromarray(COLORS), lossless=True), COLORS),
    "rgb-key.png": (
        raw(png(8, 2, [COLORS[1].tobytes()], 3, (b"tRNS", struct.pack(">3H", 10, 20, 30)))),
        np.array([[[255, 255, 255], [200, 100, 50], [255, 255, 255]]]),
    ),
    "rgb-48-bit.png": (raw(png(16, 2, [(COLORS[1].astype(np.uint16) * 257).astype(">u2").tobytes()], 3)), COLORS[1:]),
    "rgba.png": (saved(Image.fromarray(np.dstack([COLORS, ALPHA]))), over_white(COLORS, ALPHA)),
    "rgba.webp": (saved(Image.fromarray(np.dstack([COLORS, ALPHA])), lossless=True, exact=True), over_white(COLORS, ALPHA)),
    "cmyk.jpg": (cmyk(), np.full((16, 16, 3), [200, 128, 128])),
    "ycck.jpg": (cmyk(flip_to_ycck=True), np.full((16, 16, 3), 55)),  # Y = 200, so R = G = B = 200, inverted
    "cmyk.tif": (saved(Image.new("CMYK", (2, 2), (255, 0, 51, 51))), np.full((2, 2, 3), [0, 204, 163])),
    "ycbcr.tif": (saved(Image.new("YCbCr", (2, 2), (90, 128, 128))), np.full((2, 2, 3), 90)),
    "lab.tif": (saved(Image.new("LAB", (2, 2), (0, 128, 128))), np.zeros((2, 2, 3))),
    "animated.gif": (saved(COLOR_FRAMES[0], save_all=True, append_images=COLOR_FRAMES[1:]), COLORS),
    "animated.png": (saved(COLOR_FRAMES[0], save_all=True, append_images=COLOR_FRAMES[1:]), COLORS),
    "animated.webp": (saved(COLOR_FRAMES[0], save_all=True, append_images=COLOR_FRAMES[1:], lossless=True), COLORS),
    "pages.tif": (saved(COLOR_FRAMES[0], save_all=True, append_images=COLOR_FRAMES[1:]), COLORS),
    "pair.jpg": (
        saved(Image.new("RGB", (8, 8), (90,) * 3), format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        np.full((8, 8, 3), 90),
    ),
    "png-called.jpg": (saved(Image.fromarray(COLORS), format="PNG"), COLORS),
    "no-suffix": (saved(Image.fromarray(COLORS), format="BMP"), COLORS),
}
LOSSY = {"cmyk.jpg": 2, "ycck.jpg": 2, "cmyk.tif": 1, "pair.jpg": 1, "lab.tif": 1}


@pytest.mark.parametrize("name", GOOD)
def test_pixels(name: str, tmp_path: Path) -> None:
    write, expected = GOOD[name]
    write(tmp_path / name)
    expected = np.asarray(expected).astype(np.int64)
    rgb = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    gray = luminance(rgb)[..., None]
    for channels, wanted, slack in ((3, rgb, 0), (1, gray, 1 if expected.ndim == 3 else 0)):
        pixels = read(tmp_path / name, channels)
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
        assert pixels.shape == (*expected.shape[:2], channels)
        assert np.abs(pixels.astype(np.int64) - wanted).max() <= LOSSY.get(name, 0) + slack
    assert probe(str(tmp_path / name)) == (*expected.shape[:2], expected.shape[2] if expected.ndim == 3 else 1)


# EXIF 2.3, tag Orientation: [[1, 2, 3], [4, 5, 6]] after rotation.
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
    0: [[1, 2, 3], [4, 5, 6]],
    9: [[1, 2, 3], [4, 5, 6]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_orientation(suffix: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    blocks = np.kron(np.array([[1, 2, 3], [4, 5, 6]], np.uint8) * 40, np.ones((8, 8), np.uint8))
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100}}.get(suffix, {})
    Image.fromarray(np.dstack([blocks] * 3)).save(tmp_path / f"a{suffix}", exif=exif, **options)
    pixels = read(tmp_path / f"a{suffix}", 3)
    assert pixels[4::8, 4::8, 0].tolist() == (np.array(UPRIGHT[orientation]) * 40).tolist()
    assert probe(tmp_path / f"a{suffix}") == pixels.shape and pixels.flags.c_contiguous


def test_orientation_after_the_pixels_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = exif.tobytes()[6:]
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    (tmp_path / "late.png").write_bytes(png(8, 0, [b"\0\1\2"], 3, after=chunk))
    assert probe(tmp_path / "late.png") == read(tmp_path / "late.png", 1).shape == (1, 3, 1)


def broken_exif(path: Path) -> None:
    # An ASCII entry that claims a megabyte: Pillow warns, but the pixels are valid.
    entry = struct.pack("<HHII", 0x010E, 2, 1 << 20, 100)
    Image.new("RGB", (8, 8), (90,) * 3).save(path, exif=b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 1) + entry + bytes(4))


def test_broken_exif_is_ignored_without_warning(tmp_path: Path) -> None:
    broken_exif(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="Tag data larger"), Image.open(tmp_path / "a.jpg") as image:
        image.getexif()
    assert probe(tmp_path / "a.jpg") == (8, 8, 3)
    assert np.abs(read(tmp_path / "a.jpg", 3).astype(int) - 90).max() <= 1
    Image.fromarray(RAMP).save(tmp_path / "b.png", exif=b"Exif\0\0neither II nor MM")
    with pytest.raises(SyntaxError), Image.open(tmp_path / "b.png") as image:
        image.getexif()
    assert probe(tmp_path / "b.png") == (2, 3, 1)
    assert (read(tmp_path / "b.png", 1)[..., 0] == RAMP).all()


def test_large_images_below_the_limit_give_no_warning(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(1, 0, [bytes(1250)] * 9500, 10_000))
    with pytest.warns(Image.DecompressionBombWarning), Image.open(tmp_path / "large.png"):
        pass
    assert probe(tmp_path / "large.png") == (9500, 10_000, 1)


def test_threads_restore_the_warning_filters(tmp_path: Path) -> None:
    broken_exif(tmp_path / "a.jpg")
    before, problems = list(warnings.filters), []

    def work() -> None:
        try:
            for _ in range(50):
                read(tmp_path / "a.jpg", 3)
        except Exception as why:
            problems.append(why)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert list(warnings.filters) == before


def cut(image: Image.Image, kind: str, share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image.save(path, kind)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return write


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
TEXT_BOMB = (b"zTXt", b"k\0\0" + zlib.compress(bytes(70 << 20), 9))
BAD = {
    "missing.png": (lambda path: None, "there is no such file"),
    "link.png": (lambda path: path.symlink_to("nowhere.png"), "there is no such file"),
    "loop.png": (lambda path: path.symlink_to("loop.png"), "cannot be opened: Too many levels"),
    "folder.png": (lambda path: path.mkdir(), "it is a folder"),
    "pipe.png": (lambda path: os.mkfifo(path), "a device or a pipe"),
    "empty.jpg": (raw(b""), "empty file (0 bytes)"),
    "page.jpg": (raw(b"<!DOCTYPE html>\n<html>"), "it starts with b'<!DOCTYPE html>"),
    "program.png": (raw(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "it starts with b'%!PS-Adobe-3.0"),
    "head.png": (raw(b"\x89PNG\r\n\x1a\n"), "it starts with b'\\x89PNG"),
    "cut.jpg": (cut(NOISE, "JPEG", 0.5), "cannot be decoded (damaged or truncated): image file is truncated"),
    "cut.png": (cut(NOISE, "PNG", 0.5), "cannot be decoded (damaged or truncated): image file is truncated"),
    "cut.webp": (cut(NOISE, "WEBP", 0.5), "damaged or truncated"),
    "cut.bmp": (cut(NOISE, "BMP", 0.5), "cannot be decoded (damaged or truncated): image file is truncated"),
    "cut.gif": (cut(NOISE, "GIF", 0.5), "cannot be decoded (damaged or truncated): image file is truncated"),
    "cut.tif": (cut(NOISE, "TIFF", 0.5), "damaged or truncated"),
    "cut.ppm": (cut(NOISE, "PPM", 0.5), "cannot be decoded (damaged or truncated): image file is truncated"),
    "bomb.png": (raw(png(1, 0, [bytes(1500)] * 12_000, 12_000)), "12000 x 12000 pixels exceed the limit of 100,000,000"),
    "text-bomb.png": (raw(png(8, 0, [b"\0"], 1, TEXT_BOMB)), "Decompressed data too large"),
    "float.tif": (saved(Image.fromarray(FLOATS * 2)), "not all within 0..1"),
    "nan.tif": (saved(Image.fromarray(FLOATS * np.nan)), "not all within 0..1"),
    "int.tif": (saved(Image.fromarray(np.array([[0, 70_000]], np.int32))), "not all within 0..65535"),
    "negative.tif": (saved(Image.fromarray(np.array([[-1, 7]], np.int32))), "not all within 0..65535"),
    "zero\0byte.png": (lambda path: None, "cannot be opened: embedded null byte"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_line_errors(name: str, tmp_path: Path) -> None:
    write, fragment = BAD[name]
    write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        probe(tmp_path / name)
        read(tmp_path / name, 3)
    message = str(caught.value)
    assert fragment in message
    assert str(tmp_path / name) in message or repr(str(tmp_path / name)) in message
    assert "\n" not in message


def test_a_decompression_bomb_is_rejected_by_its_header(tmp_path: Path) -> None:
    whole = png(8, 0, [b"\0"], 1)
    for side in (10_001, 60_000):  # below and above Pillow's own limit
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
        for reader in (probe, lambda path: read(path, 1)):
            with pytest.raises(UserError, match=f"pixels exceed the limit of {MAX_PIXELS:,}"):
                reader(tmp_path / "a.png")


def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    Image.fromarray(RAMP).save(path)
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # root can read any file
            os.seteuid(65534)
        with pytest.raises(UserError, match="cannot be opened: Permission denied"):
            probe(path)
    finally:
        os.seteuid(user)


def test_channels_must_be_1_or_3(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 or 3, not 4"):
        read(tmp_path / "a.png", 4)


def _seeds() -> list[bytes]:
    seeds = []
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        NOISE.crop((0, 0, 9, 5)).save(file, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}))
        seeds.append(file.getvalue())
    return [*seeds, png(16, 0, [b"\0\1\2\3"], 2), png(8, 3, [b"\0\1"], 2, (b"PLTE", bytes(6)), (b"tRNS", b"\0\x80"))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(_seeds()), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), st.integers(0, 99))
def test_damaged_bytes_give_pixels_or_a_user_error(tmp_path: Path, seed: bytes, changes: list[tuple[int, int]], lost: int) -> None:
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path / "a"
    path.write_bytes(data[: len(data) - (lost if lost > 50 else 0)])
    try:
        height, width, _ = probe(path)
        if height * width < 1 << 20:
            assert read(path, 3).shape == (height, width, 3)
    except UserError as why:
        assert str(path) in str(why)


def idx(shape: tuple[int, ...], data: bytes, kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape) + data


def test_idx_plain_and_gzip(tmp_path: Path) -> None:
    data = idx((2, 1, 3), bytes(range(6)))
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "b").write_bytes(gzip.compress(data))
    for name in "ab":
        array = read_idx(tmp_path / name)
        assert array.tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
        assert array.dtype == np.uint8 and array.flags.writeable


GZIP_CUT = bytes.fromhex("1f8b08000000000002ff") + zlib.compress(idx((4,), b"abcd"))[2:-6]
BAD_IDX = {
    "short": (b"\0\0", "not an idx file: it starts with b'\\x00\\x00'"),
    "other": (b"GIF89a..", "not an idx file: it starts with b'GIF8'"),
    "floats": (idx((1,), bytes(4), kind=13), "type 0x0d"),
    "no dimension": (idx((), b""), "0 dimensions"),
    "many dimensions": (idx((1,) * 9, b"."), "9 dimensions"),
    "header cut": (idx((1, 1), b".")[:9], "2 dimensions"),
    "too few": (idx((2, 3), bytes(5)), "less data than the 6 bytes"),
    "too many": (idx((2, 3), bytes(7)), "more data than the 6 bytes"),
    "huge": (idx((1 << 31, 1 << 31, 1 << 31), bytes(9)), "less data than the 9,903,520,314,283,042,199,192,993,792 bytes"),
    "gzip cut": (GZIP_CUT, "damaged or truncated"),
    "gzip wrong": (b"\x1f\x8b\x08junkjunkjunk", "damaged or truncated"),
}


@pytest.mark.parametrize("name", BAD_IDX)
def test_bad_idx(name: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(BAD_IDX[name][0])
    with pytest.raises(UserError) as caught:
        read_idx(tmp_path / "labels")
    assert BAD_IDX[name][1] in str(caught.value) and str(tmp_path / "labels") in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda b: b"\0\0\x08" + b),
        st.builds(lambda shape, data: idx(tuple(shape), data), st.lists(st.integers(0, 5), max_size=5), st.binary(max_size=40)),
        st.binary(max_size=40).map(lambda b: b"\x1f\x8b\x08\0\0\0\0\0\2\xff" + b),
    )
)
@example(idx((2, 2), b"abcd"))
def test_any_bytes_are_idx_or_a_user_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "any").write_bytes(data)
    try:
        array = read_idx(tmp_path / "any")
    except UserError:
        return
    assert idx(array.shape, array.tobytes()) == data


def test_cifar_records(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, 32, 32), np.uint8)
    records = np.hstack([np.array([[0, 9], [1, 99], [19, 0]], np.uint8), pixels.reshape(3, -1)])
    (tmp_path / "train.bin").write_bytes(records.tobytes())
    labels, read_back = read_cifar(tmp_path / "train.bin", 3 * 3074, [20, 100])
    assert labels.tolist() == [[0, 9], [1, 99], [19, 0]] and labels.dtype == np.int64
    assert (read_back == pixels).all() and read_back.flags.writeable
    with pytest.raises(UserError, match="record 2 has label 19, but there are 19 classes"):
        read_cifar(tmp_path / "train.bin", 3 * 3074, [19, 100])
    with pytest.raises(UserError, match=r"train\.bin: 9,222 bytes instead of 153,700,000"):
        read_cifar(tmp_path / "train.bin", 153_700_000, [20, 100])
