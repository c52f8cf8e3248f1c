"""`open(name or path)` returns a data set: splits of labeled images, their classes, and a fingerprint."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch

from reslearn.data.download import OFFICIAL, locate
from reslearn.data.images import packed
from reslearn.data.images.files import PackedImage, file_bytes, probe, read, read_cifar, read_idx
from reslearn.data.images.folder import Entry, Listing, Problem, for_each, read_list, refuse, scan
from reslearn.errors import UserError, did_you_mean
from reslearn.files import user_path

Result = TypeVar("Result")
NAMES = ("fashion-sample", "fashion-mnist", "cifar10", "cifar100")
"""The data sets that `open` knows by name. `fashion-sample` comes with this package."""

# Images are decoded into memory where they have one size, at most this many pixels a side, and this many bytes in all.
_RESIDENT_SIDE = 64
_RESIDENT_BYTES = 1 << 30

_SAMPLES = Path(__file__).parent / "samples"
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


@dataclass(frozen=True, eq=False)
class Split:
    """Labeled images: `pixels` in memory, or `files` read when they are asked for (exactly one of the two).

    `labels` int64 (N,), indices into DataSet.classes; `names` N names for messages, a relative path or
    "cifar10/train[17]"; `pixels` uint8 (N, C, H, W); `files` N paths, or parts of larger files.
    """

    labels: np.ndarray
    names: Sequence[str]
    pixels: torch.Tensor | None = None
    files: tuple[Path | PackedImage, ...] | None = None

    def __post_init__(self) -> None:
        images = self.pixels if self.files is None else self.files
        if images is None or (self.pixels is not None and self.files is not None):
            raise ValueError("a Split holds either pixels or files")
        if not len(self.labels) == len(self.names) == len(images):
            raise ValueError(f"{len(self.labels)} labels, {len(self.names)} names and {len(images)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> "Split":
        """The images at these indices, in their order; a mask of N booleans works as well."""
        chosen = np.asarray(indices)
        chosen = np.arange(len(self))[chosen if chosen.size else chosen.astype(np.int64)]
        rows: list[int] = chosen.tolist()
        return Split(
            self.labels[chosen],
            tuple(self.names[i] for i in rows),
            None if self.pixels is None else self.pixels[torch.from_numpy(chosen)],
            None if self.files is None else tuple(self.files[i] for i in rows),
        )


@dataclass(frozen=True, eq=False)
class DataSet:
    """Images with classes, in splits "train", "val", "test"; or in one, "all", where a folder or list is not divided.

    `channels` is 1 where every image is gray, else 3. `left_out` counts the files that are not in it, by reason.
    `sizes` is the median (height, width).
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: dict[str, Split]
    left_out: dict[str, int]
    sizes: tuple[int, int]

    @property
    def resident(self) -> bool:
        """Whether the pixels are in memory."""
        return all(split.pixels is not None for split in self.splits.values())

    @property
    def has_val(self) -> bool:
        """Whether the set has its own validation split."""
        return "val" in self.splits

    @property
    def packed(self) -> bool:
        """Whether the images were written by `reslearn pack`."""
        return any(isinstance(file, PackedImage) for split in self.splits.values() for file in (split.files or ())[:1])

    def fingerprint(self) -> str:
        """A sha256 in hex of the images and classes, independent of order and storage.

        Of pixels in memory: split, class, shape and pixels of each image. Of files: split, class, name and size.
        """
        digests = sorted(digest for name in self.splits for digest in self._digests(name))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def arrangement(self) -> str:
        """A sha256 in hex of the images' names, order and content, which splits by name depend on."""
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            for title, content in zip(split.names, self._digests(name), strict=True):
                digest.update(json.dumps([name, title]).encode() + content)
        return digest.hexdigest()

    def _digests(self, name: str) -> Iterator[bytes]:
        split = self.splits[name]
        if split.pixels is not None:
            pixels = split.pixels.cpu().contiguous().numpy()
            heads = [json.dumps([name, label, *pixels.shape[1:]]).encode() + b"\n" for label in self.classes]
            for image, label in zip(pixels, split.labels, strict=True):
                digest = hashlib.sha256(heads[label])
                digest.update(image)
                yield digest.digest()
        else:
            for file, title, label in zip(split.files or (), split.names, split.labels, strict=True):
                try:
                    size = file_bytes(file)
                except OSError as why:
                    raise UserError(f"{file}: is gone since the data set was opened: {why.strerror}") from None
                yield hashlib.sha256(json.dumps([name, self.classes[label], title, size]).encode()).digest()


