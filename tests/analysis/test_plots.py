from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.analysis import AdapterAnalysis, analyze, subspace_similarity
from lightning_lora.analysis.plots import plot_layers, plot_similarity, plot_spectra
from tests.contract import train_all


def analysis(blocks: int, rng: torch.Generator) -> AdapterAnalysis:
    model = nn.ModuleDict(
        {
            "h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 16), "up": nn.Linear(16, 24)}) for _ in range(blocks)),
            "neck": nn.Linear(24, 16),
        }
    )
    attach(model, LoRAConfig(rank=3))
    train_all(model, rng)
    return analyze(model)


def drawn(figure: object) -> int:
    pytest.importorskip("matplotlib")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_phi_is_drawn_as_it_is_with_what_is_unknown_left_out(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    phi = subspace_similarity(torch.randn(8, 30, generator=rng), torch.randn(40, 64, generator=rng)[:, :30])
    figure = plot_similarity(phi, title="r=8 and r=40", labels=("i (r=8)", "j (r=40)"))
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (8, 30)
    assert image.get_clim() == (0, 1)
    assert figure.axes[0].get_title() == "r=8 and r=40"
    assert drawn(figure) > 5000


@pytest.mark.parametrize("blocks", [2, 12])
def test_spectra_have_a_line_each_or_ranges_of_many(blocks: int, rng: torch.Generator):
    pytest.importorskip("matplotlib")
    figure = plot_spectra(analysis(blocks, rng))
    assert len(figure.axes[0].lines) == (5 if blocks == 2 else 1)
    assert len(figure.axes[0].collections) == (0 if blocks == 2 else 2)
    assert drawn(figure) > 5000


def test_layers_are_placed_by_block_and_kind(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    found = analysis(2, rng)
    figure = plot_layers(found, "effective_rank")
    table = figure.axes[0].images[0].get_array()
    assert table.shape == (3, 3)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["h.0", "h.1", ""]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["q", "up", "neck"]
    assert table[1, 0] == pytest.approx(found.layers[2].effective_rank)
    assert table.mask.sum() == 4
    assert drawn(figure) > 5000


def test_an_unknown_metric_is_refused(rng: torch.Generator):
    with pytest.raises(ValueError, match="effective_rank"):
        plot_layers(analysis(1, rng), "beauty")


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-lora\[plots\]'"):
        plot_similarity(torch.ones(2, 2))
