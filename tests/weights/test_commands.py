"""reslearn import and reslearn export as commands: the published CIFAR-10 nets, and there and back."""

import json
from pathlib import Path

import pytest
import torch

from command_line import RunCli


def test_the_published_resnet20_has_its_published_error_and_deepens_exactly(
    real_data: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    shallow, deep = tmp_path / "resnet20.safetensors", tmp_path / "resnet56.safetensors"
    code, said, _ = run_cli("import", real_data / "weights" / "resnet20-12fca82f.th", "-o", shallow)
    assert code == 0 and "resnet20 with 10 classes" in said
    code, said, _ = run_cli("deepen", shallow, "resnet56", "-o", deep, "--data", "cifar10")
    assert code == 0 and ": 0; 0 predictions differ" in said
    lines = [run_cli("eval", model, "cifar10", "--json")[1].splitlines()[0] for model in (shallow, deep)]
    results = [json.loads(line) for line in lines]
    assert [round(result["top1_error"], 2) for result in results] == [8.27, 8.27]
    assert results[0]["confusion"] == results[1]["confusion"]


def test_torchvision_there_and_back(tmp_path: Path, run_cli: RunCli) -> None:
    import torchvision

    torch.manual_seed(0)
    weights = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    (tmp_path / "names.txt").write_text("ant\nbee\nwasp\n")
    words = ["import", tmp_path / "theirs.pth", "--classes", tmp_path / "names.txt", "--mean", "0.5,0.5,0.5"]
    code, said, _ = run_cli(*words, "--std", "0.2,0.2,0.2", "-o", tmp_path / "m.safetensors")
    assert code == 0 and "resnet18 with 3 classes" in said
    code, *_ = run_cli("export", tmp_path / "m.safetensors", "--format", "torchvision", "-o", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert code == 0 and all(torch.equal(weights[name], back[name]) for name in weights)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["import", "none.pth", "-o", "m.safetensors"], "no weights file called"),
        (["import", "m.pth", "--mean", "a,b", "-o", "m.safetensors"], "write numbers separated by commas"),
        (["export", "none", "--format", "timm", "-o", "x"], "no model file or run folder"),
        (["export", "none", "--format", "tim", "-o", "x"], "tim"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, text = run_cli(*words)
    assert code == 2 and text.count("\n") == 1 and said in text and not list(tmp_path.iterdir())
