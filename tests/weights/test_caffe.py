"""Import of the Caffe release: files from a writer in this module, checked against a direct evaluation of the layers."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import reslearn
from reslearn import UserError
from reslearn.weights.read import caffe, import_weights
from reslearn.weights.read.caffe import layer_list, read_caffemodel, read_mean
from reslearn.weights.read.protobuf import Malformed, parse_text
from reslearn.weights.read.prototxt import check_prototxt, read_prototxt

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}
Blobs = dict[str, list[Tensor]]
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


# --- protocol-buffers writer -----------------------------------------------------------------------------------------------


def number(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def message(field: int, content: bytes) -> bytes:
    return number(field << 3 | 2) + number(len(content)) + content


def blob(tensor: Tensor, legacy: bool = False, packed: bool = True) -> bytes:
    dims = [*(1,) * (4 - tensor.ndim), *tensor.shape]
    if legacy:
        shape = b"".join(number(i << 3) + number(n) for i, n in enumerate(dims, 1))
    else:
        shape = message(7, message(1, b"".join(map(number, tensor.shape))))
    values = tensor.numpy().astype("<f4").tobytes()
    if not packed:
        return shape + b"".join(number(5 << 3 | 5) + values[i : i + 4] for i in range(0, len(values), 4))
    return shape + message(5, values)


def caffemodel(blobs: Blobs, **encoding: bool) -> bytes:
    kinds = {layer.name: layer.type for net in ("resnet50", "resnet101") for layer in layer_list(net)}
    body = message(1, b"ResNet")
    for name, tensors in {"data": [], **blobs}.items():
        layer = message(1, name.encode()) + message(2, kinds.get(name, "Input").encode()) + message(3, b"x") + message(4, b"y")
        body += message(100, layer + b"".join(message(7, blob(tensor, **encoding)) for tensor in tensors))
    return body


# --- an independent implementation of the release's networks ----------------------------------------------------------------


def blocks(depth: int) -> Iterator[tuple[str, int, int, bool]]:
    """Yields (name, width, stride, projects) for each block: "2a", "3b1", ..."""
    for stage, count in zip((2, 3, 4, 5), DEPTHS[depth], strict=True):
        for i in range(count):
            letter = "abcdef"[i] if depth == 50 or stage in (2, 5) else "a" if i == 0 else f"b{i}"
            yield f"{stage}{letter}", 64 * 2 ** (stage - 2), 2 if i == 0 and stage > 2 else 1, i == 0


def random_blobs(depth: int, classes: int = 1000) -> Blobs:
    generator = torch.Generator().manual_seed(depth)
    blobs: Blobs = {}

    def unit(conv: str, suffix: str, out: int, channels: int, kernel: int, bias: bool = False) -> None:
        weight = torch.randn(out, channels, kernel, kernel, generator=generator) * (2 / (channels * kernel * kernel)) ** 0.5
        blobs[conv] = [weight, torch.randn(out, generator=generator)] if bias else [weight]
        mean, variance = torch.randn(out, generator=generator) * 0.1, torch.rand(out, generator=generator) + 0.5
        factor = 1.0 if conv.startswith("res2") else 999.98
        blobs[f"bn{suffix}"] = [mean * factor, variance * factor, torch.tensor([factor])]
        blobs[f"scale{suffix}"] = [torch.rand(out, generator=generator) * 0.5 + 0.2, torch.randn(out, generator=generator) * 0.1]

    unit("conv1", "_conv1", 64, 3, 7, bias=depth == 50)
    features = 64
    for name, width, _, projects in blocks(depth):
        if projects:
            unit(f"res{name}_branch1", f"{name}_branch1", 4 * width, features, 1)
        shapes = ((width, features, 1), (width, width, 3), (4 * width, width, 1))
        for branch, (out, channels, kernel) in zip("abc", shapes, strict=True):
            unit(f"res{name}_branch2{branch}", f"{name}_branch2{branch}", out, channels, kernel)
        features = 4 * width
    blobs["fc1000"] = [torch.randn(classes, features, generator=generator) * 0.02, torch.randn(classes, generator=generator) * 0.1]
    return blobs


def evaluate(blobs: Blobs, depth: int, x: Tensor) -> Tensor:
    """Logits of the Caffe network for BGR on 0..255 minus the mean."""

    def unit(x: Tensor, conv: str, suffix: str, stride: int) -> Tensor:
        weight, *bias = blobs[conv]
        x = F.conv2d(x, weight, bias[0] if bias else None, stride, weight.shape[-1] // 2)
        mean, variance, factor = blobs[f"bn{suffix}"]
        s = 0 if factor.item() == 0 else 1 / factor.item()
        x = (x - (mean * s).view(1, -1, 1, 1)) / torch.sqrt((variance * s).view(1, -1, 1, 1) + 1e-5)
        gamma, beta = blobs[f"scale{suffix}"]
        return x * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)

    x = F.max_pool2d(F.relu(unit(x, "conv1", "_conv1", 2)), 3, 2, 0, ceil_mode=True)
    for name, _, stride, projects in blocks(depth):
        shortcut = unit(x, f"res{name}_branch1", f"{name}_branch1", stride) if projects else x
        y = x
        for branch in "abc":
            y = unit(y, f"res{name}_branch2{branch}", f"{name}_branch2{branch}", stride if branch == "a" else 1)
            y = F.relu(y) if branch != "c" else y
        x = F.relu(y + shortcut)
    weight, bias = blobs["fc1000"]
    return F.linear(x.mean((2, 3)), weight, bias)


def prototxt(depth: int) -> str:
    """A prototxt in the order of the release, with the same defaults left out."""
    lines = [f'name: "ResNet-{depth}"', 'input: "data"', "input_dim: 1", "input_dim: 3", "input_dim: 224", "input_dim: 224"]

    def layer(name: str, kind: str, bottoms: list[str], top: str, param: str = "") -> None:
        inputs = " ".join(f'bottom: "{b}"' for b in bottoms)
        lines.append(f'layer {{\n\t{inputs}\n\ttop: "{top}"\n\tname: "{name}"\n\ttype: "{kind}"  # a comment\n\t{param}\n}}')

    def unit(conv: str, suffix: str, bottom: str, out: int, kernel: int, stride: int) -> None:
        bias = "" if conv == "conv1" and depth == 50 else "bias_term: false"
        shape = f"num_output: {out} kernel_size: {kernel} pad: {kernel // 2} stride: {stride} {bias}"
        layer(conv, "Convolution", [bottom], conv, f"convolution_param {{ {shape} }}")
        layer(f"bn{suffix}", "BatchNorm", [conv], conv, "batch_norm_param { use_global_stats: true }")
        layer(f"scale{suffix}", "Scale", [conv], conv, "scale_param { bias_term: true }")

    unit("conv1", "_conv1", "data", 64, 7, 2)
    layer("conv1_relu", "ReLU", ["conv1"], "conv1")
    layer("pool1", "Pooling", ["conv1"], "pool1", "pooling_param { kernel_size: 3 stride: 2 pool: MAX }")
    bottom = "pool1"
    for name, width, stride, projects in blocks(depth):
        start = f"res{name}_branch2"
        if projects:
            unit(f"res{name}_branch1", f"{name}_branch1", bottom, 4 * width, 1, stride)
        for branch, before, out, kernel, branch_stride in (
            ("a", bottom, width, 1, stride),
            ("b", f"{start}a", width, 3, 1),
            ("c", f"{start}b", 4 * width, 1, 1),
        ):
            unit(f"{start}{branch}", f"{name}_branch2{branch}", before, out, kernel, branch_stride)
            if branch != "c":
                layer(f"{start}{branch}_relu", "ReLU", [f"{start}{branch}"], f"{start}{branch}")
        layer(f"res{name}", "Eltwise", [f"res{name}_branch1" if projects else bottom, f"{start}c"], f"res{name}")
        layer(f"res{name}_relu", "ReLU", [f"res{name}"], f"res{name}")
        bottom = f"res{name}"
    layer("pool5", "Pooling", [bottom], "pool5", "pooling_param { kernel_size: 7 stride: 1 pool: AVE }")
    layer("fc1000", "InnerProduct", ["pool5"], "fc1000", "inner_product_param { num_output: 1000 }")
    layer("prob", "Softmax", ["fc1000"], "prob")
    return "\n".join(lines)


# --- tests -----------------------------------------------------------------------------------------------------------------


def test_resnet50_gives_caffes_logits(tmp_path: Path) -> None:
    blobs = random_blobs(50)
    blobs["bn5c_branch2b"][2].zero_()  # factor 0: mean 0, variance 0
    blobs["scale5c_branch2b"][0] *= 1e-3  # because BN divides by sqrt(1e-5)
    (tmp_path / "m.caffemodel").write_bytes(caffemodel(blobs))
    mean = torch.rand(3, 224, 224) * 30 + 100  # BGR
    (tmp_path / "mean.binaryproto").write_bytes(blob(mean, legacy=True))
    (tmp_path / "deploy.prototxt").write_text(prototxt(50))
    path, notes = import_weights(
        tmp_path / "m.caffemodel",
        out=tmp_path / "m.safetensors",
        prototxt=tmp_path / "deploy.prototxt",
        mean_file=tmp_path / "mean.binaryproto",
    )
    model = reslearn.load(path)
    assert (model.card.net, model.card.options) == ("resnet50", {"pool": "ceil"}) and model.card.classes[0] == "tench"
    assert "the bias of 'conv1' is folded into the mean of its BN" in notes and "227 layers" in " ".join(notes)
    pixels = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        expected = evaluate(blobs, 50, pixels.flip(1).float() - mean)
        logits = model(model.card.preprocessing.normalizer()(pixels))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_resnet101_gives_caffes_logits(tmp_path: Path) -> None:
    depth = 101
    blobs = random_blobs(depth, classes=7)
    (tmp_path / "m.caffemodel").write_bytes(caffemodel(blobs))
    model = reslearn.load(import_weights(tmp_path / "m.caffemodel", out=tmp_path / "m.safetensors")[0])
    assert model.card.net == f"resnet{depth}"
    assert model.card.preprocessing.mean == pytest.approx([123.152 / 255, 115.903 / 255, 103.063 / 255])
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        bgr = pixels.flip(1).float() - torch.tensor([103.063, 115.903, 123.152])[:, None, None]
        expected = evaluate(blobs, depth, bgr)
        logits = model(model.card.preprocessing.normalizer()(pixels))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_convolution_is_mapped_to_its_block_and_branch(depth: int) -> None:
    """The value in each blob identifies its convolution."""
    one = torch.ones(1)
    order = [name for name in names(depth) if name.startswith("res")]
    blobs: Blobs = {name: [one, one, one] if name.startswith("bn") else [one, one] for name in names(depth)}
    blobs |= {"conv1": [one]} | {name: [torch.tensor([float(i)])] for i, name in enumerate(order)}
    tensors, _ = caffe.convert([caffe.Weights(name, "", values) for name, values in blobs.items()], f"resnet{depth}")
    with torch.device("meta"):
        model = reslearn.create(f"resnet{depth}")
    assert set(tensors) == {name for name in model.state_dict() if not name.endswith("tracked")}
    index = 0
    for stage, count in enumerate(DEPTHS[depth], 1):
        for block in range(count):
            for module in (["downsample.0"] if block == 0 else []) + ["conv1", "conv2", "conv3"]:
                assert tensors[f"layer{stage}.{block}.{module}.weight"].item() == index
                index += 1
    assert index == len(order)


@pytest.mark.parametrize("depth", DEPTHS)
def test_layer_list_matches_the_prototxt(tmp_path: Path, depth: int) -> None:
    (tmp_path / "p").write_text(prototxt(depth))
    ours = layer_list(f"resnet{depth}")
    assert [layer for layer in read_prototxt(tmp_path / "p") if layer.type != "Softmax"] == ours
    assert sum(layer.type == "Convolution" and "branch1" not in layer.name for layer in ours) == depth - 1
    assert f"the {len(ours)} layers of p" in check_prototxt(tmp_path / "p", f"resnet{depth}")
    assert {layer.name for layer in ours if layer.type in ("Convolution", "BatchNorm", "Scale", "InnerProduct")} == set(
        names(depth)
    )


def names(depth: int) -> Iterator[str]:
    yield from ("conv1", "bn_conv1", "scale_conv1", "fc1000")
    for name, _, _, projects in blocks(depth):
        for branch in (["branch1"] if projects else []) + ["branch2a", "branch2b", "branch2c"]:
            yield from (f"{start}{name}_{branch}" for start in ("res", "bn", "scale"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"res3a_branch2a"\n', '"res3a_branch2x"\n', "has no layer 'res3a_branch2a'; did you mean"),
        ("kernel_size: 3 stride: 2 pool", "kernel_size: 3 pad: 1 stride: 2 pool", "pad of layer 'pool1' is 1, not 0"),
        ("pool: AVE", "", "pool of layer 'pool5' is MAX, not AVE"),
        ("num_output: 1000", "num_output: x", "is not a prototxt: num_output of layer 'fc1000' is 'x'"),
        ("kernel_size: 7", "kernel_size {}", "is not a prototxt: kernel_size of layer 'conv1'"),
        ("pooling_param {", "pooling_param: {", ""),
        ("pooling_param {", "pooling_param }", "is not a prototxt: in line"),
        ('type: "Softmax"', 'type: "Eltwise"', "layer 'prob' is unexpected"),
    ],
)
def test_another_prototxt_is_rejected_with_the_layer(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = prototxt(50)
    assert old in text
    (tmp_path / "p").write_text(text.replace(old, new, 1) if "res3a" not in old else text.replace(f"name: {old}", f"name: {new}"))
    if not message:
        assert check_prototxt(tmp_path / "p", "resnet50")
        return
    with pytest.raises(UserError) as caught:
        check_prototxt(tmp_path / "p", "resnet50")
    assert message in str(caught.value)


def test_strides_of_v15_are_rejected(tmp_path: Path) -> None:
    text = prototxt(50).replace(
        "num_output: 128 kernel_size: 1 pad: 0 stride: 2", "num_output: 128 kernel_size: 1 pad: 0 stride: 1"
    )
    (tmp_path / "p").write_text(text)
    with pytest.raises(UserError, match="stride of layer 'res3a_branch2a' is 1, not 2"):
        check_prototxt(tmp_path / "p", "resnet50")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_encodings_of_blobs(tmp_path: Path, legacy: bool, packed: bool) -> None:
    tensors = {"a": [torch.randn(2, 3, 4, 5), torch.randn(7)], "b": [torch.randn(1)]}
    (tmp_path / "m").write_bytes(caffemodel(tensors, legacy=legacy, packed=packed))
    layers = read_caffemodel(tmp_path / "m")
    assert [layer.name for layer in layers] == ["data", "a", "b"] and layers[0].type == "Input"
    for layer in layers[1:]:
        for read, written in zip(layer.blobs, tensors[layer.name], strict=True):
            assert torch.equal(read.reshape(written.shape), written)


def test_the_old_format_of_layers(tmp_path: Path) -> None:
    layer = message(4, b"conv1") + number(5 << 3) + number(4) + message(6, blob(torch.ones(2, 2), legacy=True))
    (tmp_path / "m").write_bytes(message(1, b"old") + message(2, layer))
    (result,) = read_caffemodel(tmp_path / "m")
    assert (result.name, result.type, result.blobs[0].sum().item()) == ("conv1", "4", 4)


def test_a_mean_image_is_read_as_rgb_on_0_to_1(tmp_path: Path) -> None:
    mean = torch.stack([torch.full((224, 224), float(v)) for v in (103, 116, 123)])
    (tmp_path / "mean").write_bytes(blob(mean, legacy=True))
    assert read_mean(tmp_path / "mean")[:, 5, 5].tolist() == pytest.approx([123 / 255, 116 / 255, 103 / 255])
    for wrong, message in [
        (mean[:, :100], "has shape 3x100x224"),
        (mean - 200, "outside 0..255"),
        (mean * float("nan"), "outside 0..255"),
    ]:
        (tmp_path / "mean").write_bytes(blob(wrong, legacy=True))
        with pytest.raises(UserError, match=message):
            read_mean(tmp_path / "mean")


def reduced(monkeypatch: pytest.MonkeyPatch) -> Blobs:
    """Reduces ResNet-50 to one block per stage, here and in the package."""
    small = replace(reslearn.nets.spec("resnet50"), blocks=(1, 1, 1, 1))
    monkeypatch.setattr("reslearn.weights.read.prototxt.spec", lambda name: small)
    monkeypatch.setattr(caffe, "NETS", ("resnet50",))
    monkeypatch.setitem(reslearn.nets.zoo.TABLE, "resnet50", small)
    monkeypatch.setitem(DEPTHS, 50, (1, 1, 1, 1))
    return random_blobs(50)


def test_errors_name_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = reduced(monkeypatch)
    file, out = tmp_path / "m.caffemodel", tmp_path / "m.safetensors"

    def error(changed: Blobs, **arguments: object) -> str:
        file.write_bytes(caffemodel(changed))
        with pytest.raises(UserError) as caught:
            import_weights(file, out=out, **arguments)  # type: ignore[arg-type]
        assert str(caught.value).startswith(str(file)) or arguments
        return str(caught.value)

    assert "layer 'res4a_branch2b' is missing" in error({k: v for k, v in blobs.items() if k != "res4a_branch2b"})
    assert "layer 'res2b_branch2a' is unexpected" in error({**blobs, "res2b_branch2a": blobs["res2a_branch2b"]})
    assert "layer 'bn_conv1' has 2 blobs, not 3" in error({**blobs, "bn_conv1": blobs["bn_conv1"][:2]})
    assert "'conv1.weight' is 64x1x7x7, not 64x3x7x7" in error({**blobs, "conv1": [blobs["conv1"][0][:, :1]]})
    assert "'fc.weight' is 1000x9, not 1000x2048" in error({**blobs, "fc1000": [torch.zeros(1000, 9), torch.zeros(1000)]})
    assert "bias of 3 values for 64 channels" in error({**blobs, "conv1": [blobs["conv1"][0], torch.zeros(3)]})
    assert "factor of 2 values" in error({**blobs, "bn_conv1": [*blobs["bn_conv1"][:2], torch.ones(2)]})
    assert "non-finite" in error({**blobs, "fc1000": [blobs["fc1000"][0] * float("nan"), blobs["fc1000"][1]]})
    assert "net 'resnet18': the Caffe release only has resnet50" in error(blobs, net="resnet18")
    assert "leave them out" in error(blobs, options={"pool": "ceil"})
    file.write_bytes(caffemodel(blobs, legacy=True))
    assert import_weights(file, out=out)[0] == out, "old shapes (1, 1, 1, n) are converted"


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "another": (message(1, b"x"), "it has no layers"),
    "text": (b"layer { name: 'x' }", "is not a valid .caffemodel: at byte 0"),
    "a length beyond the end": (
        number(100 << 3 | 2) + number(2**40) + b"abc",
        "field 100 claims 1,099,511,627,776 bytes, but 3 are left",
    ),
    "a cut number": (b"\xa2\x06\xff", "a varint is truncated"),
    "a long number": (b"\xff" * 12, "a varint has more than 10 bytes"),
    "a shape beyond the numbers": (
        message(100, message(1, b"conv1") + message(7, message(7, message(1, number(2**40) * 2)) + message(5, bytes(8)))),
        "in layer 'conv1', at byte 12: a blob of 1099511627776x1099511627776 has 2 values",
    ),
    "a thousand dimensions": (
        message(100, message(7, message(7, message(1, number(2**62) * 1000)))),
        "a blob of 4611686018427387904x",
    ),
    "numbers of 3 bytes": (message(100, message(7, message(5, bytes(7)))), "is not a multiple of 4"),
    "a group": (b"\x0b", "unknown wire type 3"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_rejected(tmp_path: Path, case: str) -> None:
    content, message = MALFORMED[case]
    file = tmp_path / "m.caffemodel"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        import_weights(file, out=tmp_path / "m.safetensors")
    assert message in str(caught.value) and str(file) in str(caught.value)


@settings(max_examples=300, **SLOW)
@given(data=st.data())
def test_damaged_caffemodels_are_read_or_rejected(tmp_path: Path, data: st.DataObject) -> None:
    tensors = {"conv1": [torch.ones(2, 3, 2, 2)], "bn_conv1": [torch.ones(2), torch.ones(2), torch.ones(1)]}
    content = bytearray(caffemodel(tensors, legacy=data.draw(st.booleans()), packed=data.draw(st.booleans())))
    for offset, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=5)):
        content[offset] = value
    file = tmp_path / "m.caffemodel"
    file.write_bytes(data.draw(st.just(bytes(content)) | st.binary(max_size=60))[: data.draw(st.integers(0, len(content)))])
    for read in (read_caffemodel, read_mean, read_prototxt):
        try:
            read(file)
        except UserError as error:
            assert "\n" not in str(error) and str(file) in str(error)


@settings(max_examples=300, **SLOW)
@given(text=st.text("ab{}:;\"'#\n 1.-[]<\\,", max_size=80))
def test_any_text_is_parsed_or_malformed(text: str) -> None:
    try:
        parse_text(text)
    except Malformed as error:
        assert "line" in str(error) or "end" in str(error)


def test_text_format() -> None:
    parsed = parse_text("a: 1 b { c: \"x # y\" c: 'z' d: { e: -1.5e-3 } }; # end\nb {} f: TRUE")
    assert parsed == {"a": ["1"], "b": [{"c": ["x # y", "z"], "d": [{"e": ["-1.5e-3"]}]}, {}], "f": ["TRUE"]}
    for wrong, message in [
        ("a {", "a brace"),
        ("a: }", "line 1"),
        ("}", "line 1"),
        ("a {" * 99, "32 deep"),
        ('\na: "x', "line 2"),
        ("a:", "value"),
    ]:
        with pytest.raises(Malformed, match=message):
            parse_text(wrong)


def test_blobs_are_little_endian_floats(tmp_path: Path) -> None:
    """Checks a file byte by byte, independent of the writer above."""
    layer = b"\x0a\x02fc\x12\x0cInnerProduct\x3a\x0e\x3a\x04\x0a\x02\x01\x01\x2a\x04" + struct.pack("<f", 2.5)
    layer = layer.replace(b"\x3a\x0e", b"\x3a\x0c")
    (tmp_path / "m").write_bytes(b"\xa2\x06" + bytes([len(layer)]) + layer)
    (result,) = read_caffemodel(tmp_path / "m")
    assert result.name == "fc" and result.type == "InnerProduct"
    assert np.array_equal(result.blobs[0].numpy(), [[2.5]])
