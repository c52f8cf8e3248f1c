"""`open(name or path)` returns a `DataSet`: splits of labeled images, classes, and a fingerprint."""

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
"""The data sets that `open` accepts by name. `fashion-sample` is included in this package."""

# Images are kept in memory if all have the same size, with at most this many pixels per side and bytes in total.
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
    """Labeled images: either `pixels` in memory, or `files` to read on demand.

    labels: int64 (N,), indices into DataSet.classes. names: N names for messages, relative paths or like "cifar10/train[17]".
    pixels: uint8 (N, C, H, W). files: N paths or packed images.
    """

    labels: np.ndarray
    names: Sequence[str]
    pixels: torch.Tensor | None = None
    files: tuple[Path | PackedImage, ...] | None = None

    def __post_init__(self) -> None:
        images = self.pixels if self.files is None else self.files
        if images is None or (self.pixels is not None and self.files is not None):
            raise ValueError("a Split needs either pixels or files")
        if not len(self.labels) == len(self.names) == len(images):
            raise ValueError(f"{len(self.labels)} labels, {len(self.names)} names and {len(images)} images")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> "Split":
        """Selects images by indices, in their order, or by a mask of N booleans."""
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
    """Images with classes, in splits "train", "val" and "test", or in a single split "all" if the folder or list is undivided.

    channels: 1 if every image is gray, else 3. left_out: number of files left out, by reason. sizes: median (height, width).
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
        """The sha256, in hex, of the images and classes, independent of their order.

        Covers split, class, shape and pixels of images in memory; split, class, name and size of files.
        """
        digests = sorted(digest for name in self.splits for digest in self._digests(name))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def arrangement(self) -> str:
        """The sha256, in hex, of the images' names, order and content."""
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
                    raise UserError(f"{file}: deleted since the data set was opened: {why.strerror}") from None
                yield hashlib.sha256(json.dumps([name, self.classes[label], title, size]).encode()).digest()


def open(name_or_path: str | Path, *, on_bad: Literal["error", "skip"] = "error") -> DataSet:
    """Opens a data set by name (see NAMES) or path.

    A path is a folder of class folders, optionally in train/, val/ and test/; a .csv or .jsonl list; a folder written by
    `reslearn pack`; or a folder with the official files of a named set. A str that is a known name opens that set even if a folder
    has the same name: use ./cifar10 for the folder. Unreadable images raise UserError, or are left out with on_bad="skip".
    Raises UserError if there is no such set or it is invalid.
    """
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad={on_bad!r}: must be error or skip")
    opened = find(name_or_path)
    return opened if isinstance(opened, DataSet) else _load(*opened, on_bad)


def find(name_or_path: str | Path, problem: Problem = refuse) -> DataSet | tuple[str, Listing]:
    """Finds a data set. Returns a named or packed DataSet, or (name, listing) of a folder or list whose images are not read yet.

    problem: see folder.Problem. Raises UserError.
    """
    if name_or_path == "fashion-sample":
        return _fashion("fashion-sample", _SAMPLES)
    if isinstance(name_or_path, str) and name_or_path in OFFICIAL:
        return _official(name_or_path, locate(name_or_path))
    try:
        path = user_path(name_or_path)
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as why:  # the name is too long, or a parent folder is not accessible
        raise UserError(f"{name_or_path}: cannot be opened: {why}") from None
    if exists and not is_folder:
        if path.suffix.lower() in (".csv", ".jsonl"):
            return path.name, read_list(path, problem)
        raise UserError(f"{path}: not a data set: must be a folder, a .csv or .jsonl list, or one of {', '.join(NAMES)}")
    if not is_folder:
        raise UserError(f"no data set or folder called {str(name_or_path)!r}{did_you_mean(str(name_or_path), NAMES)}")
    if packed.is_packed(path):
        return _packed(packed.Pack(path))
    official = [
        (name, folder) for name, known in OFFICIAL.items() for folder in (path, path / known.folder) if known.partly_in(folder)
    ]
    if len(official) > 1:
        names, folders = " and ".join(name for name, _ in official), " or ".join(str(folder) for _, folder in official)
        raise UserError(f"{path}: contains {names}: open {folders}")
    if official:
        return _official(*official[0])
    if (path / "data_batch_1").is_file():
        url = OFFICIAL["cifar10"].sources[0].url
        raise UserError(f"{path}: CIFAR's Python version (pickles) is not supported: get the binary version, {url}")
    return path.resolve().name, scan(path, problem)


