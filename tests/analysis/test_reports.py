from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.analysis import analyze, compare, layer_similarity
from lightning_lora.analysis.reports import NO_PLOTS, analysis_page, comparison_page, layers_page, likeness
from tests.analysis.test_page import Outline
from tests.contract import train_all


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


def test_the_page_of_an_adapter_has_all_numbers_and_figures():
    figures = pytest.importorskip("lightning_lora.analysis.report_figures")
    model = adapted(0)
    analysis, alike = analyze(model), layer_similarity(model)
    drawn = figures.analysis_figures(analysis, alike)
    found = Outline(analysis_page(analysis, "mine", similarities=alike, figures=drawn).html())
    assert len(found.named("svg")) == len(drawn) == 9
    assert all(len(svg["aria-label"] or "") > 40 for svg in found.named("svg"))
    words = set(found.words)
    for row in analysis.rows():
        assert set(row) <= words | {""}
    assert NO_PLOTS not in words


def test_parts_of_figures_do_not_get_mixed_up_and_their_ink_is_the_pages():
    figures = pytest.importorskip("lightning_lora.analysis.report_figures")
    comparison = compare(adapted(0), adapted(1, rank=2))
    drawn = figures.comparison_figures(comparison)
    html = comparison_page(comparison, ("one", "other"), figures=drawn).html()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', html)
    assert used
    assert {one or other for one, other in used} <= set(ids)
    assert "currentColor" in html
    assert "i (first)" in html  # text is text, for searching and for screen readers
    assert 'href="data:image/png' in html
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)  # nothing is fetched


def test_without_matplotlib_pages_have_words_and_tables():
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


def test_an_untrained_adapter_has_a_page_too():
    figures = pytest.importorskip("lightning_lora.analysis.report_figures")
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(2))})
    attach(model, LoRAConfig(rank=2))
    analysis, alike = analyze(model), layer_similarity(model)
    page = analysis_page(analysis, "new", similarities=alike, figures=figures.analysis_figures(analysis, alike))
    found = Outline(page.html())
    assert "Every update is zero: this adapter was never trained, or learned nothing." in found.words
    comparison = compare(model, model)
    html = comparison_page(comparison, ("new", "new"), figures=figures.comparison_figures(comparison)).html()
    assert "nothing to compare" in html


def test_many_layers_are_shown_in_even_steps():
    figures = pytest.importorskip("lightning_lora.analysis.report_figures")
    assert figures.evenly(list(range(30)), 4) == [0, 10, 19, 29]
    assert figures.evenly([1, 2], 4) == [1, 2]


def test_likeness_is_put_into_words():
    one, other = adapted(0), adapted(1)
    comparison = compare(one, other)
    said = likeness(comparison)
    middle = sorted(layer.of_inputs.all for layer in comparison.layers)[2]
    assert f"all directions {middle:.3f}" in said[0]
    cosines = {layer.name: layer.cosine for layer in comparison.layers}
    assert f"most alike is {max(cosines, key=lambda name: cosines[name])} (" in said[2]
    untrained = nn.ModuleDict({"neck": nn.Linear(24, 16)})
    attach(untrained, LoRAConfig(rank=2))
    assert "nothing to compare" in likeness(compare(untrained, one))[0]
    assert json.dumps(comparison.to_dict())
