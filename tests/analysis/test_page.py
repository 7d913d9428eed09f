from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from lightning_lora.analysis.page import Page

SVG = '<svg width="300pt" height="200pt" viewBox="0 0 300 200"><text>phi</text></svg>'


class Outline(HTMLParser):
    """What a page is made of; it fails on tags that are left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page() -> Page:
    page = Page("A <title> & more", "of <b>")
    page.heading("One")
    page.text("a < b")
    page.points(["x", "y & z"])
    page.code("LoRACallback(rank=2)")
    page.table([("layer", "rank"), ("h.0.<q>", "<4>")], "What <they> have")
    page.figures([(SVG, "A picture of <phi>", "Caption & words")])
    return page


def test_everything_is_written_and_nothing_of_it_is_code(tmp_path: Path):
    page().write(tmp_path / "page.html")
    found = Outline((tmp_path / "page.html").read_text(encoding="utf-8"))
    for words in (
        "A <title> & more",
        "of <b>",
        "a < b",
        "y & z",
        "h.0.<q>",
        "<4>",
        "What <they> have",
        "Caption & words",
    ):
        assert words in found.words
    assert not found.named("b")


def test_it_needs_no_other_file_and_no_network():
    html = page().html()
    found = Outline(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in found.tags}
    assert "http" not in html.replace("http://www.w3.org", "")  # names of namespaces are no addresses
    assert "@import" not in html
    assert "url(" not in html


def test_it_can_be_read_by_whoever_does_not_see_it():
    found = Outline(page().html())
    assert found.named("html") == [{"lang": "en"}]
    assert [(svg["role"], svg["aria-label"]) for svg in found.named("svg")] == [("img", "A picture of <phi>")]
    assert {attrs.get("scope") for attrs in found.named("th")} == {"col", "row"}
    assert found.named("caption")
    assert len(found.named("h1")) == len(found.named("main")) == 1


def test_it_has_a_dress_for_the_dark_and_for_paper():
    html = page().html()
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert '<figure style="width: min(100%, 300pt)">' in html
