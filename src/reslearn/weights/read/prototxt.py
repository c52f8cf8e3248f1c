"""The layers of the Caffe release of ResNet-50, 101 and 152, and a reader for .prototxt files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reslearn.errors import UserError, did_you_mean
from reslearn.nets import spec
from reslearn.weights.read.protobuf import Malformed, Message, parse_text

STAGES = ((2, "layer1"), (3, "layer2"), (4, "layer3"), (5, "layer4"))  # Caffe's stage, our stage


@dataclass(frozen=True)
class Layer:
    """A layer of a prototxt; properties that do not apply are None."""

    name: str
    type: str
    num_output: int | None = None
    kernel_size: int | None = None
    stride: int | None = None
    pad: int | None = None
    bias_term: bool | None = None
    pool: str | None = None


def units(net: str) -> Iterator[tuple[str, str, str, int]]:
    """Yields (Caffe unit, our convolution, our BN, stride), e.g. ("2a_branch2a", "layer1.0.conv1", "layer1.0.bn1", 1)."""
    for (number, stage), count in zip(STAGES, spec(net).blocks, strict=True):
        for i in range(count):
            # In ResNet-101 and 152, the blocks of the two long stages are numbered: a, b1, b2, ...
            numbered = net != "resnet50" and number in (3, 4)
            letter = f"b{i}" if numbered and i else chr(ord("a") + i)
            stride = 2 if number > 2 and i == 0 else 1
            block = f"{stage}.{i}"
            if i == 0:
                yield f"{number}{letter}_branch1", f"{block}.downsample.0", f"{block}.downsample.1", stride
            for j, branch in enumerate("abc", 1):
                yield f"{number}{letter}_branch2{branch}", f"{block}.conv{j}", f"{block}.bn{j}", stride if j == 1 else 1


def layer_list(net: str) -> list[Layer]:
    """The layers of our network with Caffe's names, in the order of the release's prototxt, without input and softmax."""
    bias = net == "resnet50"

    def unit(name: str, stem: str, out: int, kernel: int, stride: int, bias: bool = False) -> list[Layer]:
        conv = Layer(name, "Convolution", out, kernel, stride, kernel // 2, bias)
        return [conv, Layer(f"bn{stem}", "BatchNorm"), Layer(f"scale{stem}", "Scale", bias_term=True)]

    layers = [*unit("conv1", "_conv1", 64, 7, 2, bias), Layer("conv1_relu", "ReLU")]
    layers.append(Layer("pool1", "Pooling", None, 3, 2, 0, None, "MAX"))
    for name, ours, _, stride in units(net):
        width = 64 << (int(name[0]) - 2)
        last = name.endswith(("branch1", "2c"))
        layers += unit(f"res{name}", name, 4 * width if last else width, 3 if ours.endswith("conv2") else 1, stride)
        if name.endswith("2c"):
            block = name.split("_")[0]
            layers += [Layer(f"res{block}", "Eltwise"), Layer(f"res{block}_relu", "ReLU")]
        elif not name.endswith("branch1"):
            layers.append(Layer(f"res{name}_relu", "ReLU"))
    return [*layers, Layer("pool5", "Pooling", None, 7, 1, 0, None, "AVE"), Layer("fc1000", "InnerProduct", 1000, bias_term=True)]


def _first(message: Message, *names: str) -> Any:
    return next((message[name][0] for name in names if name in message), None)


def read_prototxt(path: Path) -> list[Layer]:
    """Reads the layers of a .prototxt, in order, with the properties of Layer. Raises UserError."""
    try:
        net = parse_text(path.read_text(encoding="utf-8"))
        return [_parse_layer(layer, i) for i, layer in enumerate(net.get("layer", []) or net.get("layers", []), 1)]
    except (Malformed, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a prototxt: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _parse_layer(layer: Any, index: int) -> Layer:
    """index: of the layer, from 1."""
    if not isinstance(layer, dict):
        raise Malformed(f"layer {index} is not a message")
    name, kind = _first(layer, "name"), _first(layer, "type")
    if not isinstance(name, str) or not isinstance(kind, str):
        raise Malformed(f"layer {index} has no name or no type")
    keys = {"Convolution": "convolution_param", "Pooling": "pooling_param", "InnerProduct": "inner_product_param"}
    param = _first(layer, {**keys, "Scale": "scale_param"}.get(kind, "")) or {}
    if not isinstance(param, dict):
        raise Malformed(f"the parameters of layer '{name}' are not a message")

    def number(*names: str, default: int | None = None) -> int | None:
        value = _first(param, *names)
        try:
            return default if value is None else int(value)
        except (TypeError, ValueError) as error:
            raise Malformed(f"{names[0]} of layer '{name}' is {str(value)[:30]!r}, not a number") from error

    spatial, linear = kind in ("Convolution", "Pooling"), kind in ("Convolution", "InnerProduct")
    default_bias = {"Convolution": "true", "InnerProduct": "true", "Scale": "false"}.get(kind)  # in Caffe
    return Layer(
        name,
        kind,
        number("num_output") if linear else None,
        number("kernel_size", "kernel_h") if spatial else None,
        number("stride", "stride_h", default=1) if spatial else None,
        number("pad", "pad_h", default=0) if spatial else None,
        None if default_bias is None else (_first(param, "bias_term") or default_bias) == "true",
        (_first(param, "pool") or "MAX") if kind == "Pooling" else None,
    )


def check_prototxt(path: Path, net: str) -> str:
    """Checks that a .prototxt describes our network and returns a note. Raises UserError for the first layer that differs."""
    theirs = {layer.name: layer for layer in read_prototxt(path)}
    ours = layer_list(net)
    for layer in ours:
        if layer.name not in theirs:
            raise UserError(f"{path} is not {net}: it has no layer '{layer.name}'{did_you_mean(layer.name, theirs)}")
        if theirs[layer.name] != layer:
            key = next(k for k, v in vars(layer).items() if getattr(theirs[layer.name], k) != v)
            value = getattr(theirs[layer.name], key)
            raise UserError(f"{path} is not {net}: {key} of layer '{layer.name}' is {value}, not {getattr(layer, key)}")
    names = {layer.name for layer in ours}
    kinds = ("Convolution", "InnerProduct", "BatchNorm", "Eltwise")
    if extra := [layer.name for layer in theirs.values() if layer.name not in names and layer.type in kinds]:
        raise UserError(f"{path} is not {net}: layer '{extra[0]}' is unexpected")
    return f"the {len(ours)} layers of {path.name} match {net}"
