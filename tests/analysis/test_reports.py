from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach, calibrate
from lightning_lora.analysis import analyze, compare, findings, layer_similarity
from lightning_lora.analysis.comparison import likeness
from lightning_lora.analysis.reports import (
    NO_PLOTS,
    Page,
    analysis_page,
    comparison_page,
    evenly,
    layers_page,
)
from tests.contract import train_all

# --- HTML


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


def test_page_replaces_a_file_only_if_asked(tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.html' exists already; nothing was written.*overwrite=True"):
        page().write(path)
    assert path.read_text(encoding="utf-8") == "mine"
    page().write(path, overwrite=True)
    assert path.read_text(encoding="utf-8") == page().html()
    assert list(tmp_path.iterdir()) == [path]


def test_page_escapes_everything(tmp_path: Path):
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


def test_page_is_self_contained():
    html = page().html()
    found = Outline(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in found.tags}
    assert "http" not in html.replace("http://www.w3.org", "")  # names of namespaces are no addresses
    assert "@import" not in html
    assert "url(" not in html


def test_page_is_accessible():
    found = Outline(page().html())
    assert found.named("html") == [{"lang": "en"}]
    assert [(svg["role"], svg["aria-label"]) for svg in found.named("svg")] == [("img", "A picture of <phi>")]
    assert {attrs.get("scope") for attrs in found.named("th")} == {"col", "row"}
    assert found.named("caption")
    assert len(found.named("h1")) == len(found.named("main")) == 1


def test_page_styles_dark_mode_and_print():
    html = page().html()
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert '<figure style="width: min(100%, 300pt)">' in html


# --- pages


def adapted(seed: int, blocks: int = 2, rank: int = 3) -> nn.Module:
    model = nn.ModuleDict(
        {
            "h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 16), "up": nn.Linear(16, 24)}) for _ in range(blocks)),
            "neck": nn.Linear(24, 16),
        }
    )
    attach(model, LoRAConfig(rank=rank))
    train_all(model, torch.Generator().manual_seed(seed))
    return model


def test_adapter_page_has_all_numbers_and_figures():
    pytest.importorskip("matplotlib")
    model = adapted(0)
    analysis, alike = analyze(model), layer_similarity(model)
    page = analysis_page(analysis, "mine", similarities=alike)
    found = Outline(page.html())
    assert len(found.named("svg")) == len(page.pictures) == 9
    assert all(len(svg["aria-label"] or "") > 40 for svg in found.named("svg"))
    words = set(found.words)
    for row in analysis.rows():
        assert set(row) <= words | {""}
    assert NO_PLOTS not in words


def test_figure_ids_are_unique_and_ink_follows_page():
    pytest.importorskip("matplotlib")
    comparison = compare(adapted(0), adapted(1, rank=2))
    html = comparison_page(comparison, ("one", "other")).html()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert used
    assert {one or other for one, other in used} <= set(ids)
    assert "currentColor" in html
    assert "i (first)" in html  # text is text, for searching and for screen readers
    assert 'href="data:image/png' in html
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)  # nothing is fetched


def test_pages_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = adapted(0)
    for page in (
        analysis_page(analyze(model), "mine"),
        comparison_page(compare(model, adapted(1)), ("one", "other")),
        layers_page(layer_similarity(model), "mine"),
    ):
        found = Outline(page.html())
        assert NO_PLOTS in found.words
        assert found.named("table")
        assert not found.named("svg")


def test_pages_of_untrained_adapter():
    pytest.importorskip("matplotlib")
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(2))})
    attach(model, LoRAConfig(rank=2))
    analysis, alike = analyze(model), layer_similarity(model)
    page = analysis_page(analysis, "new", similarities=alike)
    found = Outline(page.html())
    assert "Every update is zero: this adapter was never trained, or learned nothing." in found.words
    comparison = compare(model, model)
    html = comparison_page(comparison, ("new", "new")).html()
    assert "nothing to compare" in html


