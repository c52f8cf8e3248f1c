"""Each kind of detection mistake."""

import numpy as np

import detection_oracles as oracles
from reslearn.data.boxes.box_set import Objects
from reslearn.evaluation.detection_errors import count_mistakes, mistakes
from reslearn.evaluation.matching import match

CELL, PLATE = (0, 0, 100, 100), (200, 200, 300, 300)


def test_kinds() -> None:
    truth = Objects.of([CELL, PLATE, (500, 0, 600, 100), (700, 0, 800, 100)], [1, 2, 1, 1], difficult=[0, 0, 0, 1])
    boxes = {
        "right": (CELL, 1, 0.9),
        "duplicate": ((0, 0, 100, 90), 1, 0.8),
        "class": ((200, 200, 300, 290), 1, 0.7),
        "location": ((0, 0, 100, 30), 1, 0.6),
        "both": ((200, 200, 300, 230), 1, 0.5),
        "background": ((400, 400, 450, 450), 1, 0.4),
        "difficult": ((700, 0, 800, 100), 1, 0.95),
    }
    rows = list(boxes.values())
    given = {"boxes": [row[0] for row in rows], "labels": [row[1] for row in rows], "scores": [row[2] for row in rows]}
    errors = mistakes(match([truth], [given], ["cell", "plate"]))
    expected = [("duplicate", 1, 0), ("class", 2, 1), ("location", 3, 0), ("both", 4, 1), ("background", 5, None)]
    assert [(m.kind, m.detection, m.object) for m in errors] == [*expected, ("missed", None, 2)]
    assert [round(m.iou, 6) for m in errors] == [0.9, 0.9, 0.3, 0.3, 0, 0] and [m.score for m in errors][:2] == [0.8, 0.7]
    assert count_mistakes(errors) == dict.fromkeys(("class", "location", "both", "duplicate", "background", "missed"), 1)


def test_every_wrong_detection_has_one_kind() -> None:
    truth, given = oracles.scene(np.random.default_rng(1), images=20, crowds=0.1, hard=0.1)
    matches = match(truth, given, "abc")
    errors = mistakes(matches)
    wrong = ~matches.hit[:, 0, 0] & ~matches.ignored[:, 0, 0]
    alarms = {(m.image, m.detection) for m in errors if m.detection is not None}
    assert alarms == {*zip(matches.image[wrong].tolist(), matches.index[wrong].tolist(), strict=True)}
    assert len(alarms) == wrong.sum() and all(count_mistakes(errors).values())
    for m in errors:
        objects = truth[m.image]
        assert m.object is None or not (objects.difficult[m.object] or objects.crowd[m.object])
        if m.detection is None or m.object is None:
            continue
        same = objects.labels[m.object] == given[m.image]["labels"][m.detection]
        assert same == (m.kind in ("location", "duplicate")) and (m.iou >= 0.5) == (m.kind in ("class", "duplicate"))
        assert m.iou == float(oracles.exact_iou(given[m.image]["boxes"][m.detection], objects.boxes[m.object]))


def test_an_object_detected_or_nearly_detected_is_not_missed() -> None:
    truth = [Objects.of([CELL], [1])] * 3
    seen = [{"boxes": [box], "labels": [1], "scores": [0.5]} for box in (CELL, (0, 0, 100, 40), (0, 0, 100, 5))]
    assert [(m.kind, m.image) for m in mistakes(match(truth, seen, "a"))] == [("location", 1), ("background", 2), ("missed", 2)]
