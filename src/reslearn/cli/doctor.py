"""doctor: check a data set before training."""

import json
from pathlib import Path
from typing import Annotated

import typer

from reslearn.cli.findings import show
from reslearn.cli.options import Json


def doctor(
    data: Annotated[str, typer.Argument(help="Data set name, folder, packed folder or list, as for train.")],
    fix: Annotated[Path | None, typer.Option("--fix", help="Write the usable images to a new list (.csv) or folder.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Input size to fit anchors at (sets with boxes), px, such as 600 or 600,1000.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a data set before training.

    Reads every image once. Reports damaged files, duplicates, leaks between splits, problems with labels, names and boxes, and how
    well anchors fit.

    Exit code: 0 without faults (notes do not count), 1 with faults, 2 if the data cannot be examined.

    \b
    Examples:
      reslearn doctor photos
      reslearn doctor photos --fix clean.csv
      reslearn doctor photos --fix photos-clean --json
      reslearn doctor voc --size 480 --fix voc-clean
    """
    from reslearn.data.doctor import check_fix, examine, repair
    from reslearn.data.doctor.boxes import parse_size
    from reslearn.training.display import Display

    anchor_size = parse_size(size)
    if fix is not None:
        check_fix(data, fix)
    with Display(stderr=True) as display:
        diagnosis = examine(data, display.progress, anchor_size)
    if as_json:
        typer.echo(json.dumps(diagnosis.as_json()))
    else:
        show(diagnosis)
    if fix is not None:
        with Display(stderr=True) as display:
            written = repair(diagnosis, data, fix, display.progress)
        typer.echo(f"wrote {fix}: {written}", err=as_json)
    if not diagnosis.clean:
        raise typer.Exit(1)