def started(convolutions: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(convolutions)), nn.ConvTranspose2d(4, 4, 3))
    attach(model, LoRAConfig(rank=2, init="eva", target_modules="all"))
    calibrate(model, [torch.randn(4, 4, 6, 6) for _ in range(3)])
    return model


@pytest.mark.parametrize(("convolutions", "said"), [(2, "All updates"), (20, "12 of the 20 updates, evenly spaced")])
def test_a_page_shows_the_start_and_what_it_reads(convolutions: int, said: str):
    pytest.importorskip("matplotlib")
    analysis = analyze(started(convolutions))
    page = analysis_page(analysis, "started")
    assert "loadings" in page.pictures
    found = Outline(page.html())
    words = set(found.words)
    assert {"Where it started", "What it reads and writes"} <= words
    assert "Starts computed from 3 batches, 100 % of their tokens" in words
    assert f"{said}: the features that the leading directions read and write most" in words
    assert analysis.start is not None
    assert {cell for row in analysis.start.rows() for cell in row} <= words | {""}
    assert {cell for row in analysis.component_rows(12, leading=2) for cell in row} <= words | {""}
    assert any(word.startswith("random start: ") and "cannot be seen" in word for word in words)
    [caption] = {word for word in words if word.startswith("What the leading directions look for")}
    assert ("in 8 of 20 layers" in caption) == (convolutions == 20)
    assert not any("Suggested is" in word for word in words)


def test_many_layers_are_thinned_evenly():
    assert evenly(list(range(30)), 4) == [0, 10, 19, 29]
    assert evenly([1, 2], 4) == [1, 2]


def test_likeness_in_words():
    one, other = adapted(0), adapted(1)
    comparison = compare(one, other)
    said = likeness(comparison)
    middle = sorted(layer.of_inputs.all for layer in comparison.layers)[2]
    assert f"all of them by {middle:.3f}" in said[0]
    cosines = {layer.name: layer.cosine for layer in comparison.layers}
    assert f"{max(cosines, key=lambda name: cosines[name])} is most alike (" in said[2]
    untrained = nn.ModuleDict({"neck": nn.Linear(24, 16)})
    attach(untrained, LoRAConfig(rank=2))
    assert "nothing to compare" in likeness(compare(untrained, one))[0]
    assert json.dumps(comparison.to_dict())


def test_identical_adapters_are_called_the_same():
    one = adapted(0)
    assert likeness(compare(one, one)) == ["The two adapters are the same in all 5 layers, up to rounding."]
    head = head_only(0)
    assert likeness(compare(head, head)) == ["The two adapters are the same in head, up to rounding."]


def test_no_layer_is_most_alike_where_all_are_alike():
    """The same directions with other sizes are not the same adapter."""
    one, other = adapted(0), adapted(0)
    for name, parameter in other.named_parameters():
        if name.endswith("lora.B"):
            parameter.data.mul_(2)
    said = likeness(compare(one, other))
    assert said[-1] == "As vectors, the updates have a cosine of 1.00 in all 5 layers."


def head_only(seed: int) -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(16, 8)})
    attach(model, LoRAConfig(rank=2))
    train_all(model, torch.Generator().manual_seed(seed))
    return model


def test_one_layer_has_no_median():
    said = likeness(compare(head_only(0), head_only(1))) + findings(analyze(head_only(0)))
    for words in ("median", "1 layers", "1 updates", "the largest are", "most alike", "e+"):
        assert words not in " ".join(said), words
    assert said[0].endswith("(head).")
    assert "the update uses" in " ".join(said)


def test_long_names_break_on_narrow_pages_and_on_paper():
    html = page().html()
    screen, paper = html.split("@media print")
    assert re.search(r"^p, li \{[^}]*overflow-wrap: anywhere", screen, re.M)
    assert re.search(r"tbody th \{[^}]*overflow-wrap: anywhere", paper)
