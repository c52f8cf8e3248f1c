"""Imported weights give the same logits; malicious and damaged files neither run code nor exhaust memory."""

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import reslearn
from reslearn import UserError
from reslearn.weights.read.imports import CIFAR_10, import_weights
from reslearn.weights.read.torch_files import rehearse
from weights.compare import same_logits, shaken

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "resnet50-v1.5": lambda: torchvision.models.resnet50(),
    "vgg11": lambda: torchvision.models.vgg11(num_classes=7, init_weights=False),
    "alexnet": lambda: torchvision.models.alexnet(num_classes=7),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=7, init_weights=False),
    "densenet121": lambda: torchvision.models.densenet121(num_classes=7),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=7, in_chans=1),
    "timm resnet50-v1.5": lambda: timm.create_model("resnet50", num_classes=7),
}


@pytest.mark.parametrize("case", MODELS)
def test_imported_weights_give_the_same_logits(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    theirs = shaken(MODELS[case]())
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    path, notes = import_weights(tmp_path / "theirs.pth", out=tmp_path / "ours.safetensors")
    ours = reslearn.load(path)
    assert ours.card.net == case.split()[-1] and ours.card.net in notes[0]
    same_logits(ours, theirs, (64, 97) if case != "vgg11" else (64, 80), ours.card.preprocessing.channels)


def test_published_cifar_weights_have_their_published_error(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "weights" / "resnet20-12fca82f.th"
    if not file.exists():
        pytest.skip(f"{file} is missing")
    path, notes = import_weights(file, out=tmp_path / "m.safetensors")
    assert "both sides" in " ".join(notes)
    card = reslearn.load(path).card
    assert (card.net, card.options, card.classes) == ("resnet20", {"shortcut": "A-centered"}, CIFAR_10)
    result = reslearn.evaluate(path, "cifar10", device="cpu")
    assert result["n"] == 10_000
    assert round(result["top1_error"] * 100) == 827, "one image of 10,000 is 0.01%"


def small(path: Path) -> dict[str, torch.Tensor]:
    """Weights of resnet8 with 3 classes, saved."""
    torch.manual_seed(0)
    tensors = reslearn.create("resnet8", 3).state_dict()
    torch.save(tensors, path)
    return tensors


def test_file_formats(tmp_path: Path) -> None:
    tensors = small(tmp_path / "zip.bin")
    torch.save({"state_dict": tensors, "epoch": 3, "lr": [0.1]}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(dict(tensors), tmp_path / "s.safetensors")
    torch.save({k: nn.Parameter(v.half()) if v.is_floating_point() else v for k, v in tensors.items()}, tmp_path / "half.pt")
    for name in ("zip.bin", "old.pth.tar", "s.safetensors", "half.pt"):
        model = reslearn.load(import_weights(tmp_path / name, out=tmp_path / "out.safetensors")[0])
        for key, value in model.state_dict().items():
            expected = tensors[key].half().float() if name == "half.pt" and value.is_floating_point() else tensors[key]
            assert torch.equal(value, expected) and value.dtype == expected.dtype, (name, key)
    assert model.card.data == {"imported_from": "half.pt"}


def test_tensors_that_share_memory_are_separated(tmp_path: Path) -> None:
    tensors = dict(reslearn.create("resnet8", 3).state_dict())
    tensors["bn1.weight"] = tensors["bn1.bias"]
    torch.save(tensors, tmp_path / "m.pth")
    assert import_weights(tmp_path / "m.pth", out=tmp_path / "m.safetensors")[0].is_file()


def test_class_names_and_preprocessing(tmp_path: Path) -> None:
    small(tmp_path / "m.pth")
    out = tmp_path / "m.safetensors"

    def card(**given: Any) -> Any:
        path, notes = import_weights(tmp_path / "m.pth", out=out, **given)
        assert all(notes)
        return reslearn.weights.read_card(path)

    assert card().classes == ("class0", "class1", "class2")
    assert card().preprocessing.mean == (0.485, 0.456, 0.406)
    assert card().preprocessing.size == (32, 32) and card().preprocessing.crop_ratio == 1
    assert card(classes=["a", "b", "ü"]).classes == ("a", "b", "ü")
    (tmp_path / "names.txt").write_text("a\nb c\n\nd\n")
    assert card(classes=tmp_path / "names.txt").classes == ("a", "b c", "d")
    for content in (["a", "b", "c"], {"0": "a", "1": "b", "2": "c"}, {"2": ["n3", "c"], "0": ["n1", "a"], "1": ["n2", "b"]}):
        (tmp_path / "names.json").write_text(json.dumps(content))
        assert card(classes=str(tmp_path / "names.json")).classes == ("a", "b", "c")
    view = card(mean=[0.1, 0.2, 0.3], std=[1, 1, 1]).preprocessing
    assert view.mean == (0.1, 0.2, 0.3) and view.std == (1, 1, 1)
    assert card(net="plain8").net == "plain8"


def test_a_head_of_1000_classes_gets_imagenets_names(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "m.pth")
    path, _ = import_weights(tmp_path / "m.pth", out=tmp_path / "m.safetensors")
    card = reslearn.weights.read_card(path)
    assert card.classes[0] == "tench" and card.classes[999] == "toilet tissue" and len(set(card.classes)) == 1000
    assert (card.preprocessing.size, card.preprocessing.crop_ratio) == ((224, 224), 0.875)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "number of names": ({"classes": ["a", "b"]}, "2 class names for a head of 3 classes"),
    "same name": ({"classes": ["a", "b", "a"]}, "class name 'a' is empty or occurs twice"),
    "no names": ({"classes": "none.txt"}, "cannot read none.txt"),
    "mean": ({"mean": [0.5]}, "mean and std need 3 finite values each"),
    "std": ({"std": [0, 0, 0]}, "mean and std need 3 finite values each"),
    "net": ({"net": "resnet14"}, "does not fit resnet14: "),
    "unknown net": ({"net": "resnt8"}, "no network called 'resnt8'"),
    "prototxt": ({"prototxt": "x.prototxt"}, "apply to a .caffemodel"),
    "suffix": ({"out": "m.pth"}, "a model file ends in .safetensors"),
    "folder": ({"out": "none/m.safetensors"}, "there is no folder none"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_invalid_arguments_are_rejected(tmp_path: Path, case: str) -> None:
    small(tmp_path / "m.pth")
    arguments, message = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        import_weights(tmp_path / "m.pth", **({"out": tmp_path / "m.safetensors"} | arguments))
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def written(path: Path, program: bytes, **more: bytes) -> None:
    """Writes a zip like torch.save's, with this pickle program."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": program, "byteorder": b"little", "version": b"3\n", **more}.items():
            archive.writestr(f"archive/{name}", content)


class Claim:
    """Pickles as a tensor with a storage of `numbers` values, which the file need not have."""

    def __init__(self, numbers: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.numbers, self.size, self.stride = numbers, size, stride

    def __reduce__(self) -> Any:
        storage = Persistent(("storage", torch.FloatStorage, "0", "cpu", self.numbers))
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, self.stride, False, OrderedDict())


class Persistent:
    def __init__(self, pid: Any) -> None:
        self.pid = pid


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Persistent) else None


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def enlarged() -> bytes:
    """A program that changes the length of a storage after the check, then claims a tensor of that length."""
    program = pickled({"x": Claim(16, (1 << 20,), (1,))})
    set_length = b"}X\x06\x00\x00\x00lengthJ\x00\x00\x10\x00sb"
    assert program.count(b"Q") == 1, "BINPERSID pushes the storage onto the stack"
    return program.replace(b"Q", b"Q" + set_length)


def two_archives(path: Path) -> None:
    """A file that is two archives: Python's reader uses the directory before the end record, torch's the recorded offset."""
    written(path, pickle.dumps(Evil(path.parent / "ran"), 2))
    other = path.read_bytes()
    written(path, pickled({}))
    harmless = path.read_bytes()
    (offset,) = struct.unpack("<I", other[-6:-2])
    path.write_bytes(other[:-22] + harmless[:-6] + struct.pack("<IH", offset, 0))


def many_sizes() -> bytes:
    """A program that copies a long list to a torch.Size again and again."""
    numbers = b"](" + b"K\x01" * 100_000 + b"eq\x00"
    return b"\x80\x02" + numbers + b"ctorch\nSize\nq\x01" + b"h\x01h\x00\x85R" * 200 + b"."


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({"x": Claim(1 << 20, (1 << 20,), (1,))}))
        archive.writestr("archive/data/0", bytes(4 << 20))


def twice(path: Path) -> None:
    written(path, pickled({"x": Claim(2, (2,), (1,))}), **{"data/0": bytes(8), "data/1": bytes(8)})
    path.write_bytes(path.read_bytes().replace(b"data/1", b"data/0"))


def flip_one(path: Path) -> None:
    small(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code in a zip": (lambda p: torch.save({"a": Evil(p.parent / "ran")}, p), "which could run code"),
    "code, old format": (
        lambda p: torch.save({"a": Evil(p.parent / "ran")}, p, _use_new_zipfile_serialization=False),
        "which could run code",
    ),
    "code in a plain pickle": (lambda p: p.write_bytes(pickle.dumps(Evil(p.parent / "ran"))), "is a plain pickle"),
    "code, protocol 4": (lambda p: written(p, pickle.dumps(Evil(p.parent / "ran"), 4)), "which no state dict needs"),
    "a whole model": (lambda p: torch.save(nn.Linear(2, 2), p), "refers to torch.nn.modules.linear.Linear"),
    "a bytearray of 100 GB": (
        lambda p: written(p, b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x19\x85R."),
        "refers to builtins.bytearray",
    ),
    "a large claim": (
        lambda p: written(p, pickled({"x": Claim(1 << 33, (1 << 33,), (1,))}), **{"data/0": bytes(64)}),
        "claims 34,359,738,368 bytes of weights in '0', but has 64",
    ),
    "a tensor larger than its storage": (
        lambda p: written(p, pickled({"x": Claim(16, (1 << 33,), (1,))}), **{"data/0": bytes(64)}),
        "claims a tensor of 8589934592 values, but its storage has 16",
    ),
    "a tensor of one number repeated": (
        lambda p: written(p, pickled({"x": Claim(16, (1 << 33,), (0,))}), **{"data/0": bytes(64)}),
        "claims a tensor of 8589934592 values, but its storage has 16",
    ),
    "a memo of 2^31": (lambda p: written(p, b"\x80\x02}r\xff\xff\xff\x7f."), "beyond its own length"),
    "a text of 2^56 bytes, old format": (
        lambda p: p.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x8d" + bytes(7) + b"\x01"),
        "is not a complete PyTorch file",
    ),
    "two directories in one zip": (two_archives, "its directory is not at the end"),
    "sizes copied again and again": (
        lambda p: written(p, many_sizes()),
        "contains an invalid torch.Size",
    ),
    "a deflated zip": (deflated, "compressed or encrypted entries"),
    "a part that occurs twice": (twice, "overlapping or duplicate entries"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a", "b"), "is a zip archive, but not from torch.save"),
    "TorchScript": (lambda p: written(p, b"\x80\x02}.", **{"code/__torch__.py": b"x"}), "TorchScript archive, which contains code"),
    "one bit flipped": (flip_one, "is damaged: "),
    "truncated": (lambda p: (small(p), p.write_bytes(p.read_bytes()[:-3000])), "is not a complete PyTorch file"),
    "empty": (lambda p: p.write_bytes(b""), "is not a supported weights file"),
    "a page": (lambda p: p.write_text("<!DOCTYPE html><html>"), "is not a supported weights file"),
    "safetensors cut off": (lambda p: p.write_bytes(struct.pack("<Q", 10**6) + b'{"a":'), "is not a complete safetensors file"),
    "integers": (
        lambda p: torch.save({k: v.to(torch.int8) for k, v in small(p).items()}, p),
        "is int8: only floating-point weights",
    ),
    "non-finite": (lambda p: torch.save({k: v / 0 for k, v in small(p).items()}, p), "non-finite values"),
    "a list": (lambda p: torch.save([1, 2], p), "contains a list, not a state dict"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_bad_file_gives_a_one_line_error_and_runs_no_code(tmp_path: Path, case: str) -> None:
    make, message = FOREIGN[case]
    make(tmp_path / "m.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        import_weights(tmp_path / "m.pth", out=tmp_path / "out.safetensors")
    assert message in str(caught.value) and str(tmp_path / "m.pth") in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"], "no code ran and nothing was written"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB; claimed sizes were not allocated"


def test_a_checked_storage_cannot_be_enlarged() -> None:
    with pytest.raises(AttributeError):
        rehearse(enlarged(), {"0": 64}, 64)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
@settings(max_examples=60, **SLOW)
@given(data=st.data())
def test_damaged_files_give_a_model_or_a_one_line_error(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    whole, file = tmp_path / f"whole-{kind}", tmp_path / "m.pth"
    if not whole.exists():
        tensors = {f"module.{k}": v for k, v in reslearn.create("resnet8", 3).state_dict().items()}
        if kind == "safetensors":
            safetensors.torch.save_file(tensors, whole)
        else:
            torch.save(tensors, whole, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(whole.read_bytes())
    # Change mostly the start and the end, which hold the structure of the file.
    offsets = st.integers(0, 9000) | st.integers(len(content) - 9000, len(content) - 1) | st.integers(0, len(content) - 1)
    for offset, value in data.draw(st.lists(st.tuples(offsets, st.integers(0, 255)), max_size=4)):
        content[offset] = value
    file.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    try:
        path, _ = import_weights(file, out=tmp_path / "out.safetensors")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        reslearn.load(path)


@settings(max_examples=150, **SLOW)
@given(
    head=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x10" + bytes(7) + b"{"]),
    tail=st.binary(max_size=300),
)
def test_random_bytes_are_rejected(tmp_path: Path, head: bytes, tail: bytes) -> None:
    (tmp_path / "m.pth").write_bytes(head + tail)
    with pytest.raises(UserError):
        import_weights(tmp_path / "m.pth", out=tmp_path / "out.safetensors")


@settings(max_examples=300, **SLOW)
@given(program=st.binary(max_size=120))
def test_random_programs_are_rejected(tmp_path: Path, program: bytes) -> None:
    written(tmp_path / "m.pth", b"\x80\x02" + program + b".")
    with pytest.raises(UserError):
        import_weights(tmp_path / "m.pth", out=tmp_path / "out.safetensors")
