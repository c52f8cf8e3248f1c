"""The paper's Table 9 for a detector: the gain and cost of each test-time improvement, added one by one."""

from collections.abc import Sequence
from typing import Any

from reslearn.data.boxes.box_set import BoxSet
from reslearn.detect.detector import Detector
from reslearn.detect.evaluate import TestOptions, find, matches
from reslearn.detect.improvements import PAPER_SCALES, PAPER_SIDE, SIDES
from reslearn.evaluation.average_precision import coco, compare
from reslearn.progress import Progress, silent

# DRL Table 9, ResNet-101: rung -> AP at IoU 0.5, AP over IoU 0.5 to 0.95, test set
TABLE_9 = {
    "baseline": (48.4, 27.2, "COCO val"),
    "+ box refinement": (49.9, 29.9, "COCO val"),
    "+ context": (51.1, 30.0, "COCO val"),
    "+ multi-scale testing": (53.8, 32.5, "COCO val"),
    "ensemble": (59.0, 37.4, "COCO test-dev, where multi-scale testing has 55.7 and 34.9"),
}


def default_scales(model: Detector) -> tuple[int, ...]:
    """The paper's five shorter sides, scaled to the detector's min_size, without those out of range."""
    sides = (round(side * model.settings.min_size / PAPER_SIDE) for side in PAPER_SCALES)
    return tuple(side for side in sides if SIDES[0] <= side <= SIDES[1])


def ways(model: Detector, others: Sequence[Detector], scales: Sequence[int]) -> dict[str, TestOptions | None]:
    """Test options of each rung, in order. None for context, which is a property of the detector."""
    rungs: dict[str, TestOptions | None] = {
        "baseline": TestOptions((model,)),
        "+ box refinement": TestOptions((model,), True),
        "+ context": None,
        "+ multi-scale testing": TestOptions((model,), True, tuple(scales)),
    }
    return rungs | ({"ensemble": TestOptions((model, *others), True, tuple(scales))} if others else {})


def ladder(
    model: Detector, data: BoxSet, *, others: Sequence[Detector] = (), scales: Sequence[int] = (), progress: Progress = silent
) -> dict[str, Any]:
    """Evaluates every rung. Returns, ready for JSON, `data`, `n` images, `scales` in px, `context` (whether the detector has it)
    and `rungs`.

    A rung has `name`; `AP50` and `AP` in percent; `seconds_per_image`, the median; `gain` over the previous rung, {"AP50", "AP"}
    with the difference and its paired 95% interval (None for the first); and `paper`, ResNet-101's values from Table 9 and the
    set they are `of`. The rung "+ context" has the paper's values only. others: further models for an ensemble. scales: for
    multi-scale testing, by default the paper's, scaled to min_size. Raises UserError as `detect` does.
    """
    scales = tuple(scales) or default_scales(model)
    rungs = ways(model, others, scales)
    tests = {name: options for name, options in rungs.items() if options is not None}
    predictions = dict(zip(tests, find(data.images, list(tests.values()), progress), strict=True))
    rows, before = [], None
    for name in rungs:
        ap50, ap, of = TABLE_9[name]
        row: dict[str, Any] = {"name": name, "AP50": None, "AP": None, "seconds_per_image": None, "gain": None}
        if name in predictions:
            now = matches(predictions[name].detections, data)
            numbers = coco(now)
            row |= {"AP50": numbers["AP50"], "AP": numbers["AP"], "seconds_per_image": predictions[name].seconds}
            if before is not None:
                gains = compare(before, now)
                row["gain"] = {key: {k: gains[key][k] for k in ("difference", "interval")} for key in ("AP50", "AP")}
            before = now
        rows.append(row | {"paper": {"AP50": ap50, "AP": ap, "of": of}})
    return {"data": data.name, "n": len(data), "scales": list(scales), "context": model.settings.context, "rungs": rows}
