"""doctor for sets with boxes: what it prints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reslearn.cli.findings import show_findings

if TYPE_CHECKING:
    from reslearn.data.doctor.boxes import BoxDiagnosis

CLASSES = 20  # rows of classes that are printed


def boxes(data: str, fix: Path | None, size: str | None, as_json: bool) -> None:
    """Examine a set with boxes, print what is found, copy what is sound. Exit codes as doctor's."""
    from reslearn.data.doctor.boxes import examine_boxes, parse_size
    from reslearn.data.doctor.repair_boxes import check_folder, counts, mend_boxes
    from reslearn.training.display import Display

    at = parse_size(size)
    if fix is not None:
        check_folder(fix)
    with Display(stderr=True) as display:
        found = examine_boxes(data, display.progress, size=at)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
    else:
        _print(found)
    if fix is not None:
        with Display(stderr=True) as display:
            copy = mend_boxes(found, data, fix, display.progress)
        kept, named = counts(copy), counts(data)
        line = f"{kept[0]:,} of {named[0]:,} images, {kept[1]:,} of {named[1]:,} objects"
        typer.echo(f"wrote {fix}: {line}", err=as_json)
    if not found.clean:
        raise typer.Exit(1)


def _print(found: "BoxDiagnosis") -> None:
    images = " + ".join(f"{n:,}{'' if split == 'all' else f' {split}'}" for split, n in found.images.items())
    total = sum(n for of in found.objects.values() for n in of.values())
    classes = f"{len(found.classes):,} {'class' if len(found.classes) == 1 else 'classes'}"
    typer.echo(f"{found.name}: {classes}, {images} images, {total:,} objects, {found.bytes / 1e6:,.1f} MB")
    for title, span in (("height", found.height), ("width", found.width), ("objects", found.objects_per_image)):
        if span:
            what = " an image" if title == "objects" else ""
            typer.echo(f"  {title:<13}{span[0]:,g} to {span[2]:,g}{what}, median {span[1]:,g}")
    if any(found.without_objects.values()):
        typer.echo("  no objects   " + ", ".join(f"{n:,} images of {split}" for split, n in found.without_objects.items() if n))
    counts = (("difficult", found.difficult), ("crowds", found.crowds), ("with outlines", found.segmented))
    if any(n for _, n in counts):
        typer.echo("  of these     " + ", ".join(f"{n:,} {title}" for title, n in counts if n))
    _table(found)
    _anchors(found)
    from reslearn.data.doctor.boxes import ALL_KINDS

    show_findings(found.findings, ALL_KINDS)
    if found.clean:
        typer.echo("nothing wrong")


def _table(found: "BoxDiagnosis") -> None:
    """A row for each class: objects by split and by size, and the side of their boxes."""
    splits = list(found.objects)
    rows = [["class", *("objects" if split == "all" else split for split in splits), "small", "medium", "large", "side, px"]]
    for name in found.classes[:CLASSES]:
        side = found.side[name]
        sizes = [f"{n:,}" for n in found.by_size[name].values()]
        counts = [f"{found.objects[split][name]:,}" for split in splits]
        rows.append([name, *counts, *sizes, f"{side[0]:.0f} to {side[2]:.0f}, median {side[1]:.0f}" if side else "-"])
    _columns(rows)
    if len(found.classes) > CLASSES:
        typer.echo(f"  and {len(found.classes) - CLASSES:,} classes more, which --json has")


def _anchors(found: "BoxDiagnosis") -> None:
    if not found.anchors:
        return
    typer.echo("boxes with an anchor of IoU 0.5 or more, of the first split:")
    shown = found.classes if len(found.classes) <= 5 else ()
    rows = [["anchors", "size", "sides, px", "ratios", "all", *shown]]
    for one in found.anchors:
        numbers = [", ".join(f"{x:g}" for x in some) for some in (one.anchors, one.ratios)]
        recall = [f"{x:.1f}%" for x in (one.recall, *(one.by_class.get(name, float("nan")) for name in shown))]
        rows.append([one.name, f"{one.size[0]}, {one.size[1]}", *numbers, *(x.replace("nan%", "-") for x in recall)])
    _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  " + "  ".join(cells))
