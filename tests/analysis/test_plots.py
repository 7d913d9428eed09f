from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.analysis import AdapterAnalysis, analyze, compare, layer_similarity
from lightning_lora.analysis.plots import (
    plot_blocks,
    plot_comparison,
    plot_energy,
    plot_layers,
    plot_similarities,
    plot_similarity,
    plot_spectra,
)
from lightning_lora.analysis.spectrum import subspace_similarity
from tests.contract import train_all


def analysis(blocks: int, rng: torch.Generator) -> AdapterAnalysis:
    return analyze(adapted(blocks, rng))


def adapted(blocks: int, rng: torch.Generator) -> nn.Module:
    model = nn.ModuleDict(
        {
            "h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 16), "up": nn.Linear(16, 24)}) for _ in range(blocks)),
            "neck": nn.Linear(24, 16),
        }
    )
    attach(model, LoRAConfig(rank=3))
    train_all(model, rng)
    return model


def drawn(figure: object) -> int:
    pytest.importorskip("matplotlib")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return len(file.getvalue())


def test_similarity_heat_map(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    phi = subspace_similarity(torch.randn(8, 30, generator=rng), torch.randn(40, 64, generator=rng)[:, :30])
    figure = plot_similarity(phi, title="r=8 and r=40", labels=("i (r=8)", "j (r=40)"))
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (8, 30)
    assert image.get_clim() == (0, 1)
    assert figure.axes[0].get_title() == "r=8 and r=40"
    assert drawn(figure) > 5000


@pytest.mark.parametrize("blocks", [2, 12])
def test_spectra_lines_or_ranges(blocks: int, rng: torch.Generator):
    pytest.importorskip("matplotlib")
    figure = plot_spectra(analysis(blocks, rng))
    assert len(figure.axes[0].lines) == (5 if blocks == 2 else 1)
    assert len(figure.axes[0].collections) == (0 if blocks == 2 else 2)
    assert drawn(figure) > 5000


def test_layers_by_block_and_kind(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    found = analysis(2, rng)
    figure = plot_layers(found, "effective_rank")
    table = figure.axes[0].images[0].get_array()
    assert table.shape == (3, 3)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["h.0", "h.1", "no block"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["q", "up", "neck"]
    assert table[1, 0] == pytest.approx(found.layers[2].effective_rank)
    assert table.mask.sum() == 4
    assert drawn(figure) > 5000


def test_rank_scale_goes_to_full_rank(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    found = analysis(2, rng)
    assert plot_layers(found, "suggested_rank").axes[0].images[0].get_clim() == (0, 3)
    norms = [layer.norm for layer in found.layers]
    assert plot_layers(found, "norm").axes[0].images[0].get_clim() == (0, pytest.approx(max(norms)))


@pytest.mark.parametrize("blocks", [2, 12])
def test_energy_curve_and_threshold(blocks: int, rng: torch.Generator):
    pytest.importorskip("matplotlib")
    found = analysis(blocks, rng)
    curve, *others = plot_energy(found).axes[0].lines
    assert [float(y) for y in others[-1].get_ydata()] == [found.energy] * 2
    values = list(curve.get_ydata())
    assert values == sorted(values)
    assert values[-1] == pytest.approx(1)
    if blocks == 2:
        squares = torch.tensor(found.layers[0].singular_values).square()
        assert values[0] == pytest.approx(float(squares[0] / squares.sum()), rel=1e-5)


def test_comparison_by_block_and_kind(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    found = compare(adapted(2, rng), adapted(2, rng))
    for of, value in (("cosine", found.layers[2].cosine), ("inputs", None), ("outputs", None)):
        image = plot_comparison(found, of).axes[0].images[0]
        assert image.get_array().shape == (3, 3)
        assert image.get_clim()[1] == 1
        if value is not None:
            assert image.get_array()[1, 0] == pytest.approx(value)
    overlap = found.layers[2].of_inputs
    table = plot_comparison(found, "inputs").axes[0].images[0].get_array()
    assert table[1, 0] == pytest.approx((overlap.all - overlap.chance) / (1 - overlap.chance))
    with pytest.raises(ValueError, match="cosine, inputs, outputs"):
        plot_comparison(found, "beauty")


def test_blocks_have_one_panel_per_kind(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    figure = plot_blocks(layer_similarity(adapted(3, rng)))
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["q", "up"]
    assert {axes.images[0].get_clim() for axes in panels} == {(0, 1)}
    assert panels[0].images[0].get_array().shape == (3, 3)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_similarities({})


def test_many_experts_stay_narrow():
    pytest.importorskip("matplotlib")
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].register_parameter("up", nn.Parameter(torch.randn(200, 6, 5)))
    attach(model, LoRAConfig(rank=1, target_modules=[], target_parameters=["experts.up"]))
    figure = plot_layers(analyze(model), "stable_rank")
    assert figure.axes[0].images[0].get_array().shape == (1, 200)
    assert figure.get_figwidth() < 15
    assert len(figure.axes[0].get_xticklabels()) <= 24


def test_unknown_metric_raises(rng: torch.Generator):
    with pytest.raises(ValueError, match="effective_rank"):
        plot_layers(analysis(1, rng), "beauty")


def test_missing_matplotlib_raises_with_install_hint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-lora\[plots\]'"):
        plot_similarity(torch.ones(2, 2))
