"""doctor: what is wrong with a data set, before it is trained on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reslearn.cli.doctor_boxes import boxes
from reslearn.cli.findings import show_findings
from reslearn.cli.options import Json
from reslearn.errors import UserError

if TYPE_CHECKING:
    from reslearn.data.doctor.diagnosis import Diagnosis

CLASSES = 20  # more classes than this: the range of their sizes only


def doctor(
    data: Annotated[str, typer.Argument(help="A folder, a list, a packed folder or a name, as for train.")],
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Write what is worth keeping: LIST.csv, or FOLDER for a copy. Never overwrites.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Of a set with boxes: the size that anchors are tried at, as 600 or 600,1000.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every image once and say what is wrong: files, copies, leaks, labels, names, classes; boxes, and how anchors fit them.

    Exit code 0 where there is no fault (notes do not count), 1 with faults, 2 where the data cannot be examined at all.

    \b
    Examples:
      reslearn doctor photos
      reslearn doctor photos --fix clean.csv
      reslearn doctor photos --fix photos-clean --json
      reslearn doctor voc --size 480 --fix voc-clean
    """
    from reslearn.data.boxes.read import holds_boxes

    if holds_boxes(data):
        boxes(data, fix, size, as_json)
        return
    if size is not None:
        raise UserError(f"--size {size} is of sets with boxes, and {data} has none")
    from reslearn.data.doctor.images import examine
    from reslearn.data.doctor.repair import check_source, check_target, mend
    from reslearn.training.display import Display

    if fix is not None:
        check_target(fix)
        check_source(data)
    with Display(stderr=True) as display:
        found = examine(data, display.progress)
    if as_json:
        typer.echo(json.dumps(found.as_json()))
    else:
        _print(found)
    if fix is not None:
        with Display(stderr=True) as display:
            mend(found, fix, display.progress)
        total = sum(n for classes in found.images.values() for n in classes.values())
        typer.echo(f"wrote {fix}: {len(found.kept):,} of {total:,} images", err=as_json)
    if not found.clean:
        raise typer.Exit(1)


def _print(found: "Diagnosis") -> None:
    counts = " + ".join(f"{sum(n.values()):,}{'' if split == 'all' else f' {split}'}" for split, n in found.images.items())
    classes = list(dict.fromkeys(name for of in found.images.values() for name in of))
    kinds = f"{len(classes):,} {'class' if len(classes) == 1 else 'classes'}"
    typer.echo(f"{found.name}: {kinds}, {counts} images, {found.bytes / 1e6:,.1f} MB")
    for split, of in found.images.items():
        title = "images" if split == "all" else split
        if len(of) <= CLASSES:
            typer.echo(f"  {title:<13}" + ", ".join(f"{name} {n:,}" for name, n in of.items()))
        else:
            typer.echo(f"  {title:<13}{min(of.values()):,} to {max(of.values()):,} a class, of {len(of):,} classes")
    for title, amounts in (("formats", found.formats), ("modes", found.modes)):
        if amounts:
            typer.echo(f"  {title:<13}" + ", ".join(f"{name} {n:,}" for name, n in amounts.items()))
    for title, span in (("height", found.height), ("width", found.width), ("width/height", found.aspect)):
        if span:
            typer.echo(f"  {title:<13}{span[0]:,g} to {span[2]:,g}, median {span[1]:,g}")
    for title, numbers in (("mean", found.mean), ("std", found.std), ("PCA values", found.eigenvalues)):
        if numbers:
            typer.echo(f"  {title:<13}" + " ".join(f"{x:.4f}" for x in numbers))
    for i, row in enumerate(found.eigenvectors):
        typer.echo(f"  {'' if i else 'PCA vectors':<13}" + " ".join(f"{x:7.4f}" for x in row))
    from reslearn.data.doctor.diagnosis import KINDS

    show_findings(found.findings, KINDS)
    if found.clean:
        typer.echo("nothing wrong")
