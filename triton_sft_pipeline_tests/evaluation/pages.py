"""Reading an HTML page in a test: its tags, attributes and text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}
LOADING = {"script", "link", "img", "iframe", "object", "embed", "image", "use", "foreignobject", "base", "form"}


class Page(HTMLParser):
    """The tags, attributes and visible text of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._pieces: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = "".join(self._pieces)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self._pieces.append(data)

    @property
    def words(self) -> str:
        """The visible text with a space between elements, and no other white space than single spaces."""
        return " ".join(" ".join(self._pieces).split())

    def values(self, name: str) -> list[str]:
        """All values of an attribute."""
        return [value or "" for key, value in self.attributes if key == name]


def assert_self_contained(html: str) -> None:
    """The page runs no script and fetches nothing: its links lead to places on itself, which exist."""
    page = Page(html)
    assert not LOADING & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "srcset", "action") or name.startswith("on")]
    links = [value for name, value in page.attributes if name.endswith("href")]
    assert {link.removeprefix("#") for link in links} <= set(page.values("id"))
    assert all(link.startswith("#") for link in links)
    assert not [value for name, value in page.attributes if name == "style" and "url" in (value or "")]
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert style and not re.search(r"url\(|@import|https?:|</", style)
