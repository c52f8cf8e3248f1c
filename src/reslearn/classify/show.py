"""Prints the numbers of an evaluation."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

CLASSES = 30  # with more classes, only the hardest ones are listed
CONFUSION = 12  # with more classes, the most confused pairs are listed instead of the matrix


def show(result: dict[str, Any]) -> None:
    """Print the result of `evaluate`."""
    console = Console(highlight=False)
    low, high = result["top1_interval"]
    protocol = "" if result["protocol"] == "center" else f", {result['protocol']}"
    console.print(f"{result['data']}, {result['split']} split, {result['n']:,} images{protocol}", markup=False)
    for member in result.get("members", []):
        top5 = f"   top-5 error {member['top5_error']:6.2f} %" if "top5_error" in member else ""
        console.print(f"top-1 error        {member['top1_error']:6.2f} %{top5}   {member['model']} alone", markup=False)
    ensemble = ", ensemble" if "members" in result else ""
    console.print(f"top-1 error        {result['top1_error']:6.2f} %   (95% interval {low:.2f} to {high:.2f}{ensemble})")
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
    present = [row for row in rows if row["n"]]
    shown = present if len(present) <= CLASSES else sorted(present, key=lambda row: row["accuracy"])[:CLASSES]
    title = "accuracy by class" if shown is present else f"the {CLASSES} hardest of {len(present)} classes"
    table = Table("class", _right("images"), _right("accuracy %"), title=title, box=SIMPLE)
    for row in shown:
        table.add_row(escape(row["class"]), f"{row['n']:,}", f"{row['accuracy']:.1f}")
    return table


def _matrix(classes: list[str], confusion: list[list[int]]) -> Table:
    columns = [_right(str(i + 1)) for i in range(len(classes))]
    table = Table("", *columns, title="confusion (rows: true class)", box=SIMPLE)
    for i, (name, row) in enumerate(zip(classes, confusion, strict=True), 1):
        table.add_row(f"{i} {escape(name)}", *(str(n) if n else "." for n in row))
    return table


def _pairs(classes: list[str], confusion: list[list[int]]) -> Table:
    pairs = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n and i != j]
    table = Table("true", "predicted", _right("images"), title="most confused", box=SIMPLE)
    for n, i, j in sorted(pairs, key=lambda pair: -pair[0])[:15]:
        table.add_row(escape(classes[i]), escape(classes[j]), str(n))
    return table


def _right(header: str) -> Column:
    return Column(header, justify="right")
