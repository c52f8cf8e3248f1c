"""HTML pages as tests read them."""

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Collects text, tags and attributes, and insists that what is opened is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def assert_stands_alone(page: Page) -> None:
    assert page.count("script") == page.count("link") == page.count("iframe") == 0
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        for key in ("src", "href", "xlink:href", "srcset", "poster", "data", "action"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import", page.source)
    assert {match for match in re.findall(r"https?://[^\s\"'<]+", page.source) if "www.w3.org" not in match} == set()
