"""Exports to torchvision and timm load strictly and give the same logits; networks without an equivalent are rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision

import reslearn
from reslearn import Card, UserError
from reslearn.data.preprocess import Preprocessing
from reslearn.weights.read import import_weights
from reslearn.weights.write import export
from weights.compare import same_logits, shaken


def made(path: Path, net: str, classes: int = 5, channels: int = 3, pixel_mean: bool = False, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = shaken(reslearn.create(net, classes, channels, **options))
    mean = Preprocessing.encode_pixel_mean(torch.zeros(channels, 64, 64)) if pixel_mean else None
    view = Preprocessing(
        channels=channels, size=(64, 64), crop_ratio=0.875, mean=(0.4,) * channels, std=(0.2,) * channels, pixel_mean=mean
    )
    names = tuple(f"ü{i}" for i in range(classes))
    reslearn.save(model, path, Card(net=net, options=options, classes=names, preprocessing=view, metrics={"top1_error": 7.5}))
    return model


TORCHVISION = ["resnet18", "resnet34", "resnet50-v1.5", "alexnet", "googlenet", "densenet121", "vgg11-bn"]


@pytest.mark.parametrize("net", TORCHVISION)
def test_torchvision_loads_exports(tmp_path: Path, net: str) -> None:
    ours = made(tmp_path / "m.safetensors", net)
    path = export(tmp_path / "m.safetensors", "torchvision", tmp_path / "theirs.pth")
    extra: dict[str, Any] = {"aux_logits": False, "init_weights": False} if net == "googlenet" else {}
    theirs = getattr(torchvision.models, net.replace("-v1.5", "").replace("-", "_"))(num_classes=5, **extra)
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    same_logits(ours, theirs.eval(), (64,))
    assert path.stat().st_size < 1.05 * (tmp_path / "m.safetensors").stat().st_size + 100_000
    again, _ = import_weights(path, out=tmp_path / "again.safetensors")
    same_logits(reslearn.load(again), ours, (64,))


def test_torchvision_as_safetensors(tmp_path: Path) -> None:
    made(tmp_path / "m.safetensors", "resnet50", stride_in="3x3")
    path = export(tmp_path / "m.safetensors", "torchvision", tmp_path / "theirs.safetensors")
    torchvision.models.resnet50(num_classes=5).load_state_dict(safetensors.torch.load_file(path), strict=True)


@pytest.mark.parametrize(("net", "channels"), [("resnet18", 1), ("resnet50-v1.5", 3), ("densenet121", 3)])
def test_timm_loads_exports(tmp_path: Path, net: str, channels: int) -> None:
    ours = made(tmp_path / "m.safetensors", net, channels=channels)
    folder = export(tmp_path / "m.safetensors", "timm", tmp_path / "timm")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    arguments = {"num_classes": config["num_classes"], **config["model_args"]}
    theirs = timm.create_model(config["architecture"], checkpoint_path=folder / "model.safetensors", **arguments).eval()
    same_logits(ours, theirs, (64,), channels)
    assert config["num_features"] == theirs.num_features
    local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    same_logits(ours, local, (64,), channels)
    view = timm.data.resolve_model_data_config(local)
    assert list(view["input_size"]) == [channels, 64, 64] and view["crop_pct"] == 0.875 and view["interpolation"] == "bilinear"
    assert list(view["mean"]) == [0.4] * channels and list(view["std"]) == [0.2] * channels
    assert local.pretrained_cfg["label_names"] == [f"ü{i}" for i in range(5)]
    assert local.get_classifier() is local.get_submodule(config["pretrained_cfg"]["classifier"])
    assert local.get_submodule(config["pretrained_cfg"]["first_conv"]).in_channels == channels
    assert "top1_error: 7.5" in (folder / "README.md").read_text()
    again, _ = import_weights(folder / "model.safetensors", out=tmp_path / "again.safetensors")
    same_logits(reslearn.load(again), ours, (64,), channels)


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "the paper's stride": ("resnet50", {}, "torchvision", "stride_in is '1x1', theirs is '3x3'; train resnet50-v1.5"),
    "timm, the paper's stride": ("resnet50", {}, "timm", "stride_in is '1x1', theirs is '3x3'"),
    "Caffe's pool": ("resnet18", {"pool": "ceil"}, "torchvision", "pool is 'ceil', theirs is 'padded'"),
    "shortcut": ("resnet18", {"shortcut": "A"}, "timm", "shortcut is 'A', theirs is 'B'"),
    "order": ("resnet18", {"order": "full"}, "torchvision", "order is 'full', theirs is 'original'"),
    "survival": ("resnet18", {"last_survival": 0.5}, "torchvision", "last_survival is 0.5, theirs is 1.0"),
    "CIFAR": ("resnet20", {}, "torchvision", "have no equivalent of 'resnet20'"),
    "plain": ("plain18", {}, "timm", "have no equivalent of 'plain18'"),
    "pre-activation": ("preact-resnet18", {}, "timm", "have no equivalent of 'preact-resnet18'"),
    "CIFAR DenseNet": ("densenet-40-12", {}, "torchvision", "have no equivalent of 'densenet-40-12'"),
    "gray": ("resnet18", {"channels": 1}, "torchvision", "take 3 channels, but this model takes 1"),
    "mean image": ("resnet18", {"pixel_mean": True}, "timm", "supports per-channel means only"),
    "format": ("resnet18", {}, "tim", "format 'tim': must be one of torchvision, timm; did you mean 'timm'?"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_exports_are_rejected(tmp_path: Path, case: str) -> None:
    net, options, format, message = UNSUPPORTED[case]
    made(tmp_path / "m.safetensors", net, **options)
    with pytest.raises(UserError) as caught:
        export(tmp_path / "m.safetensors", format, tmp_path / "out.pth")
    assert message in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_invalid_output_paths_are_rejected(tmp_path: Path) -> None:
    made(tmp_path / "m.safetensors", "resnet18")
    for format, name, message in [
        ("torchvision", "m.onnx", "ends in .pth, .pt or .safetensors"),
        ("torchvision", "none/m.pth", "there is no folder"),
        ("timm", ".", "exists; the timm format needs a new folder"),
        ("timm", "m.safetensors", "exists; the timm format needs a new folder"),
    ]:
        with pytest.raises(UserError, match=message):
            export(tmp_path / "m.safetensors", format, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
