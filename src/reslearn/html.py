"""HTML for notebooks: what `_repr_html_` methods return."""

from collections.abc import Iterable, Sequence
from html import escape


class Raw(str):
    """Text that is HTML already."""


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = (), title: str = "") -> str:
    """A table, with everything but Raw cells escaped."""
    parts = [f"<p><b>{escape(title)}</b></p>" if title else "", "<table>"]
    if head:
        parts.append("<tr>" + "".join(f"<th>{escape(name)}</th>" for name in head) + "</tr>")
    for row in rows:
        cells = (cell if isinstance(cell, Raw) else escape(str(cell)) for cell in row)
        parts.append("<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>")
    return "".join([*parts, "</table>"])