def open(name_or_path: str | Path, *, on_bad: Literal["error", "skip"] = "error") -> DataSet:
    """Opens the data set of this name (see NAMES), or at this path.

    A path is a folder of class folders, with or without train/, val/ and test/ above them; a .csv or .jsonl list; a folder
    that `reslearn pack` has written; or one that holds the official files of a set known by name. A str that is a known name
    is that set even where a folder has the same name: write ./cifar10 for the folder. Unreadable images raise UserError, or are
    left out with on_bad="skip".
    Raises UserError where there is no such set, or it cannot be used.
    """
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad is {on_bad!r}: write error or skip")
    opened = find(name_or_path)
    return opened if isinstance(opened, DataSet) else _load(*opened, on_bad)


def find(name_or_path: str | Path, problem: Problem = refuse) -> DataSet | tuple[str, Listing]:
    """Finds what `open` opens: a set known by name, or the name and the listing of a folder or list, not yet read.

    problem: see folder.Problem. Raises UserError.
    """
    if name_or_path == "fashion-sample":
        return _fashion("fashion-sample", _SAMPLES)
    if isinstance(name_or_path, str) and name_or_path in OFFICIAL:
        return _official(name_or_path, locate(name_or_path))
    try:
        path = user_path(name_or_path)
        is_there, is_folder = path.exists(), path.is_dir()
    except OSError as why:  # a name too long, a folder that may not be entered
        raise UserError(f"{name_or_path}: cannot be opened: {why}") from None
    if is_there and not is_folder:
        if path.suffix.lower() in (".csv", ".jsonl"):
            return path.name, read_list(path, problem)
        raise UserError(f"{path}: a data set is a folder, a .csv or a .jsonl list, or one of {', '.join(NAMES)}")
    if not is_folder:
        raise UserError(f"no data set or folder called {str(name_or_path)!r}{did_you_mean(str(name_or_path), NAMES)}")
    if packed.is_packed(path):
        return _packed(packed.Pack(path))
    official = [
        (name, folder) for name, known in OFFICIAL.items() for folder in (path, path / known.folder) if known.partly_in(folder)
    ]
    if len(official) > 1:
        raise UserError(
            f"{path}: holds {' and '.join(name for name, _ in official)}: open one of {', '.join(str(f) for _, f in official)}"
        )
    if official:
        return _official(*official[0])
    if (path / "data_batch_1").is_file():
        raise UserError(f"{path}: CIFAR's Python version (pickles): get the binary version, {OFFICIAL['cifar10'].sources[0].url}")
    return path.resolve().name, scan(path, problem)


def _load(name: str, listing: Listing, on_bad: Literal["error", "skip"]) -> DataSet:
    """The images of a listing: small ones of one size are decoded into memory, others are left as files."""
    entries, heads = _sift(listing.entries, for_each(lambda entry: probe(entry.file), listing.entries), on_bad)
    channels = max(channels for _, _, channels in heads)
    sizes = sorted({(height, width) for height, width, _ in heads})
    height, width = (int(np.median(side)) for side in np.array(heads).T[:2])
    pixels = None
    if len(sizes) == 1 and max(height, width) <= _RESIDENT_SIDE and len(entries) * channels * height * width <= _RESIDENT_BYTES:
        memory = np.empty((len(entries), channels, height, width), np.uint8)

        def decode(i: int) -> int:
            memory[i] = read(entries[i].file, channels).transpose(2, 0, 1)
            return i

        kept, rows = _sift(entries, for_each(decode, range(len(entries))), on_bad)
        entries, pixels = kept, torch.from_numpy(memory if len(kept) == len(memory) else memory[rows])
    index = {label: i for i, label in enumerate(listing.labels)}
    whole = Split(
        np.array([index[entry.label] for entry in entries], np.int64),
        tuple(entry.name for entry in entries),
        pixels,
        None if pixels is not None else tuple(entry.file for entry in entries),
    )
    of = np.array([entry.split for entry in entries])
    splits = {split: whole.take(of == split) for split in dict.fromkeys(entry.split for entry in entries)}
    unreadable = len(listing.entries) - len(entries)
    left_out = listing.left_out | ({"unreadable": unreadable} if unreadable else {})
    return DataSet(name, listing.classes, channels, splits, left_out, (height, width))


