"""A folder of experiment results to one page that explains them to readers who have not read the paper."""

import json
from pathlib import Path
from typing import Any

from reslearn.errors import UserError
from reslearn.files import write_text
from reslearn.report import analyses
from reslearn.report.elements import picture, render
from reslearn.report.text import number

SCALES = {
    "paper": "under the paper's protocol",
    "small": "at small scale: it tests an effect, not the paper's number",
    "models": "of models that were given",
    "smoke": "smoke test: it shows only that it runs",
}

VERDICTS = ("holds", "differs", "undecided", "failed", "not comparable", "not run")
PARTS = ("title", "source", "see", "scale", "command", "made_on", "rows", "claims", "notes", "deviations")
CURVES = "Lines are means over seeds, bands their range; dashed: training error, bold: held-out error."
EFFECTS = "Right of zero is what is claimed. Dots are means, bars 95% intervals, rings single seeds."


def write(folder: Path, target: Path) -> Path:
    """Write the page of all results in a folder (NAME-SCALE.json and pictures) and of the analyses in its folder `analysis`.

    Returns `target`. Raises UserError if there are no results, or one cannot be read.
    """
    read = [result for path in folder.glob("*.json") if (result := _read(path))]
    results = sorted(read, key=lambda one: (one["order"], one["scale"]))
    if not results:
        raise UserError(f"{folder} holds no results of experiments")
    views = [_view(result, folder) for result in results]
    made_on = list(dict.fromkeys(words for result in results for words in result["made_on"]))
    intervals = sum(bool(claim["effect"] and claim["effect"]["interval"]) for result in results for claim in result["claims"])
    found = analyses.read(folder / "analysis")
    page = render(
        "story.html.j2",
        title="Deep residual learning, reproduced",
        results=views,
        made_on=made_on,
        intervals=intervals,
        analyses=found,
        signed=signed,
        number=number,
    )
    write_text(target, page)
    return target


def _read(path: Path) -> dict[str, Any] | None:
    """A result; None for any other file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or "experiment" not in result:
            return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a result of an experiment ({type(error).__name__}: {error}); move it elsewhere") from None
    if missing := [key for key in PARTS if key not in result]:
        raise UserError(f"{path}: incomplete result of an experiment: '{missing[0]}' is missing; run the experiment again")
    return {"order": 0, "data": None, "seeds": None, **result}


def _view(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    verdicts = [line["verdict"] for line in (*result["rows"], *result["claims"]) if line["verdict"]]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    return {
        **result,
        "anchor": f"{result['experiment']}-{result['scale']}",
        "scale_says": SCALES.get(result["scale"], result["scale"]),
        "counts": {verdict: n for verdict, n in counts.items() if n},
        "pictures": [
            found.uri for key in ("picture", "effects_picture") if (found := picture(folder, Path(result.get(key) or "").name))
        ],
        "captions": [result.get("caption") or CURVES, result.get("second_caption") or EFFECTS]
        if result.get("picture")
        else [EFFECTS],
    }


def signed(value: float | None) -> str:
    """Two decimals with a sign."""
    return "" if value is None else f"{value:+,.2f}".replace("-", "−")
