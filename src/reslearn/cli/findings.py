"""What an examination found, kind by kind, as doctor prints it of images and of sets with boxes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import typer

SHOWN = 5  # findings of a kind that are printed; --json has all


def show_findings(findings: Sequence[Any], kinds: Mapping[str, Any]) -> None:
    """Faults, then notes. findings: doctor's or box_doctor's; kinds: what is said of each kind."""
    _list("found", [finding for finding in findings if finding.fault], kinds)
    _list("notes, which count for nothing", [finding for finding in findings if not finding.fault], kinds)


def _list(title: str, findings: Sequence[Any], kinds: Mapping[str, Any]) -> None:
    by_kind: dict[str, list[Any]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    if by_kind:
        typer.echo(f"{title}:")
    for kind, some in by_kind.items():
        row = kinds[kind]
        typer.echo(f"  {kind}, {len(some):,}: {row.what}" + (f" (--fix: {row.mended})" if row.mended else ""))
        for finding in some[:SHOWN]:
            index = getattr(finding, "index", None)  # of an object, in sets with boxes; a tuple's own method in others
            place = f" object {index}" if isinstance(index, int) else ""
            typer.echo(f"    {_short(finding.names)}{place}" + (f": {finding.detail}" if finding.detail else ""))
        if len(some) > SHOWN:
            typer.echo(f"    and {len(some) - SHOWN:,} more, which --json names")


def _short(names: tuple[str, ...]) -> str:
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")
