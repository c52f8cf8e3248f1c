"""Writes one page from a folder of experiment results, for readers who have not read the paper."""

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
    "small": "small scale: tests an effect, not the paper's number",
    "models": "given models",
    "smoke": "smoke test: shows only that it runs",
}

VERDICTS = ("holds", "differs", "undecided", "failed", "not comparable", "not run")
KEYS = ("title", "source", "see", "scale", "command", "made_on", "rows", "claims", "notes", "deviations")
CURVES = "Lines are means over seeds and bands their range. Dashed: training error. Bold: held-out error."
EFFECTS = "Values right of zero support the claim. Dots are means, bars 95% intervals, rings single seeds."


def write(folder: Path, target: Path) -> Path:
    """Write the page of all results in a folder (NAME-SCALE.json and pictures) and of the analyses in its subfolder `analysis`.

    Returns `target`. Raises UserError if there are no results or one cannot be read.
    """
    results = [result for path in folder.glob("*.json") if (result := _read(path))]
    results.sort(key=lambda result: (result["order"], result["scale"]))
    if not results:
        raise UserError(f"{folder} contains no experiment results")
    page = render(
        "story.html.j2",
        title="Deep residual learning, reproduced",
        results=[_view(result, folder) for result in results],
        made_on=list(dict.fromkeys(machine for result in results for machine in result["made_on"])),
        intervals=sum(bool(claim["effect"] and claim["effect"]["interval"]) for result in results for claim in result["claims"]),
        analyses=analyses.read(folder / "analysis"),
        signed=signed,
        number=number,
    )
    write_text(target, page)
    return target


def _read(path: Path) -> dict[str, Any] | None:
    """Reads a result; None for any other JSON file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict) or "experiment" not in result:
            return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not an experiment result ({type(error).__name__}: {error}); move it elsewhere") from None
    if missing := [key for key in KEYS if key not in result]:
        raise UserError(f"{path}: incomplete experiment result: '{missing[0]}' is missing; run the experiment again")
    return {"order": 0, "data": None, "seeds": None, **result}


def _view(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a result with everything else that the template shows."""
    verdicts = [line["verdict"] for line in (*result["rows"], *result["claims"]) if line["verdict"]]
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    files = [Path(result[key]).name for key in ("picture", "effects_picture") if result.get(key)]
    captions = [result.get("caption") or CURVES, result.get("second_caption") or EFFECTS]
    return {
        **result,
        "anchor": f"{result['experiment']}-{result['scale']}",
        "scale_note": SCALES.get(result["scale"], result["scale"]),
        "counts": {verdict: n for verdict, n in counts.items() if n},
        "pictures": [shown.uri for name in files if (shown := picture(folder, name))],
        "captions": captions if result.get("picture") else [EFFECTS],
    }


def signed(value: float | None) -> str:
    """Formats with two decimals and a sign; "" for None."""
    return "" if value is None else f"{value:+,.2f}".replace("-", "−")
