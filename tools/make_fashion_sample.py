"""Make the Fashion-MNIST sample of the package, and one test image per class for the examples.

    python tools/make_fashion_sample.py FOLDER

FOLDER contains the four official files. The sample has the first 600 training images and the first 100 test images of
each class, in the official order; the examples are the next test image of each class. The output is deterministic.
"""

import gzip
import re
import struct
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from reslearn.data.images.files import read_idx
from reslearn.data.sets import open as open_set

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "src" / "reslearn" / "data" / "samples"
CLOTHES = ROOT / "examples" / "clothes"


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the sorted indices of the first `count` images of each class."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write a uint8 array as gzipped idx, without a time or file name, so that the bytes depend only on the array."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))


def main(folder: Path) -> None:
    SAMPLES.mkdir(parents=True, exist_ok=True)
    CLOTHES.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 600), ("t10k", 100)):
        images, labels = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
        pixels, classes = read_idx(folder / images), read_idx(folder / labels)
        chosen = first_of_each_class(classes, count)
        write_idx(SAMPLES / images, pixels[chosen])
        write_idx(SAMPLES / labels, classes[chosen])
    names = open_set("fashion-sample").classes  # also checks that the sample can be read
    for label, name in enumerate(names):
        example = np.flatnonzero(classes == label)[count]
        slug = re.sub(r"[^a-z]+", "-", name.lower())
        Image.fromarray(pixels[example]).save(CLOTHES / f"{slug}.png", optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
