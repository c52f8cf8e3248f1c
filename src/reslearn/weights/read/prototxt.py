"""The layers of the Caffe release of ResNet-50, 101 and 152, and .prototxt files, which describe the same as text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reslearn.errors import UserError, did_you_mean
from reslearn.nets import spec
from reslearn.weights.read.protobuf import Malformed, Message, parse_text

STAGES = ((2, "layer1"), (3, "layer2"), (4, "layer3"), (5, "layer4"))  # Caffe's stage, ours


@dataclass(frozen=True)
class Layer:
    """A layer as a prototxt describes it; None where a property does not apply."""

    name: str
    type: str
    num_output: int | None = None
    kernel_size: int | None = None
    stride: int | None = None
    pad: int | None = None
    bias_term: bool | None = None
    pool: str | None = None


def units(net: str) -> Iterator[tuple[str, str, str, int]]:
    """(Caffe's unit, our convolution, our BN, stride) of each convolution: ("2a_branch2a", "layer1.0.conv1", "layer1.0.bn1", 1)."""
    for (number, ours), count in zip(STAGES, spec(net).blocks, strict=True):
        for block in range(count):
            # In ResNet-101 and 152, blocks of the two long stages are numbered: a, b1, b2, ...
            numbered = net != "resnet50" and number in (3, 4)
            letter = f"b{block}" if numbered and block else chr(ord("a") + block)
            stride = 2 if number > 2 and block == 0 else 1
            at = f"{ours}.{block}"
            if block == 0:
                yield f"{number}{letter}_branch1", f"{at}.downsample.0", f"{at}.downsample.1", stride
            for i, branch in enumerate("abc", 1):
                yield f"{number}{letter}_branch2{branch}", f"{at}.conv{i}", f"{at}.bn{i}", stride if i == 1 else 1


def layer_list(net: str) -> list[Layer]:
    """The layers of our network under Caffe's names, in the order of the release's prototxt, without input and softmax."""
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
    """The layers of a .prototxt, in order, as far as layer_list describes them. Raises UserError."""
    try:
        net = parse_text(path.read_text(encoding="utf-8"))
        return [_described(layer, i) for i, layer in enumerate(net.get("layer", []) or net.get("layers", []), 1)]
    except (Malformed, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a prototxt: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _described(layer: Any, place: int) -> Layer:
    if not isinstance(layer, dict):
        raise Malformed(f"layer {place} is no message")
    name, kind = _first(layer, "name"), _first(layer, "type")
    if not isinstance(name, str) or not isinstance(kind, str):
        raise Malformed(f"layer {place} has no name or no type")
    where = {"Convolution": "convolution_param", "Pooling": "pooling_param", "InnerProduct": "inner_product_param"}
    param = _first(layer, {**where, "Scale": "scale_param"}.get(kind, "")) or {}
    if not isinstance(param, dict):
        raise Malformed(f"the parameters of layer '{name}' are no message")

    def number(*names: str, default: int | None = None) -> int | None:
        value = _first(param, *names)
        try:
            return default if value is None else int(value)
        except (TypeError, ValueError) as error:
            raise Malformed(f"{names[0]} of layer '{name}' is {str(value)[:30]!r}, not a number") from error

    spatial, linear = kind in ("Convolution", "Pooling"), kind in ("Convolution", "InnerProduct")
    default_bias = {"Convolution": "true", "InnerProduct": "true", "Scale": "false"}.get(kind)  # Caffe's
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
    """A sentence that a .prototxt describes our network. Raises UserError naming the first layer that differs."""
    found = {layer.name: layer for layer in read_prototxt(path)}
    ours = layer_list(net)
    for layer in ours:
        if layer.name not in found:
            raise UserError(f"{path} is not {net}: it has no layer '{layer.name}'{did_you_mean(layer.name, found)}")
        if found[layer.name] != layer:
            key = next(k for k, v in vars(layer).items() if getattr(found[layer.name], k) != v)
            theirs = getattr(found[layer.name], key)
            raise UserError(f"{path} is not {net}: {key} of layer '{layer.name}' is {theirs}, not {getattr(layer, key)}")
    known = {layer.name for layer in ours}
    extra = [
        n for n, layer in found.items() if n not in known and layer.type in ("Convolution", "InnerProduct", "BatchNorm", "Eltwise")
    ]
    if extra:
        raise UserError(f"{path} is not {net}: layer '{extra[0]}' does not belong to it")
    return f"the {len(ours)} layers of {path.name} are those of {net}"