def _load(name: str, listing: Listing, on_bad: Literal["error", "skip"]) -> DataSet:
    """Opens the images of a listing. Decodes small images of one size into memory, and leaves others as files."""
    entries, shapes = _drop_bad(listing.entries, for_each(lambda entry: probe(entry.file), listing.entries), on_bad)
    channels = max(channels for _, _, channels in shapes)
    sizes = {(height, width) for height, width, _ in shapes}
    height, width = (int(np.median(side)) for side in np.array(shapes).T[:2])
    pixels = None
    if len(sizes) == 1 and max(height, width) <= _RESIDENT_SIDE and len(entries) * channels * height * width <= _RESIDENT_BYTES:
        memory = np.empty((len(entries), channels, height, width), np.uint8)

        def decode(i: int) -> int:
            memory[i] = read(entries[i].file, channels).transpose(2, 0, 1)
            return i

        kept, rows = _drop_bad(entries, for_each(decode, range(len(entries))), on_bad)
        entries, pixels = kept, torch.from_numpy(memory if len(kept) == len(memory) else memory[rows])
    index = {label: i for i, label in enumerate(listing.labels)}
    whole = Split(
        np.array([index[entry.label] for entry in entries], np.int64),
        tuple(entry.name for entry in entries),
        pixels,
        None if pixels is not None else tuple(entry.file for entry in entries),
    )
    split_of = np.array([entry.split for entry in entries])
    splits = {split: whole.take(split_of == split) for split in dict.fromkeys(entry.split for entry in entries)}
    unreadable = len(listing.entries) - len(entries)
    left_out = listing.left_out | ({"unreadable": unreadable} if unreadable else {})
    return DataSet(name, listing.classes, channels, splits, left_out, (height, width))


def _drop_bad(
    entries: Sequence[Entry], results: Sequence[Result | UserError], on_bad: Literal["error", "skip"]
) -> tuple[list[Entry], list[Result]]:
    """Returns the entries without errors, and their results. Raises UserError if `on_bad` is "error" or a class becomes empty."""
    bad = [result for result in results if isinstance(result, UserError)]
    more = f" (and {len(bad) - 1} more images)" if len(bad) > 1 else ""
    if bad and on_bad == "error":
        raise UserError(f"{bad[0]}{more}; remove these images, or skip them (train: --set data.on_bad=skip, eval: --on-bad skip)")
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
    if missing := official.lacks(folder):
        raise UserError(f"{folder}: incomplete {name}: missing {', '.join(missing)}")
    if name == "fashion-mnist":
        return _fashion(name, folder)
    # A CIFAR-100 record has a coarse label before the fine one.
    meta, names, limits = {
        "cifar10": ("batches.meta.txt", _CIFAR10, [10]),
        "cifar100": ("fine_label_names.txt", _CIFAR100, [20, 100]),
    }[name]
    classes = tuple(names.split())
    if (folder / meta).is_file():
        classes = tuple((folder / meta).read_text(encoding="utf-8", errors="replace").split())
        if len(set(classes)) != limits[-1]:
            raise UserError(f"{folder / meta}: {len(set(classes))} class names instead of {limits[-1]}: fix or remove the file")
    splits = {}
    for split in ("train", "test"):
        files = [file for file in official.files if ("test" in file) == (split == "test")]
        batches = [read_cifar(folder / file, official.files[file], limits) for file in files]
        labels = np.concatenate([labels[:, -1] for labels, _ in batches])
        splits[split] = _resident(f"{name}/{split}", labels, np.concatenate([pixels for _, pixels in batches]))
    return DataSet(name, classes, 3, splits, {}, (32, 32))


def _fashion(name: str, folder: Path) -> DataSet:
    """Fashion-MNIST or its sample, from idx files. MNIST's files have the same names, but different class counts."""
    splits = {}
    per_class = {"train": 600, "test": 100} if name == "fashion-sample" else {"train": 6000, "test": 1000}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (
            OFFICIAL["fashion-mnist"].file(folder, f"{prefix}-{kind}") or folder / f"{prefix}-{kind}.gz"
            for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        pixels, classes = read_idx(images), read_idx(labels)
        if classes.ndim != 1 or np.bincount(classes, minlength=10).tolist() != [per_class[split]] * 10:
            raise UserError(f"{labels}: not {name}, which has {per_class[split]:,} labels of each of 10 classes")
        if pixels.shape != (len(classes), 28, 28):
            raise UserError(f"{images}: not {name}: shape {pixels.shape} instead of ({len(classes)}, 28, 28)")
        splits[split] = _resident(f"{name}/{split}", classes.astype(np.int64), pixels[:, None])
    return DataSet(name, tuple(_FASHION.split(",")), 1, splits, {}, (28, 28))


def _resident(title: str, labels: np.ndarray, pixels: np.ndarray) -> Split:
    return Split(labels, tuple(f"{title}[{i}]" for i in range(len(labels))), torch.from_numpy(pixels))
