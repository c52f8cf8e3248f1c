"""Reader for the original Caffe release of ResNet-50, 101 and 152: .caffemodel and mean .binaryproto.

The release differs from other weights: the input is BGR on 0..255 minus a mean image; pool1 has no padding and rounds up; a
bottleneck has its stride in the first 1x1; BN statistics must be divided by a third blob; gamma and beta are in a Scale layer;
conv1 of ResNet-50 has a bias, which is folded into its BN.
"""

import math
import mmap
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError, did_you_mean, naming
from reslearn.nets import create
from reslearn.weights.head import shape_text
from reslearn.weights.read.protobuf import BYTES, FIXED32, VARINT, Malformed, fields, varint
from reslearn.weights.read.prototxt import check_prototxt, layer_list, units

NETS = ("resnet50", "resnet101", "resnet152")
CHANNEL_MEANS = (123.152, 115.903, 103.063)  # of the release's mean image, RGB on 0..255
# field of NetParameter with the layers -> field numbers of a layer's name, type and blobs; 2: old format, with numeric types
LAYERS = {100: (1, 2, 7), 2: (4, 5, 6)}


@dataclass
class Weights:
    """A layer of a .caffemodel."""

    name: str = ""
    type: str = ""
    blobs: list[Tensor] = field(default_factory=list)


def _blob(data: memoryview, start: int, end: int) -> Tensor:
    """Decodes a BlobProto to a float32 tensor. Raises Malformed if its shape and number of values differ."""
    dims: list[int] = []
    legacy = [0, 0, 0, 0]
    parts: list[memoryview] = []
    single = array("f")
    for number, wire, a, b in fields(data, start, end):
        if number == 7 and wire == BYTES:
            for n, w, c, d in fields(data, a, b):
                while n == 1 and w == BYTES and c < d:
                    value, c = varint(data, c, d)
                    dims.append(value)
                if n == 1 and w == VARINT:
                    dims.append(c)
        elif number in (1, 2, 3, 4) and wire == VARINT:
            legacy[number - 1] = a
        elif number == 5 and wire == BYTES:
            parts.append(data[a:b])
        elif number == 5 and wire == FIXED32:
            single.frombytes(data[a:b])
    if any(len(part) % 4 for part in parts):
        raise Malformed(f"at byte {start}: the length of a blob is not a multiple of 4 bytes")
    pieces = [np.frombuffer(part, "<f4") for part in parts] + ([np.array(single, "<f4")] if single else [])
    values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, "<f4")])
    dims = dims or [n for n in legacy if n] or [len(values)]
    if len(dims) > 8 or math.prod(dims) != len(values):
        raise Malformed(f"at byte {start}: a blob of {shape_text(dims[:8])} has {len(values):,} values")
    return torch.from_numpy(values.astype(np.float32)).reshape(dims)


def _layer(data: memoryview, start: int, end: int, name: int, kind: int, blobs: int) -> Weights:
    layer = Weights()
    for number, wire, a, b in fields(data, start, end):
        if number == name and wire == BYTES:
            layer.name = bytes(data[a:b][:200]).decode("utf-8", "replace")
        elif number == kind:
            layer.type = bytes(data[a:b][:200]).decode("utf-8", "replace") if wire == BYTES else str(a)
        elif number == blobs and wire == BYTES:
            try:
                layer.blobs.append(_blob(data, a, b))
            except Malformed as error:
                raise Malformed(f"in layer '{layer.name}', {error}") from error
    return layer


