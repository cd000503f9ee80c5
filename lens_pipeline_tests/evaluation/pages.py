"""A report as a browser reads it."""

from html.parser import HTMLParser
from pathlib import Path


class Elements(HTMLParser):
    """Which elements a page opens, what they load and link to, and its pieces of text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page.read_text())

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if (tag, name) == ("a", "href")]
        loading = {"src"} if tag == "a" else {"src", "href"}
        self.sources += [value or "" for name, value in attrs if name in loading]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
