"""Features against a separate hook, and files against their content."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reslearn import UserError, create
from reslearn.analysis.features import check_format, features, in_two_dimensions, write
from small_nets import batch, network


def test_features_are_the_last_layers_input() -> None:
    model, (images, _) = network("resnet8"), batch(5)
    inputs: list[Tensor] = []
    model.fc.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))  # type: ignore[union-attr]
    rows = features(model, images)
    model(images)
    assert rows.shape == (5, 64) and torch.equal(rows, inputs[-1])
    assert features(create("vgg11", 4).eval(), torch.randn(2, 3, 32, 32)).shape == (2, 4096)
    with pytest.raises(UserError, match="has no linear layer"):
        features(torch.nn.Conv2d(3, 4, 1), images)


def test_two_dimensions_are_the_principal_components() -> None:
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    flat, shares = in_two_dimensions(rows)
    exact = torch.linalg.svd(rows - rows.mean(0)).S
    assert flat.shape == (30, 2) and flat.norm(dim=0).tolist() == pytest.approx(exact[:2].tolist(), rel=1e-3)
    assert shares == pytest.approx((exact[:2] ** 2 / (exact**2).sum()).tolist(), rel=1e-3)


def test_npz_contents(tmp_path: Path) -> None:
    rows = torch.randn(3, 4)
    write(tmp_path / "f.npz", rows, ["a.png", "b.png", "c.png"], [0, 1, -1], ["cat", "dog"])
    with np.load(tmp_path / "f.npz") as saved:
        assert np.array_equal(saved["features"], rows.numpy()) and saved["names"].tolist() == ["a.png", "b.png", "c.png"]
        assert saved["labels"].tolist() == [0, 1, -1] and saved["classes"].tolist() == ["cat", "dog"]
    assert [file.name for file in tmp_path.iterdir()] == ["f.npz"]


def test_parquet_has_one_row_per_image(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = torch.randn(3, 4)
    write(tmp_path / "f.parquet", rows, ["a.png", "b.png", "c.png"], [0, 1, -1], ["cat", "dog"])
    columns = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert columns["name"] == ["a.png", "b.png", "c.png"] and columns["label"] == ["cat", "dog", None]
    assert np.allclose(columns["features"], rows.numpy())


def test_formats_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"f\.csv: unknown format: features are saved as \.npz or \.parquet"):
        check_format(Path("f.csv"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install pyarrow, or use \.npz"):
        check_format(Path("f.parquet"))
