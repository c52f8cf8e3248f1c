"""Experiments with detectors: what they refuse, and given detectors on the rungs."""

from pathlib import Path
from typing import Any

import pytest

import boxed
from detect.small import detector
from reslearn import UserError
from reslearn.detect import save_detector
from reslearn.detect.evaluate import TestOptions, find, matches, open_detectors, open_split
from reslearn.evaluation.average_precision import coco
from reslearn.reproduce.catalog import EXPERIMENTS
from reslearn.reproduce.detectors import ALONE, NEAR, measure_ladder
from reslearn.reproduce.experiment import ExperimentOptions
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
    rungs = [rungs_of(each["rows"]) for each in both]
    assert rungs[0] == rungs[1] == ["baseline", "+ box refinement", "+ context", "+ multi-scale testing", NEAR]
    assert [row["ours"] for row in both[0]["rows"]] == [row["ours"] for row in both[1]["rows"]], "in any order"


def rungs_of(rows: list[dict[str, Any]]) -> list[str]:
    assert all(row["verdict"] == "not run" and row["published"] for row in rows if row["ours"] is None)
    return [row["what"].split(",")[0] for row in rows if row["ours"]][::3]


def test_of_several_seeds_rungs_are_means_and_all_together_an_ensemble(tmp_path: Path) -> None:
    data = boxed.shapes(boxed.shapes(tmp_path / "set", images=6), images=3, split="test")
    models = {"a": [], "b": []}
    for context, (label, files) in enumerate(models.items()):
        for seed in range(2):
            model = detector(classes=["disc", "square"], seed=seed, context=bool(context))  # type: ignore[arg-type]
            files.append(save_detector(model, tmp_path / f"{label}{seed}.safetensors"))
    looked = measure_ladder(models, ExperimentOptions(str(data), str(data), 2, tmp_path, "cpu", lambda line: None))
    rungs = ["baseline", "+ box refinement", "+ context", "+ multi-scale testing", NEAR, "ensemble", ALONE]
    assert rungs_of(looked.rows) == rungs
    assert [row["ours"]["n"] for row in looked.rows if row["ours"]][::3] == [2, 2, 2, 2, 2, 1, 1]
    said: list[str] = []
    measure_ladder(models, ExperimentOptions(str(data), str(data), 2, tmp_path, "cpu", said.append), most=2)
    assert said == ["testing 2 images in 12 ways"]
    opened = open_detectors(models["a"], "cpu")
    images = open_split(data, opened[0].classes)
    ways = [TestOptions((opened[0],)), TestOptions((opened[1],)), TestOptions(opened)]
    numbers = [coco(matches(found.detections, images))["AP50"] or 0.0 for found in find(images.images, ways)]
    first = {row["what"].split(",")[0]: row["ours"]["values"] for row in looked.rows if row["ours"] and ", AP50" in row["what"]}
    assert first["baseline"] == numbers[:2] and first[ALONE] == numbers[2:]
    gained = next(claim for claim in looked.claims if claim["text"] == "Ensemble of baselines raises AP50")
    assert gained["effect"]["values"] == [numbers[2] - one for one in numbers[:2]]
