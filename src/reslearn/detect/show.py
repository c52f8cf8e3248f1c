"""Terminal output of detection results."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

CLASSES = 30  # maximum number of classes to list
HEADLINE = {
    "AP": "AP, IoU 0.50 to 0.95",
    "AP50": "AP50, IoU 0.50",
    "AP75": "AP75, IoU 0.75",
    "VOC07": "VOC07, 11 recalls",
    "VOC10": "VOC10, area",
}
AREAS = ("small", "medium", "large")
MISTAKES = {
    "class": "wrong class",
    "location": "poor localization",
    "both": "wrong class and poor localization",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed object",
}


def show_numbers(result: dict[str, Any]) -> None:
    """Prints the result of `evaluate.numbers` with `trained_on`, the number of its images used in training."""
    console = Console(highlight=False, markup=False)
    time = f"{1000 * result['seconds_per_image']:,.0f} ms per image"
    console.print(f"{result['data']}, {result['n']:,} images, {result['objects']:,} objects, {time}")
    _trained_on(console, result["trained_on"], result["n"])
    if result["left_out"]:
        console.print("left out or cut: " + ", ".join(f"{kind} {count}" for kind, count in result["left_out"].items()))
    _numbers(console, "boxes", result)
    if "masks" in result:
        _numbers(console, "masks", result["masks"])
    table = _table("mistakes at IoU 0.5", "", "count")
    for kind, meaning in MISTAKES.items():
        table.add_row(meaning, f"{result['mistakes'][kind]:,}")
    console.print(table)


def _trained_on(console: Console, trained: int, n: int, who: str = "") -> None:
    if trained:
        console.print(f"note: {who}trained on {trained:,} of these {n:,} images: AP on new images is lower")


def _numbers(console: Console, title: str, numbers: dict[str, Any]) -> None:
    console.print()
    for key, meaning in HEADLINE.items():
        ends = numbers["intervals"][key]
        interval = "" if ends is None else f"   (95% interval {_interval(ends)})"
        console.print(f"{title}  {meaning:<21} {_percent(numbers[key])} %{interval}")
    for name, keys in (
        ("AP by size", {area: f"AP_{area}" for area in AREAS}),
        ("recall of top k", {limit: f"AR{limit}" for limit in (1, 10, 100)}),
        ("recall by size", {area: f"AR_{area}" for area in AREAS}),
    ):
        console.print(f"{title}  {name:<22}" + "   ".join(f"{label} {_percent(numbers[key])}" for label, key in keys.items()))
    rows = [row for row in numbers["per_class"] if row["objects"]]
    shown = rows if len(rows) <= CLASSES else sorted(rows, key=lambda row: row["AP"] or 0)[:CLASSES]
    table = _table(
        f"{title} by class" if shown is rows else f"{title}: the {CLASSES} classes with the lowest AP of {len(rows)}",
        "class", "objects", *HEADLINE,
    )  # fmt: skip
    for row in shown:
        table.add_row(_plain(row["class"]), f"{row['objects']:,}", *(_percent(row[key]) for key in HEADLINE))
    console.print(table)


def show_comparison(result: dict[str, Any]) -> None:
    """Prints two detectors side by side: data, n, one, other, trained_on, seconds_per_image and `numbers` from `compare`."""
    console = Console(highlight=False, markup=False)
    console.print(f"{result['data']}, {result['n']:,} images")
    for key, side, seconds in zip("AB", ("one", "other"), result["seconds_per_image"], strict=True):
        console.print(f"{key}  {result[side]}, {1000 * seconds:,.0f} ms per image")
    for key, trained in zip("AB", result["trained_on"], strict=True):
        _trained_on(console, trained, result["n"], f"{key}: ")
    table = _table("", "", "A", "B", "B - A", "95% interval")
    for key, numbers in result["numbers"].items():
        difference = numbers["difference"]
        gain = "-" if difference is None else f"{difference:+.2f}"
        table.add_row(HEADLINE[key], _percent(numbers["one"]), _percent(numbers["other"]), gain, _interval(numbers["interval"]))
    console.print(table)


def show_ladder(result: dict[str, Any]) -> None:
    """Prints the result of `ladder` with `trained_on`, the number of its images used in training."""
    console = Console(highlight=False, markup=False)
    scales = ", ".join(map(str, result["scales"]))
    console.print(f"{result['data']}, {result['n']:,} images; multi-scale testing at {scales} px")
    _trained_on(console, result["trained_on"], result["n"])
    for key in ("AP50", "AP"):  # two tables: one would be wider than most terminals
        table = _table("", HEADLINE[key], "%", "gain", "95% interval", "ms per image", "paper %")
        for row in result["rungs"]:
            gain = row["gain"] and row["gain"][key]
            known = gain and gain["difference"] is not None
            cells = (f"{gain['difference']:+.2f}", _interval(gain["interval"])) if known else ("", "")
            time = "" if row["seconds_per_image"] is None else f"{1000 * row['seconds_per_image']:,.0f}"
            mark = "" if row["paper"]["of"] == "COCO val" else "*"
            table.add_row(row["name"], _percent(row[key]), *cells, time, f"{row['paper'][key]}{mark}")
        console.print(table)
    if result["context"]:
        console.print("context: this detector was trained with it: every row includes it")
    else:
        console.print("context: this detector was trained without it")
    console.print("box refinement includes box voting; ms per image: median")
    console.print("paper: ResNet-101 on COCO, Table 9; absolute values depend on the data")
    if result["rungs"][-1]["name"] == "ensemble":
        console.print(f"* three detectors, on {result['rungs'][-1]['paper']['of']}")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, box=SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _percent(value: float | None) -> str:
    return "   -  " if value is None else f"{value:6.2f}"


def _interval(ends: list[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


def _plain(text: str) -> str:
    """Escapes Rich markup in class names."""
    return text.replace("[", r"\[")
