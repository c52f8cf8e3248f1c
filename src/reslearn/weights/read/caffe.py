"""The original Caffe release of ResNet-50, 101 and 152: .caffemodel, mean .binaryproto and .prototxt.

What differs from other files (facts of the release): input BGR, 0..255, minus a mean image; pool1 without padding, rounded up;
the stride of a bottleneck in its first 1x1; BN statistics divided by a third blob; gamma and beta in a layer of their own;
and a bias in conv1 of ResNet-50, which goes into its BN.
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
from reslearn.weights.read.protobuf import BYTES, FIXED32, VARINT, Malformed, fields, varint
from reslearn.weights.read.prototxt import check_prototxt, layer_list, units

NETS = ("resnet50", "resnet101", "resnet152")
CHANNEL_MEANS = (123.152, 115.903, 103.063)  # RGB on 0..255, of the release's mean image
# NetParameter's field of layers -> that layer's fields of name, type and blobs; 2 is the old format, whose type is a number
LAYERS = {100: (1, 2, 7), 2: (4, 5, 6)}


@dataclass
class Weights:
    """A layer as a .caffemodel holds it."""

    name: str = ""
    type: str = ""
    blobs: list[Tensor] = field(default_factory=list)


def _blob(data: memoryview, start: int, end: int) -> Tensor:
    """A BlobProto as a float32 tensor; its shape has to fit its numbers. Raises Malformed."""
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
        raise Malformed(f"at byte {start}: a blob whose length is no multiple of 4 bytes")
    pieces = [np.frombuffer(part, "<f4") for part in parts] + ([np.array(single, "<f4")] if single else [])
    values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.zeros(0, "<f4")])
    dims = dims or [n for n in legacy if n] or [len(values)]
    if len(dims) > 8 or math.prod(dims) != len(values):
        shown = "x".join(map(str, dims[:8]))
        raise Malformed(f"at byte {start}: a blob of {shown} that holds {len(values):,} numbers")
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
    """A file's bytes, mapped. Raises UserError."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError as error:  # mmap takes no empty file
        raise UserError(f"{path} is empty") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_caffemodel(path: Path) -> list[Weights]:
    """The layers of a .caffemodel, in order. Raises UserError naming the file and the byte or layer that is wrong."""
    data = _bytes(path)
    try:
        layers = [
            _layer(data, a, b, *LAYERS[number])
            for number, wire, a, b in fields(data, 0, len(data))
            if number in LAYERS and wire == BYTES
        ]
    except Malformed as error:
        raise UserError(f"{path} is not a whole .caffemodel: {error}") from error
    if not layers:
        raise UserError(f"{path} holds no layers: it is no .caffemodel")
    return layers


def read_mean(path: Path, size: tuple[int, int] = (224, 224)) -> Tensor:
    """The mean image of a .binaryproto: BGR on 0..255 in the file, RGB on [0, 1] as given, (3, height, width). Raises UserError."""
    data = _bytes(path)
    try:
        mean = _blob(data, 0, len(data))
    except Malformed as error:
        raise UserError(f"{path} is not a whole .binaryproto: {error}") from error
    mean = mean.squeeze(0) if mean.ndim == 4 else mean
    if tuple(mean.shape) != (3, *size):
        raise UserError(f"{path} holds {'x'.join(map(str, mean.shape))} numbers; a mean image of 3x{size[0]}x{size[1]} is needed")
    if not (mean.isfinite().all() and mean.min() >= 0 and mean.max() <= 255):
        raise UserError(f"{path} holds values outside of 0..255: it is no mean image")
    return mean.flip(0) / 255


def which_net(layers: list[Weights], net: str | None = None) -> str:
    """The network whose layers with weights a file has. Raises UserError naming the first missing layer of the nearest."""
    weighted = [layer.name for layer in layers if layer.blobs]
    names = set(weighted)
    if twice := next((name for name in weighted if weighted.count(name) > 1), None):
        raise UserError(f"has two layers called '{twice}'")
    if net is not None and net not in NETS:
        raise UserError(f"net '{net}': the Caffe release has {', '.join(NETS)} only")
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
        raise UserError(f"is not {name} of the Caffe release: layer '{extra[0]}' does not belong to it")
    first = missing[name][0]
    raise UserError(
        f"is not a net of the Caffe release: nearest is {name}, but layer '{first}' is missing{did_you_mean(first, names)}"
    )