def _sift(
    entries: Sequence[Entry], results: Sequence[Result | UserError], on_bad: Literal["error", "skip"]
) -> tuple[list[Entry], list[Result]]:
    """The entries whose result is no error, with their results. UserError if `on_bad` is error or a class is lost."""
    bad = [result for result in results if isinstance(result, UserError)]
    more = f" (and {len(bad) - 1} more images)" if len(bad) > 1 else ""
    if bad and on_bad == "error":
        raise UserError(f"{bad[0]}{more}; remove what cannot be read, or set data.on_bad=skip")
    good = [(entry, result) for entry, result in zip(entries, results, strict=True) if not isinstance(result, UserError)]
    kept = {(entry.split, entry.label) for entry, _ in good}
    for entry in entries:
        if (entry.split, entry.label) not in kept:
            raise UserError(f"no image of class {entry.label!r} in {entry.split} can be read: {bad[0]}{more}")
    return [entry for entry, _ in good], [result for _, result in good]


def _packed(pack: "packed.Pack") -> DataSet:
    rows = pack.index
    whole = Split(rows["label"].astype(np.int64), pack.names, None, tuple(packed.Record(pack, row) for row in range(len(rows))))
    splits = {name: whole.take(rows["split"] == i) for i, name in enumerate(pack.about["splits"])}
    sizes = int(np.median(rows["height"])), int(np.median(rows["width"]))
    about = pack.about
    return DataSet(about["name"], tuple(about["classes"]), about["channels"], splits, about["left_out"], sizes)


def _official(name: str, folder: Path) -> DataSet:
    official = OFFICIAL[name]
    if lacks := official.lacks(folder):
        raise UserError(f"{folder}: holds part of {name}: {', '.join(lacks)} is missing")
    if name == "fashion-mnist":
        return _fashion(name, folder)
    # CIFAR-100's records have a coarse label before the fine one.
    meta, names, limits = {
        "cifar10": ("batches.meta.txt", _CIFAR10, [10]),
        "cifar100": ("fine_label_names.txt", _CIFAR100, [20, 100]),
    }[name]
    classes = tuple(names.split())
    if (folder / meta).is_file():
        classes = tuple((folder / meta).read_text(encoding="utf-8", errors="replace").split())
        if len(set(classes)) != limits[-1]:
            raise UserError(f"{folder / meta}: {len(set(classes))} class names instead of {limits[-1]}: correct or remove it")
    splits = {}
    for split in ("train", "test"):
        files = [file for file in official.files if ("test" in file) == (split == "test")]
        parts = [read_cifar(folder / file, official.files[file], limits) for file in files]
        labels = np.concatenate([labels[:, -1] for labels, _ in parts])
        splits[split] = _resident(f"{name}/{split}", labels, np.concatenate([pixels for _, pixels in parts]))
    return DataSet(name, classes, 3, splits, {}, (32, 32))


def _fashion(name: str, folder: Path) -> DataSet:
    """Fashion-MNIST or its sample, from idx files. MNIST's have the same names, but other numbers of images a class."""
    splits = {}
    per_class = {"train": 600, "test": 100} if name == "fashion-sample" else {"train": 6000, "test": 1000}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (
            OFFICIAL["fashion-mnist"].file(folder, f"{prefix}-{kind}") or folder / f"{prefix}-{kind}.gz"
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        pixels, classes = read_idx(images), read_idx(labels)
        if classes.ndim != 1 or np.bincount(classes, minlength=10).tolist() != [per_class[split]] * 10:
            raise UserError(f"{labels}: not the labels of {name}, which are {per_class[split]:,} of each of 10 classes")
        if pixels.shape != (len(classes), 28, 28):
            raise UserError(f"{images}: {pixels.shape} instead of ({len(classes)}, 28, 28): not the images of {name}")
        splits[split] = _resident(f"{name}/{split}", classes.astype(np.int64), pixels[:, None])
    return DataSet(name, tuple(_FASHION.split(",")), 1, splits, {}, (28, 28))


def _resident(title: str, labels: np.ndarray, pixels: np.ndarray) -> Split:
    return Split(labels, tuple(f"{title}[{i}]" for i in range(len(labels))), torch.from_numpy(pixels))
