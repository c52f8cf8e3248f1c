"""Experiments with detectors: what they refuse, and given detectors on the rungs."""

from pathlib import Path

import pytest

import boxed
from detect.small import detector
from reslearn import UserError
from reslearn.detect import save_detector
from reslearn.reproduce.catalogue import EXPERIMENTS
from reslearn.reproduce.run import reproduce


def test_a_set_without_test_images_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no test split"):
        reproduce(EXPERIMENTS["table7"], "smoke", data=str(boxed.shapes(tmp_path / "set")), out=tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("runs/*"))


def test_given_detectors_are_told_apart_by_context_and_none_is_left_out(tmp_path: Path) -> None:
    files = []
    for i, context in enumerate((True, False, False)):
        model = detector(classes=["disc", "square"], seed=i, context=context)  # type: ignore[arg-type]
        files.append(save_detector(model, tmp_path / f"{i}.safetensors"))
    data = boxed.shapes(boxed.shapes(tmp_path / "set", images=6), images=2, split="test")
    on = {"data": str(data), "out": tmp_path / "out", "quiet": True}
    with pytest.raises(UserError, match=r"two of which one alone has detector\.context"):
        reproduce(EXPERIMENTS["table9"], "small", models=files[1:], **on)  # type: ignore[arg-type]
    both = [reproduce(EXPERIMENTS["table9"], "small", models=some, **on) for some in (files[:2], files[1::-1])]  # type: ignore[arg-type]
    rungs = [[row["what"].split(",")[0] for row in each["rows"]][::3] for each in both]
    assert rungs[0] == rungs[1] == ["baseline", "+ box refinement", "+ context", "+ multi-scale testing"]
    assert [row["ours"] for row in both[0]["rows"]] == [row["ours"] for row in both[1]["rows"]], "in any order"
