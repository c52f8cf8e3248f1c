"""The elements of a page: sections of tiles, tables, figures and pictures. `elements.html.j2` has a macro for each.

Strings are plain text, which the templates escape; Markup is inserted unescaped. An element whose first field is empty is omitted.
"""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

LONG = 60  # rows; longer tables scroll


class Cell(NamedTuple):
    """A table cell. note: a second, smaller line. color: index of a page color, shown as a swatch before the text.

    bar: percent, shown as a bar instead of the text. kind: CSS classes; "n" for numbers.
    """

    text: str = "–"
    note: str = ""
    color: int | None = None
    bar: float | None = None
    kind: str = "n"


class Picture(NamedTuple):
    """A picture from a run folder as a data URI, and its width in pixels."""

    uri: str
    width: int


class Shot(NamedTuple):
    """A picture in a gallery with its caption. picture: None if the file is missing."""

    picture: Picture | None
    title: str
    lines: list[str]
    name: str


class Tiles(NamedTuple):
    """Headline numbers: (name, value, note)."""

    tiles: Sequence[tuple[str, str, str]]


class Table(NamedTuple):
    """A row that starts with a string has it as its heading. differs: headings of the rows to mark."""

    rows: Sequence[Sequence[str | Cell]]
    head: Sequence[str | Cell] = ()
    kind: str = ""
    differs: frozenset[str] = frozenset()


class Figure(NamedTuple):
    """A plot (an SVG element). legend: (index of a page color, "dash" or "bold"; text)."""

    plot: str
    caption: str = ""
    legend: Sequence[tuple[int | str, str]] = ()
    narrow: bool = False


class Gallery(NamedTuple):
    """Pictures side by side, each with its caption."""

    shots: Sequence[Shot]
    title: str = ""
    wide: bool = False


class Sheet(NamedTuple):
    """One wide picture. kind: "sheet" for images, enlarged if small; "shot" for a plot in its original size."""

    picture: Picture | None
    caption: str
    kind: str = "sheet"


class Confusion(NamedTuple):
    """A confusion matrix; rows are true classes."""

    rows: Sequence[Sequence[int]]
    names: Sequence[str]


class Bullets(NamedTuple):
    """A list of sentences."""

    sentences: Sequence[str]


class Columns(NamedTuple):
    """Non-empty sections side by side."""

    sections: Sequence["PageSection"]


Element = Tiles | Table | Figure | Gallery | Sheet | Confusion | Bullets | Columns


class PageSection(NamedTuple):
    """A heading, an introduction, elements and a closing note. Omitted from the page if all elements are empty."""

    title: str
    elements: Sequence[Element]
    intro: str = ""
    after: str = ""

    @property
    def shown(self) -> list[Element]:
        """The non-empty elements."""
        return [element for element in self.elements if element[0]]


def picture(folder: Path, name: str) -> Picture | None:
    """Reads a picture from the folder; None if it is missing, outside the folder, or neither PNG nor JPEG."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    # Small images (32 x 32) are enlarged with visible pixels, so the page needs their width.
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        kind, width = "png", int.from_bytes(content[16:20], "big")
    elif content.startswith(b"\xff\xd8\xff"):
        kind, width = "jpeg", 1000
    else:
        return None
    return Picture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", width)


def render(template: str, **values: Any) -> str:
    """Renders a template of this folder; every string is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)
