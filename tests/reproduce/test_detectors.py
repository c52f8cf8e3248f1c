"""Experiments with detectors: invalid input, and the ladder of test-time improvements for given detectors."""

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
from reslearn.reproduce.detectors import BASELINE_ENSEMBLE, NEARBY_SCALES, measure_ladder
from reslearn.reproduce.experiment import ExperimentOptions
from reslearn.reproduce.run import reproduce


def test_a_data_set_without_test_images_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no test split"):
        reproduce(EXPERIMENTS["table7"], "smoke", data=str(boxed.shapes(tmp_path / "set")), out=tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").glob("runs/*"))


def test_given_detectors_are_identified_by_context(tmp_path: Path) -> None:
    files = []
    for i, context in enumerate((True, False, False)):
        model = detector(classes=["disc", "square"], seed=i, context=context)  # type: ignore[arg-type]
        files.append(save_detector(model, tmp_path / f"{i}.safetensors"))
    data = boxed.shapes(boxed.shapes(tmp_path / "set", images=6), images=2, split="test")
    options: dict[str, Any] = {"data": str(data), "out": tmp_path / "out", "quiet": True}
    with pytest.raises(UserError, match=r"two of which exactly one has detector\.context"):
        reproduce(EXPERIMENTS["table9"], "small", models=files[1:], **options)
    results = [reproduce(EXPERIMENTS["table9"], "small", models=pair, **options) for pair in (files[:2], files[1::-1])]
    rungs = [rungs_of(result["rows"]) for result in results]
    assert rungs[0] == rungs[1] == ["baseline", "+ box refinement", "+ context", "+ multi-scale testing", NEARBY_SCALES]
    assert [row["ours"] for row in results[0]["rows"]] == [row["ours"] for row in results[1]["rows"]], "in any order"


def rungs_of(rows: list[dict[str, Any]]) -> list[str]:
    assert all(row["verdict"] == "not run" and row["published"] for row in rows if row["ours"] is None)
    return [row["what"].split(",")[0] for row in rows if row["ours"]][::3]


def test_rungs_are_means_over_seeds_and_ensembles_of_all_seeds(tmp_path: Path) -> None:
    data = boxed.shapes(boxed.shapes(tmp_path / "set", images=6), images=3, split="test")
    models = {"a": [], "b": []}
    for context, (label, files) in enumerate(models.items()):
        for seed in range(2):
            model = detector(classes=["disc", "square"], seed=seed, context=bool(context))  # type: ignore[arg-type]
            files.append(save_detector(model, tmp_path / f"{label}{seed}.safetensors"))
    measured = measure_ladder(models, ExperimentOptions(str(data), str(data), 2, tmp_path, "cpu", lambda line: None))
    rungs = ["baseline", "+ box refinement", "+ context", "+ multi-scale testing", NEARBY_SCALES, "ensemble", BASELINE_ENSEMBLE]
    assert rungs_of(measured.rows) == rungs
    assert [row["ours"]["n"] for row in measured.rows if row["ours"]][::3] == [2, 2, 2, 2, 2, 1, 1]
    lines: list[str] = []
    measure_ladder(models, ExperimentOptions(str(data), str(data), 2, tmp_path, "cpu", lines.append), limit=2)
    assert lines == ["testing 2 images with 12 protocols"]
    opened = open_detectors(models["a"], "cpu")
    images = open_split(data, opened[0].classes)
    protocols = [TestOptions((opened[0],)), TestOptions((opened[1],)), TestOptions(opened)]
    ap50 = [coco(matches(result.detections, images))["AP50"] or 0.0 for result in find(images.images, protocols)]
    values = {row["what"].split(",")[0]: row["ours"]["values"] for row in measured.rows if row["ours"] and ", AP50" in row["what"]}
    assert values["baseline"] == ap50[:2] and values[BASELINE_ENSEMBLE] == ap50[2:]
    gain = next(claim for claim in measured.claims if claim["text"] == "Ensemble of baselines raises AP50")
    assert gain["effect"]["values"] == [ap50[2] - single for single in ap50[:2]]