def _bytes(path: Path) -> memoryview:
    """Memory-maps a file. Raises UserError."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:  # mmap rejects empty files
        raise UserError(f"{path} is empty") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_caffemodel(path: Path) -> list[Weights]:
    """Reads the layers of a .caffemodel, in order. Raises UserError with the file and the invalid byte or layer."""
    data = _bytes(path)
    try:
        layers = [
            _layer(data, a, b, *LAYERS[number])
            for number, wire, a, b in fields(data, 0, len(data))
            if number in LAYERS and wire == BYTES
        ]
    except Malformed as error:
        raise UserError(f"{path} is not a valid .caffemodel: {error}") from error
    if not layers:
        raise UserError(f"{path} is not a .caffemodel: it has no layers")
    return layers


def read_mean(path: Path, size: tuple[int, int] = (224, 224)) -> Tensor:
    """Reads the mean image of a .binaryproto (BGR on 0..255) as RGB on [0, 1], (3, height, width). Raises UserError."""
    data = _bytes(path)
    try:
        mean = _blob(data, 0, len(data))
    except Malformed as error:
        raise UserError(f"{path} is not a valid .binaryproto: {error}") from error
    mean = mean.squeeze(0) if mean.ndim == 4 else mean
    if tuple(mean.shape) != (3, *size):
        raise UserError(f"{path} has shape {shape_text(mean.shape)}; a mean image must be 3x{size[0]}x{size[1]}")
    if not (mean.isfinite().all() and mean.min() >= 0 and mean.max() <= 255):
        raise UserError(f"{path} is not a mean image: it has values outside 0..255")
    return mean.flip(0) / 255


def which_net(layers: list[Weights], net: str | None = None) -> str:
    """Identifies the network by the names of the layers. Raises UserError with the first layer missing from the nearest network."""
    weighted = [layer.name for layer in layers if layer.blobs]
    names = set(weighted)
    if duplicate := next((name for name in weighted if weighted.count(name) > 1), None):
        raise UserError(f"has two layers called '{duplicate}'")
    if net is not None and net not in NETS:
        raise UserError(f"net '{net}': the Caffe release only has {', '.join(NETS)}")
    missing = {}
    for name in [net] if net else NETS:
        needed = [layer.name for layer in layer_list(name) if layer.type in ("Convolution", "BatchNorm", "Scale", "InnerProduct")]
        missing[name] = [layer for layer in needed if layer not in names]
        extra = len(names) - len(needed) + len(missing[name])
        if not missing[name] and not extra:
            return name
    name = min(missing, key=lambda n: len(missing[n]))
    if not missing[name]:
        extra = sorted(names - {layer.name for layer in layer_list(name) if layer.type not in ("ReLU", "Pooling", "Eltwise")})
        raise UserError(f"is not {name} of the Caffe release: layer '{extra[0]}' is unexpected")
    first = missing[name][0]
    hint = did_you_mean(first, names)
    raise UserError(f"is not from the Caffe release: the nearest is {name}, but layer '{first}' is missing{hint}")


def convert(layers: list[Weights], net: str) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors with our names, for create(net, pool="ceil"), and notes. Raises UserError with the invalid layer."""
    by_name = {layer.name: layer.blobs for layer in layers if layer.blobs}
    tensors: dict[str, Tensor] = {}
    notes = []

    def blobs(name: str, *counts: int) -> list[Tensor]:
        if name not in by_name or len(by_name[name]) not in counts:
            raise UserError(f"layer '{name}' has {len(by_name.get(name, []))} blobs, not {' or '.join(map(str, counts))}")
        return by_name[name]

    for caffe, suffix, conv, bn in [
        ("conv1", "_conv1", "conv1", "bn1"),
        *((f"res{name}", name, conv, bn) for name, conv, bn, _ in units(net)),
    ]:
        weight, *bias = blobs(caffe, 1, 2)
        mean, variance, factor = blobs(f"bn{suffix}", 3)
        gamma, beta = blobs(f"scale{suffix}", 2)
        if factor.numel() != 1:
            raise UserError(f"layer 'bn{suffix}' has a factor of {factor.numel()} values, not 1")
        scale = 1 / factor.item() if factor.item() else 0.0  # Caffe stores weighted sums and their weight
        mean, variance = mean * scale, variance * scale
        if bias:  # BN subtracts its mean, so the bias can be folded into it
            if bias[0].numel() != mean.numel():
                raise UserError(f"layer '{caffe}' has a bias of {bias[0].numel()} values for {mean.numel()} channels")
            mean = mean - bias[0].reshape(mean.shape)
            notes.append(f"the bias of '{caffe}' is folded into the mean of its BN")
        if caffe == "conv1":
            weight = weight.flip(1) if weight.ndim == 4 else weight  # BGR to RGB
        tensors |= {f"{conv}.weight": weight, f"{bn}.weight": gamma, f"{bn}.bias": beta}
        tensors |= {f"{bn}.running_mean": mean, f"{bn}.running_var": variance}
    tensors["fc.weight"], tensors["fc.bias"] = blobs("fc1000", 2)
    notes.append("conv1 is converted from BGR to RGB; BN means and variances are divided by Caffe's factor")
    return tensors, notes


def fit(tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Reshapes the tensors: old files write (1, 1, 1, n) for (n). Raises UserError for the first that does not fit."""
    fitted = {}
    for name, tensor in tensors.items():
        ours, theirs = [n for n in shapes[name] if n != 1], [n for n in tensor.shape if n != 1]
        if ours != theirs:
            raise UserError(f"'{name}' is {shape_text(tensor.shape)}, not {shape_text(shapes[name])}")
        fitted[name] = tensor.reshape(shapes[name])
    return fitted


def read(path: Path, net: str | None = None, prototxt: str | Path | None = None) -> tuple[str, dict[str, Tensor], list[str]]:
    """Reads a .caffemodel. Returns the network, its tensors with our names for create(net, pool="ceil"), and notes.

    prototxt: a file to check the layers against. Raises UserError.
    """
    layers = read_caffemodel(path)
    with naming(path):
        name = which_net(layers, net)
    notes = [f"layers of {name} in the Caffe release: stride in the 1x1, max pool without padding, rounded up"]
    if prototxt is not None:
        notes.append(check_prototxt(Path(prototxt), name))
    with naming(path):
        tensors, more = convert(layers, name)
        with torch.device("meta"):
            shapes = {key: t.shape for key, t in create(name, max(2, tensors["fc.bias"].numel())).state_dict().items()}
        return name, fit(tensors, shapes), [*notes, *more]


def default_input(mean_file: str | Path | None) -> tuple[Preprocessing, str]:
    """The preprocessing of the Caffe release: RGB on 0..255 minus a mean image (default: its channel means), and a note."""
    shape: dict[str, Any] = {"channels": 3, "size": (224, 224), "crop_ratio": 0.875, "std": (1 / 255,) * 3}
    if mean_file is None:
        view = Preprocessing(mean=tuple(m / 255 for m in CHANNEL_MEANS), **shape)
        return view, "input: 224 px minus the channel means of the Caffe release (for exact results, pass its mean image)"
    image = read_mean(Path(mean_file))
    view = Preprocessing(mean=tuple(image.mean((1, 2)).tolist()), pixel_mean=Preprocessing.encode_pixel_mean(image), **shape)
    return view, f"input: 224 px minus the mean image in {Path(mean_file).name}"
