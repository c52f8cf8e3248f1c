"""The page of a folder of experiment results."""

import json
from pathlib import Path
from typing import Any

import pytest

from reslearn import UserError
from reslearn.report import story


def result(**change: Any) -> dict[str, Any]:
    ours = {"n": 3, "mean": 9.04, "std": 0.1, "interval": [8.8, 9.3], "values": [9.0, 9.1, 9.02]}
    row = {"what": "ResNet-20 <b>", "metric": "test error, %", "published": 8.75, "ours": ours, "difference": 0.29}
    claim = {"text": "deeper is better", "metric": "training error, %", "effect": ours, "verdict": "holds", "disagree": []}
    return {
        "experiment": "table6",
        "order": 2,
        "title": "By depth",
        "source": "DRL, Table 6",
        "see": "The error falls.",
        "scale": "paper",
        "command": "reslearn reproduce table6 --scale paper",
        "made_on": ["P, 2 threads"],
        "deviations": ["bf16"],
        "rows": [row | {"verdict": "holds"}, {"what": "ResNet-32", "published": 7.51, "ours": None, "verdict": "not run"}],
        "claims": [claim, {"text": "later", "effect": None, "verdict": "not run"}],
        "notes": ["It crosses."],
        **change,
    }


def test_the_page(tmp_path: Path) -> None:
    (tmp_path / "table6-paper.json").write_text(json.dumps(result(picture="table6-paper.png")))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "first.json").write_text(
        json.dumps(result(order=0, title="The first", experiment="first", made_on=["Q", "P, 2 threads"]))
    )
    (tmp_path / "table6-paper.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    page = story.write(tmp_path, tmp_path / "index.html").read_text()
    assert page.index("The first") < page.index("By depth")
    for shown in (
        "Run on Q; P, 2 threads.",
        "8.75",
        "9.04 ± 0.10",
        "+0.29",
        "not run",
        "It crosses.",
        "data:image/png;base64,iVBORw0KGgo=",
        "ResNet-20 &lt;b&gt;",
    ):
        assert shown in page
    assert "<b>" not in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("text", ["{", '{"experiment": "a", "rows": 3, "scale": "small"}'])
def test_error_names_a_broken_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json"):
        story.write(tmp_path, tmp_path / "index.html")
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize("key", story.KEYS)
def test_error_names_an_incomplete_result(tmp_path: Path, key: str) -> None:
    (tmp_path / "half.json").write_text(json.dumps({name: value for name, value in result().items() if name != key}))
    with pytest.raises(UserError, match=rf"half\.json: incomplete experiment result: '{key}' is missing"):
        story.write(tmp_path, tmp_path / "index.html")


def test_the_number_of_intervals_that_miss_by_chance(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result(claims=40 * result()["claims"][:1])))
    assert "Of 40 intervals at 95%, about 2 would miss" in story.write(tmp_path, tmp_path / "index.html").read_text()


def test_analyses_are_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result()))
    (tmp_path / "analysis").mkdir()
    analysis = {"analysis": "lesion", "command": "reslearn analyze lesion x", "models": {"x": {}}, "findings": ["Error < 5%."]}
    (tmp_path / "analysis" / "lesion.json").write_text(json.dumps(analysis))
    (tmp_path / "analysis" / "lesion.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "analysis" / "signal.json").write_text("{}")
    page = story.write(tmp_path, tmp_path / "index.html").read_text()
    for shown in ("Removing and reordering blocks", "Error &lt; 5%.", "reslearn analyze lesion x", "iVBORw0KGgo="):
        assert shown in page
    assert "Forward and backward signal" not in page, "an empty file is ignored"
    for name in ("explain-cat-1", "explain-dog-1"):
        analysis |= {"analysis": name, "findings": [f"Of {name}."]}
        (tmp_path / "analysis" / f"{name}.json").write_text(json.dumps(analysis))
    page = story.write(tmp_path, tmp_path / "index.html").read_text()
    assert page.count("Where the network looks</h2>") == 2 and "Of explain-cat-1." in page and "Of explain-dog-1." in page
    (tmp_path / "analysis" / "signal.json").write_text("{")
    with pytest.raises(UserError, match=r"signal\.json: not an analysis result"):
        story.write(tmp_path, tmp_path / "index.html")


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no experiment results"):
        story.write(tmp_path, tmp_path / "index.html")
