"""Prints a diagnosis: the contents of a data set, then faults and notes by kind."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from reslearn.data.doctor.diagnosis import Diagnosis, ObjectStatistics
    from reslearn.data.findings import Finding

CLASSES = 20  # with more classes, only the range of class sizes is printed; for sets with boxes, only this many rows
SHOWN = 5  # findings printed per kind; --json lists all


def show(diagnosis: "Diagnosis") -> None:
    """Prints a diagnosis; for sets with boxes also objects per class and anchor fit."""
    objects, pixels = diagnosis.objects, diagnosis.pixels
    images = " + ".join(f"{n:,}{'' if split == 'all' else f' {split}'}" for split, n in diagnosis.images.items())
    classes = f"{len(diagnosis.classes):,} {'class' if len(diagnosis.classes) == 1 else 'classes'}"
    total = sum(n for counts in diagnosis.per_class.values() for n in counts.values())
    boxes = "" if objects is None else f", {total:,} objects"
    typer.echo(f"{diagnosis.name}: {classes}, {images} images{boxes}, {pixels.bytes / 1e6:,.1f} MB")
    if objects is None:
        for split, counts in diagnosis.per_class.items():
            _row("images" if split == "all" else split, _sizes(counts))
    for title, counts in (("formats", pixels.formats), ("modes", pixels.modes)):
        _row(title, ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    for title, span in (("height", pixels.height), ("width", pixels.width), ("width/height", pixels.aspect)):
        _row(title, f"{span[0]:,g} to {span[2]:,g}, median {span[1]:,g}" if span else "")
    for title, numbers in (("mean", pixels.mean), ("std", pixels.std), ("PCA values", pixels.eigenvalues)):
        _row(title, " ".join(f"{x:.4f}" for x in numbers))
    for i, row in enumerate(pixels.eigenvectors):
        _row("" if i else "PCA vectors", " ".join(f"{x:7.4f}" for x in row))
    if objects is not None:
        _objects(diagnosis, objects)
    _findings("faults", [finding for finding in diagnosis.findings if finding.fault])
    _findings("notes (do not affect the exit code)", [finding for finding in diagnosis.findings if not finding.fault])
    if diagnosis.clean:
        typer.echo("nothing wrong")


def _row(title: str, text: str) -> None:
    if text:
        typer.echo(f"  {title:<13}{text}")


def _sizes(counts: Mapping[str, int]) -> str:
    if len(counts) <= CLASSES:
        return ", ".join(f"{name} {n:,}" for name, n in counts.items())
    return f"{min(counts.values()):,} to {max(counts.values()):,} per class, {len(counts):,} classes"


def _objects(diagnosis: "Diagnosis", objects: "ObjectStatistics") -> None:
    """Prints one row per class (objects by split and size, box sides in px), then the anchor fit."""
    if span := objects.per_image:
        _row("objects", f"{span[0]:,g} to {span[2]:,g} per image, median {span[1]:,g}")
    _row("no objects", ", ".join(f"{n:,} images of {split}" for split, n in objects.without_objects.items() if n))
    counts = (("difficult", objects.difficult), ("crowds", objects.crowds), ("with outlines", objects.segmented))
    _row("of these", ", ".join(f"{n:,} {title}" for title, n in counts if n))
    splits, classes = list(diagnosis.per_class), diagnosis.classes
    rows = [["class", *("objects" if split == "all" else split for split in splits), "small", "medium", "large", "side, px"]]
    for name in classes[:CLASSES]:
        side = objects.side[name]
        numbers = [*(diagnosis.per_class[split][name] for split in splits), *objects.by_size[name].values()]
        sides = f"{side[0]:.0f} to {side[2]:.0f}, median {side[1]:.0f}" if side else "-"
        rows.append([name, *(f"{n:,}" for n in numbers), sides])
    _columns(rows)
    if len(classes) > CLASSES:
        typer.echo(f"  and {len(classes) - CLASSES:,} more classes (see --json)")
    if objects.anchors:
        typer.echo("share of boxes in the first split with an anchor of IoU 0.5 or more:")
        shown = classes if len(classes) <= 5 else ()
        rows = [["anchors", "size", "sides, px", "ratios", "all", *shown]]
        for anchor in objects.anchors:
            numbers = [", ".join(f"{x:g}" for x in values) for values in (anchor.anchors, anchor.ratios)]
            by_class = [f"{anchor.by_class[name]:.1f}%" if name in anchor.by_class else "-" for name in shown]
            rows.append([anchor.name, f"{anchor.size[0]}, {anchor.size[1]}", *numbers, f"{anchor.recall:.1f}%", *by_class])
        _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        typer.echo("  " + "  ".join([first.ljust(widths[0]), *cells]))


def _findings(title: str, findings: Sequence["Finding"]) -> None:
    from reslearn.data.findings import KINDS

    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    if by_kind:
        typer.echo(f"{title}:")
    for kind, some in by_kind.items():
        row = KINDS[kind]
        typer.echo(f"  {kind}, {len(some):,}: {row.description}" + (f" (--fix: {row.fix})" if row.fix else ""))
        for finding in some[:SHOWN]:
            typer.echo(f"    {finding.place}" + (f": {finding.detail}" if finding.detail else ""))
        if len(some) > SHOWN:
            typer.echo(f"    and {len(some) - SHOWN:,} more (see --json)")
