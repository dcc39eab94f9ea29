"""Pages as a browser reads them."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path


class Tags(HTMLParser):
    """Start tags with their attributes, and the text between tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []  # of each text, the tag that began right before it
        self.innermost = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.innermost = tag

    def handle_data(self, data):
        self.text.append(data)
        self.inside.append(self.innermost)

    def handle_endtag(self, tag):
        self.innermost = ""

    def of(self, tag: str) -> list[str]:
        """The texts of all elements with this tag, which hold nothing but text."""
        return [text for inside, text in zip(self.inside, self.text, strict=True) if inside == tag]

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def embedded_png(image: dict[str, str | None]) -> bytes:
    start = "data:image/png;base64,"
    source = image["src"]
    assert source is not None
    assert source.startswith(start)
    return base64.b64decode(source.removeprefix(start), validate=True)


def assert_stands_alone(path: Path) -> None:
    """Nothing on the page is loaded from anywhere."""
    read = Tags(path)
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "poster"):
                assert str(value).startswith("data:"), (tag, name, value)
    assert not re.search(r"url\(|@import", path.read_text())
