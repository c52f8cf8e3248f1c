"""The commands import, export and deepen: published CIFAR-10 weights, and a round trip."""

from pathlib import Path

import pytest
import torch

from command_line import RunCli


def test_the_published_resnet20_deepens_exactly(real_data: Path, tmp_path: Path, run_cli: RunCli) -> None:
    shallow, deep = tmp_path / "resnet20.safetensors", tmp_path / "resnet56.safetensors"
    code, said, _ = run_cli("import", real_data / "weights" / "resnet20-12fca82f.th", "-o", shallow)
    assert code == 0 and "resnet20 with 10 classes" in said
    code, said, _ = run_cli("deepen", shallow, "resnet56", "-o", deep, "--data", "cifar10")
    assert code == 0 and ": 0; 0 predictions differ" in said


def test_torchvision_round_trip(tmp_path: Path, run_cli: RunCli) -> None:
    import torchvision

    torch.manual_seed(0)
    weights = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    (tmp_path / "names.txt").write_text("ant\nbee\nwasp\n")
    words = ["import", tmp_path / "theirs.pth", "--classes", tmp_path / "names.txt", "--mean", "0.5,0.5,0.5"]
    code, out, _ = run_cli(*words, "--std", "0.2,0.2,0.2", "-o", tmp_path / "m.safetensors")
    assert code == 0 and "resnet18 with 3 classes" in out
    code, *_ = run_cli("export", tmp_path / "m.safetensors", "--format", "torchvision", "-o", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert code == 0 and all(torch.equal(weights[name], back[name]) for name in weights)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["import", "none.pth", "-o", "m.safetensors"], "no weights file called"),
        (["import", "m.pth", "--mean", "a,b", "-o", "m.safetensors"], "write numbers separated by commas"),
        (["export", "none", "--format", "timm", "-o", "x"], "no model file or run folder"),
        (["export", "none", "--format", "tim", "-o", "x"], "tim"),
    ],
)
def test_invalid_input_gives_a_one_line_error(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(*words)
    assert code == 2 and err.count("\n") == 1 and message in err and not list(tmp_path.iterdir())
