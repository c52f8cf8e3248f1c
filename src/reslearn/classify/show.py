"""Numbers of an evaluation, for reading in a terminal."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

CLASSES = 30  # more classes than this: the worst ones only
CONFUSION = 12  # more classes than this: the most confused pairs instead of the matrix


def show(result: dict[str, Any]) -> None:
    """Print the result of `evaluate`."""
    console = Console(highlight=False)
    low, high = result["top1_interval"]
    how = "" if result["protocol"] == "center" else f", {result['protocol']}"
    console.print(f"{result['data']}, {result['split']} split, {result['n']:,} images{how}", markup=False)
    for member in result.get("members", []):
        top5 = f"   top-5 error {member['top5_error']:6.2f} %" if "top5_error" in member else ""
        console.print(f"top-1 error        {member['top1_error']:6.2f} %{top5}   {member['model']} alone", markup=False)
    together = ", together" if "members" in result else ""
    console.print(f"top-1 error        {result['top1_error']:6.2f} %   (95% interval {low:.2f} to {high:.2f}{together})")
    if "top5_error" in result:
        console.print(f"top-5 error        {result['top5_error']:6.2f} %")
    console.print(f"calibration error  {result['calibration_error']:6.2f} %")
    console.print(f"loss               {result['loss']:8.4f}")
    for name, reason in result["unreadable"].items():
        console.print(f"left out: {name}: {reason}", markup=False)
    if "note" in result:
        console.print(f"note: {result['note']}", markup=False)
    console.print()
    console.print(_by_class(result["per_class"]))
    classes = [row["class"] for row in result["per_class"]]
    if len(classes) <= CONFUSION:
        console.print(_matrix(classes, result["confusion"]))
    else:
        console.print(_pairs(classes, result["confusion"]))


def _by_class(rows: list[dict[str, Any]]) -> Table:
    seen = [row for row in rows if row["n"]]
    shown = seen if len(seen) <= CLASSES else sorted(seen, key=lambda row: row["accuracy"])[:CLASSES]
    table = Table(title="accuracy by class" if shown is seen else f"the {CLASSES} hardest of {len(seen)} classes", box=SIMPLE)
    table.add_column("class")
    table.add_column("images", justify="right")
    table.add_column("accuracy %", justify="right")
    for row in shown:
        table.add_row(_plain(row["class"]), f"{row['n']:,}", f"{row['accuracy']:.1f}")
    return table


def _matrix(classes: list[str], confusion: list[list[int]]) -> Table:
    table = Table(title="confusion (rows true)", box=SIMPLE)
    table.add_column("")
    for i in range(len(classes)):
        table.add_column(str(i + 1), justify="right")
    for i, (name, row) in enumerate(zip(classes, confusion, strict=True), 1):
        table.add_row(f"{i} {_plain(name)}", *(str(n) if n else "." for n in row))
    return table


def _pairs(classes: list[str], confusion: list[list[int]]) -> Table:
    pairs = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n and i != j]
    table = Table(title="most confused", box=SIMPLE)
    for heading in ("true", "taken for"):
        table.add_column(heading)
    table.add_column("images", justify="right")
    for n, i, j in sorted(pairs, key=lambda pair: -pair[0])[:15]:
        table.add_row(_plain(classes[i]), _plain(classes[j]), str(n))
    return table


def _plain(text: str) -> str:
    """Class names may hold what Rich would take for markup."""
    return text.replace("[", r"\[")
