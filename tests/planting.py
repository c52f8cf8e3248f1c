"""A clean set of photos, and every kind of fault to plant into it: one function each."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

A, B = "train/cat/0.jpg", "train/dog/1.jpg"


def photo(seed: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    """An image of soft spots of color, of (height, width)."""
    spots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize(size[::-1], Image.Resampling.BICUBIC)


def clean(root: Path) -> Path:
    """Two classes, six training and five validation images each."""
    seed = 0
    for split, each in (("train", 6), ("val", 5)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(each):
                seed += 1
                photo(seed).save(root / split / label / f"{i}.jpg", quality=95)
    return root


def bomb(height: int, width: int) -> bytes:
    """A PNG of less than a hundred bytes that promises so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)  # type: ignore[arg-type]
    return stream.getvalue()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)

    return plant


def copy(source: str, target: str) -> Callable[[Path], None]:
    return lambda root: write(target, (root / source).read_bytes())(root)


def as_png(source: str, target: str) -> Callable[[Path], None]:
    """The same pixels in another file."""
    return lambda root: Image.open(root / source).save(root / target)


def cut(root: Path) -> None:
    data = (root / A).read_bytes()
    (root / A).write_bytes(data[: len(data) // 2])


def cut_and_closed(root: Path) -> None:
    data = (root / A).read_bytes()
    (root / A).write_bytes(data[: len(data) // 2] + b"\xff\xd9")


def flip_a_byte(root: Path) -> None:
    data = bytearray(encoded(photo(1000), "PNG"))
    data[len(data) // 2] ^= 0xFF
    (root / "train/cat/x.png").write_bytes(data)


def broken_link(root: Path) -> None:
    (root / "train/cat/x.jpg").symlink_to("nowhere.jpg")


def pipe(root: Path) -> None:
    os.mkfifo(root / "train/cat/x.jpg")


def unbalanced(root: Path) -> None:
    for i in range(60):
        write(f"train/cat/more{i}.jpg", encoded(photo(2000 + i), "JPEG"))(root)


def drop(*names: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        for name in names:
            for file in sorted((root / name).iterdir()):
                file.unlink()
            (root / name).rmdir()

    return plant


def not_utf8(root: Path) -> None:
    name = os.path.join(os.fsencode(root), b"train", b"cat", b"caf\xe9.jpg")  # noqa: PTH118
    with open(name, "wb") as file:  # noqa: PTH123
        file.write(encoded(photo(1000), "JPEG"))


EXIF = Image.Exif()
EXIF[0x0112] = 6
DEEP = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (48, 64)).astype(np.uint16))
NEW, X = photo(1000), "train/cat/x"
JPEG = encoded(NEW, "JPEG")

# name: how it is planted, and what must be found, all of it: {kind: names}
FAULTS: dict[str, tuple[Callable[[Path], None], dict[str, set[str]]]] = {
    "no bytes": (write(f"{X}.jpg", b""), {"empty": {f"{X}.jpg"}}),
    "a JPEG cut short": (cut, {"truncated": {A}}),
    "a PNG cut short": (write(f"{X}.png", encoded(NEW, "PNG")[:3000]), {"truncated": {f"{X}.png"}}),
    "a JPEG cut short and closed": (cut_and_closed, {"truncated": {A}}),
    "a WebP cut short": (write(f"{X}.webp", encoded(NEW, "WEBP")[:-9]), {"damaged": {f"{X}.webp"}}),
    "a flipped byte": (flip_a_byte, {"damaged": {f"{X}.png"}}),
    "a header alone": (write(f"{X}.png", b"\x89PNG\r\n\x1a\n"), {"damaged": {f"{X}.png"}}),
    "html": (write(f"{X}.jpg", b"<!DOCTYPE html><title>404</title>"), {"not an image": {f"{X}.jpg"}}),
    "a bomb": (write(f"{X}.png", bomb(40_000, 40_000)), {"too large": {f"{X}.png"}}),
    "a link to nothing": (broken_link, {"unreadable": {f"{X}.jpg"}}),
    "a pipe": (pipe, {"unreadable": {f"{X}.jpg"}}),
    "a PNG called .jpg": (write(f"{X}.jpg", encoded(NEW, "PNG")), {"wrong suffix": {f"{X}.jpg"}}),
    "one color": (write(f"{X}.jpg", encoded(Image.new("RGB", (64, 48), "navy"), "JPEG")), {"blank": {f"{X}.jpg"}}),
    "a thumbnail": (write(f"{X}.jpg", encoded(photo(1000, (4, 5)), "JPEG")), {"tiny": {f"{X}.jpg"}}),
    "a strip": (write(f"{X}.jpg", encoded(photo(1000, (40, 170)), "JPEG")), {"elongated": {f"{X}.jpg"}}),
    "twice": (copy(A, f"{X}.jpg"), {"duplicate": {A, f"{X}.jpg"}}),
    "twice in pixels": (as_png(A, f"{X}.png"), {"duplicate": {A, f"{X}.png"}}),
    "in train and val": (copy(A, "val/cat/x.jpg"), {"leak": {A, "val/cat/x.jpg"}}),
    "in train and val, in pixels": (as_png(A, "val/cat/x.png"), {"leak": {A, "val/cat/x.png"}}),
    "in two classes": (copy(A, "train/dog/x.jpg"), {"contradiction": {A, "train/dog/x.jpg"}}),
    "in two classes, in pixels": (as_png(A, "train/dog/x.png"), {"contradiction": {A, "train/dog/x.png"}}),
    "in two classes and splits": (
        copy(A, "val/dog/x.jpg"),
        {"contradiction": {A, "val/dog/x.jpg"}, "leak": {A, "val/dog/x.jpg"}},
    ),
    "much of one class": (unbalanced, {"imbalance": {"cat", "dog"}}),
    "a class that val lacks": (drop("val/dog"), {"class missing": {"dog"}}),
    "a class that train lacks": (write("val/cow/1.jpg", JPEG), {"class not in train": {"cow"}}),
    "one class": (drop("train/dog", "val/dog"), {"one class": {"cat"}}),
    "a class without images": (lambda root: (root / "train/cow").mkdir(), {"empty class": {"train/cow"}}),
    "a split without classes": (write("test/1.jpg", JPEG), {"without classes": {"test"}}),
    "names that differ by case": (write("train/cat/0.JPG", JPEG), {"colliding names": {A, "train/cat/0.JPG"}}),
    "names that differ by accents' form": (
        lambda root: [write(f"train/cat/{name}.jpg", encoded(photo(len(name)), "JPEG"))(root) for name in ("\xe9", "e\u0301")],
        {"colliding names": {"train/cat/\xe9.jpg", "train/cat/e\u0301.jpg"}},
    ),
    "a line break in a name": (write("train/cat/a\nb.jpg", JPEG), {"odd name": {"train/cat/a\nb.jpg"}}),
    "a name that is no text": (not_utf8, {"name not UTF-8": {"train/cat/caf\udce9.jpg"}}),
    "a hidden image": (write("train/cat/.x.jpg", JPEG), {"hidden image": {"train/cat/.x.jpg"}}),
    "an image beside the classes": (write("train/x.jpg", JPEG), {"outside a class folder": {"train/x.jpg"}}),
    "a phone's format": (write(f"{X}.heic", b"....ftypheic"), {"foreign format": {f"{X}.heic"}}),
    "an image without suffix": (write(X, JPEG), {"image without suffix": {X}}),
}
FAULTS["classes that differ by case"] = (
    lambda root: [
        write(f"{split}/Cat/{i}.jpg", encoded(photo(3000 + i + 9 * len(split)), "JPEG"))(root)
        for split in ("train", "val")
        for i in range(6)
    ],
    {"colliding classes": {"Cat", "cat"}},
)

NOTES: dict[str, tuple[Callable[[Path], None], dict[str, set[str]]]] = {
    "CMYK": (write(f"{X}.jpg", encoded(NEW.convert("CMYK"), "JPEG")), {"color space": {f"{X}.jpg"}}),
    "a palette": (write(f"{X}.png", encoded(NEW.quantize(32), "PNG")), {"palette": {f"{X}.png"}}),
    "gray": (write(f"{X}.jpg", encoded(NEW.convert("L"), "JPEG")), {"gray": {f"{X}.jpg"}}),
    "16 bits of gray": (write(f"{X}.png", encoded(DEEP, "PNG")), {"deep": {f"{X}.png"}, "gray": {f"{X}.png"}}),
    "transparency": (write(f"{X}.png", encoded(NEW.convert("RGBA"), "PNG")), {"transparent": {f"{X}.png"}}),
    "EXIF rotation": (write(f"{X}.jpg", encoded(NEW, "JPEG", exif=EXIF)), {"rotated": {f"{X}.jpg"}}),
    "an animated GIF": (
        write(f"{X}.gif", encoded(NEW, "GIF", save_all=True, append_images=[photo(1)])),
        {"animated": {f"{X}.gif"}},
    ),
    "an animated WebP": (
        write(f"{X}.webp", encoded(NEW, "WEBP", save_all=True, append_images=[photo(1)])),
        {"animated": {f"{X}.webp"}},
    ),
    "a TIFF of two pages": (
        write(f"{X}.tif", encoded(NEW, "TIFF", save_all=True, append_images=[photo(1)])),
        {"animated": {f"{X}.tif"}},
    ),
    "a hidden file": (write("train/.DS_Store", b"\0\0"), {"hidden": {"train/.DS_Store"}}),
    "a file of another kind": (write("train/cat/notes.txt", b"fluffy"), {"other file": {"train/cat/notes.txt"}}),
    "a small class": (
        lambda root: [
            write(f"{split}/cow/{i}.jpg", encoded(photo(3000 + i + 9 * len(split)), "JPEG"))(root)
            for split in ("train", "val")
            for i in range(3)
        ],
        {"few images": {"cow"}},
    ),
}