def convert(layers: list[Weights], net: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, for create(net, pool="ceil"), and sentences. Raises UserError naming the layer that does not fit."""
    found = {layer.name: layer.blobs for layer in layers if layer.blobs}
    tensors: dict[str, Tensor] = {}
    said = []

    def blobs(name: str, *counts: int) -> list[Tensor]:
        if name not in found or len(found[name]) not in counts:
            raise UserError(f"layer '{name}' has {len(found.get(name, []))} blobs, not {' or '.join(map(str, counts))}")
        return found[name]

    for caffe, suffix, conv, bn in [
        ("conv1", "_conv1", "conv1", "bn1"),
        *((f"res{name}", name, conv, bn) for name, conv, bn, _ in units(net)),
    ]:
        weight, *bias = blobs(caffe, 1, 2)
        mean, variance, factor = blobs(f"bn{suffix}", 3)
        gamma, beta = blobs(f"scale{suffix}", 2)
        if factor.numel() != 1:
            raise UserError(f"layer 'bn{suffix}' has a factor of {factor.numel()} numbers, not 1")
        scale = 1 / factor.item() if factor.item() else 0.0  # Caffe keeps sums and their weight
        mean, variance = mean * scale, variance * scale
        if bias:  # BN subtracts its mean, so a bias before it can go there
            if bias[0].numel() != mean.numel():
                raise UserError(f"layer '{caffe}' has a bias of {bias[0].numel()} numbers for {mean.numel()} channels")
            mean = mean - bias[0].reshape(mean.shape)
            said.append(f"the bias of '{caffe}' is folded into the mean of its BN")
        if caffe == "conv1":
            weight = weight.flip(1) if weight.ndim == 4 else weight  # BGR to RGB
        tensors |= {f"{conv}.weight": weight, f"{bn}.weight": gamma, f"{bn}.bias": beta}
        tensors |= {f"{bn}.running_mean": mean, f"{bn}.running_var": variance}
    tensors["fc.weight"], tensors["fc.bias"] = blobs("fc1000", 2)
    said.append("conv1 takes RGB instead of BGR; BN means and variances are divided by Caffe's factor")
    return tensors, said


def fit(tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors in our shapes: old files write (1, 1, 1, n) for (n). Raises UserError naming the first that does not fit."""
    fitted = {}
    for name, tensor in tensors.items():
        ours, theirs = [n for n in shapes[name] if n != 1], [n for n in tensor.shape if n != 1]
        if ours != theirs:
            raise UserError(
                f"the weights of '{name}' are {'x'.join(map(str, tensor.shape))}, not {'x'.join(map(str, shapes[name]))}"
            )
        fitted[name] = tensor.reshape(shapes[name])
    return fitted


def read(path: Path, net: str | None = None, prototxt: str | Path | None = None) -> tuple[str, dict[str, Tensor], list[str]]:
    """A .caffemodel's network, its tensors under our names, for create(net, pool="ceil"), and sentences of what was recognized.

    prototxt: a file to check the layers against. Raises UserError.
    """
    layers = read_caffemodel(path)
    with naming(path):
        name = which_net(layers, net)
    said = [f"the layers are those of {name} in Caffe's release: stride in the 1x1, max pool without padding, rounded up"]
    if prototxt is not None:
        said.append(check_prototxt(Path(prototxt), name))
    with naming(path):
        tensors, more = convert(layers, name)
        with torch.device("meta"):
            shapes = {key: t.shape for key, t in create(name, max(2, tensors["fc.bias"].numel())).state_dict().items()}
        return name, fit(tensors, shapes), [*said, *more]


def usual_input(mean_file: str | Path | None) -> tuple[Preprocessing, str]:
    """What images go through before the Caffe release's nets: RGB on 0..255 minus a mean image, or the channels' means."""
    shape: dict[str, Any] = {"channels": 3, "size": (224, 224), "crop_ratio": 0.875, "std": (1 / 255,) * 3}
    if mean_file is None:
        mean = tuple(m / 255 for m in CHANNEL_MEANS)
        return Preprocessing(
            mean=mean, **shape
        ), "input of 224 px minus the channel means of Caffe's release; give its mean image to be exact"
    image = read_mean(Path(mean_file))
    view = Preprocessing(mean=tuple(image.mean((1, 2)).tolist()), pixel_mean=Preprocessing.encode_pixel_mean(image), **shape)
    return view, f"input of 224 px minus the mean image of {Path(mean_file).name}"
