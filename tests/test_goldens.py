"""Some of the goldens (see goldens.py): exact weights on the recorded machine, approximate losses elsewhere."""

import json
from pathlib import Path

import pytest

import goldens

RECORD = json.loads(goldens.RECORD.read_text())
QUICK = ("residual-fused",)
OTHERS = ("stochastic-depth-fused", "photos-eager", "alternating-eager", "localize", "residual-eager-ranks")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_runs_match_the_record(name: str, tmp_path: Path) -> None:
    now, before = goldens.run(name, tmp_path), RECORD["cases"][name]
    assert len(now["losses"]) == len(before["losses"])
    assert now["losses"][0] == pytest.approx(before["losses"][0], rel=0.05)  # later ones drift apart where the rounding differs
    if RECORD["machine"] == goldens.machine():
        assert now == before


def test_every_case_is_recorded() -> None:
    assert set(RECORD["cases"]) == {*goldens.CASES, *goldens.RANKS}


def test_the_digest_detects_a_changed_weight(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {"a": torch.zeros(3), "b": torch.ones((), dtype=torch.int64)}
    save_file(weights, tmp_path / "one.safetensors")
    save_file({"c": weights["a"], "d": weights["b"]}, tmp_path / "renamed.safetensors")
    save_file({"a": torch.tensor([0.0, 1e-45, 0.0]), "b": weights["b"]}, tmp_path / "other.safetensors")
    one, renamed, other = (goldens.digest_weights(tmp_path / f"{name}.safetensors") for name in ("one", "renamed", "other"))
    assert one == renamed and one != other
