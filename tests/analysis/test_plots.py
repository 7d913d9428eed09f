from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, attach
from lightning_lora.analysis import AdapterAnalysis, analyze, compare, layer_similarity
from lightning_lora.analysis.plots import (
    INK,
    plot_blocks,
    plot_comparison,
    plot_energy,
    plot_layers,
    plot_loadings,
    plot_ranks,
    plot_similarities,
    plot_similarity,
    plot_spectra,
    shortened,
)
from lightning_lora.analysis.reports import analysis_page, comparison_page
from lightning_lora.analysis.spectrum import subspace_similarity
from lightning_lora.ranks.history import History
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


def convolutions(count: int) -> nn.Module:
    """A model of convolutions with long names, and of other layers."""
    model = nn.ModuleDict({"patches": nn.Conv2d(3, 8, 4), "neck": nn.Linear(8, 8), "time": nn.Conv1d(4, 4, 7)})
    model["a_tower_of_many_convolutions"] = nn.ModuleList(nn.Conv2d(8, 8, 3) for _ in range(count))
    attach(model, LoRAConfig(rank=3, target_modules="all"))
    train_all(model, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("count", [2, 30])
def test_loadings_have_a_row_of_pictures_for_each_layer_with_a_kernel_or_for_some(count: int):
    pytest.importorskip("matplotlib")
    found = analyze(convolutions(count))
    figure = plot_loadings(found)
    rows = [figure.axes[at : at + 3] for at in range(0, len(figure.axes), 3)]
    assert len(rows) == min(8, count + 2)
    names = [row[0].get_ylabel() for row in rows]
    assert names[0] == "patches"
    assert ("time" in names) == (count == 2)
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 36
    by_name = {layer.name: layer for layer in found.layers}
    for axes, component in zip(rows[0], by_name["patches"].components, strict=True):
        colors = torch.from_numpy(axes.images[0].get_array().copy())
        assert colors.shape == (4, 4, 3)
        assert component.picture is not None
        torch.testing.assert_close(2 * colors - 1, component.picture / component.picture.abs().max())
        assert axes.get_title() == f"{component.share:.0%}"
    assert rows[1][0].images[0].get_array().shape == ((1, 7) if count == 2 else (3, 3))
    assert rows[1][0].images[0].get_clim() == (-1, 1)
    assert figure.get_figheight() < 12
    assert drawn(figure) > 5000


def test_loadings_without_a_kernel_are_not_drawn(rng: torch.Generator):
    with pytest.raises(ValueError, match="no update has a kernel of several positions"):
        plot_loadings(analysis(1, rng))


def test_unknown_metric_raises(rng: torch.Generator):
    with pytest.raises(ValueError, match="effective_rank"):
        plot_layers(analysis(1, rng), "beauty")


def test_missing_matplotlib_raises_with_install_hint(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-lora\[plots\]'"):
        plot_similarity(torch.ones(2, 2))


# --- labels


def long_names(blocks: int, kinds: int, rng: torch.Generator) -> nn.Module:
    """A model whose layers have names of more than fifty letters."""
    model = nn.ModuleDict()
    layers = {f"self_attention_projection_{kind}": nn.Linear(12, 12) for kind in range(kinds)}
    model["transformer_language_model"] = nn.ModuleDict(
        {"decoder_layers": nn.ModuleList(nn.ModuleDict(deepcopy(layers)) for _ in range(blocks))}
    )
    attach(model, LoRAConfig(rank=4))
    train_all(model, rng)
    return model


def one_layer(rng: torch.Generator) -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(16, 8)})
    attach(model, LoRAConfig(rank=2))
    train_all(model, rng)
    return model


def drawn_texts(figure: Any) -> dict[Any, Any]:
    """Draw a figure, and return its texts with their outlines; a slanted text turns about its anchor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.path import Path
    from matplotlib.text import Text
    from matplotlib.transforms import Affine2D

    def record(text: Any, renderer: Any) -> None:
        drawn.append(text)
        draw(text, renderer)

    drawn: list[Any] = []
    draw, renderer = Text.draw, FigureCanvasAgg(figure).get_renderer()
    with patch.object(Text, "draw", record):
        figure.draw(renderer)
    outlines = {}
    for text in drawn:
        if text.get_visible() and text.get_text().strip():
            angle = text.get_rotation() if text.get_rotation_mode() == "anchor" else 0
            if angle:
                text.set_rotation(0)
            corners = text.get_window_extent(renderer).corners()[[0, 1, 3, 2, 0]]
            anchor = text.get_transform().transform(text.get_position())
            outlines[text] = Path(Affine2D().rotate_deg_around(*anchor, angle).transform(corners))
    return outlines


def check_labels(figure: Any) -> None:
    """Every text lies inside of the figure, and on no other one."""
    outlines = drawn_texts(figure)
    assert outlines
    edge = figure.bbox.padded(0.5)  # pixels: rounding
    extents = {text: outline.get_extents() for text, outline in outlines.items()}
    for text, extent in extents.items():
        assert edge.contains(*extent.min), f"{text} leaves the figure"
        assert edge.contains(*extent.max), f"{text} leaves the figure"
    in_order = sorted(outlines, key=lambda text: extents[text].x0)
    for at, one in enumerate(in_order):
        for other in in_order[at + 1 :]:
            if extents[other].x0 > extents[one].x1:
                break  # so do all after it
            if extents[one].overlaps(extents[other]):
                assert not outlines[one].intersects_path(outlines[other]), f"{one} lies on {other}"


def pictures(one: nn.Module, other: nn.Module) -> dict[str, Any]:
    """Every picture of the pages of two adapters."""
    with patch("lightning_lora.analysis.reports.as_svg", return_value=""):  # drawing them twice takes twice as long
        pages = (
            analysis_page(analyze(one), "one", similarities=layer_similarity(one)),
            comparison_page(compare(one, other), ("one", "other")),
        )
    return {name: figure for page in pages for name, figure in page.pictures.items()}


def experts(rng: torch.Generator) -> nn.Module:
    model = nn.ModuleDict({"experts": nn.Module()})
    model["experts"].register_parameter("up", nn.Parameter(torch.randn(30, 6, 5, generator=rng)))
    attach(model, LoRAConfig(rank=1, target_modules=[], target_parameters=["experts.up"]))
    train_all(model, rng)
    return model


def wide_and_narrow(rng: torch.Generator) -> nn.Module:
    """Stages of two widths, with ranks of their own, DoRA and slices."""
    stages = [
        nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "fc1": nn.Linear(width, width)})
        for width in (16, 16, 32, 32)
    ]
    model = nn.ModuleDict({"stages": nn.ModuleList(stages)})
    slices = {"qkv": {"query_projection": "0:16", "value_projection": "32:48"}}
    attach(model, LoRAConfig(rank=3, use_dora=True, rank_pattern={"fc1": 2}, target_slices=slices))
    train_all(model, rng)
    return model


@pytest.mark.parametrize(
    "build",
    [
        partial(long_names, 32, 4),
        one_layer,
        experts,
        wide_and_narrow,
    ],
    ids=["32 blocks", "one layer", "experts", "stages"],
)
def test_no_label_lies_on_another_or_leaves_the_figure(build: Callable[..., nn.Module], rng: torch.Generator):
    pytest.importorskip("matplotlib")
    for name, figure in pictures(build(rng), build(rng)).items():
        check_labels(figure)
        assert max(figure.get_size_inches()) < 20, name


def test_more_blocks_than_lines_of_text(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    found = analyze(long_names(85, 1, rng))
    check_labels(plot_layers(found, "norm"))
    check_labels(plot_spectra(replace(found, layers=found.layers[:12])))


def test_shortened_names_still_differ():
    names = [f"encoder.language_model.layers.{block}.self_attention.{kind}" for block in range(30) for kind in "qkv"]
    for most in (12, 20, 30, 40):
        short = shortened(names, most)
        assert len(set(short)) == len(names)
        assert max(map(len, short)) <= most
    assert shortened(names, 36)[0] == "encoder…0.self_attention.q"
    assert shortened(["h.0.q", "neck"], 5) == ["h.0.q", "neck"]
    assert shortened(["a_single_name_without_any_dot"], 12)[0].count("…") == 1


def test_no_number_is_cut_in_two():
    """``layers.7`` must not stand for ``layers.17``."""
    for most in range(8, 60):
        for short in shortened([f"encoder.language_model.layers.{block}.attention.q" for block in (17, 23)], most):
            assert not {"7", "3"} & set(re.split(r"[.…]", short)), short


def test_titles_fit_whatever_their_letters():
    pytest.importorskip("matplotlib")
    phi = torch.eye(3)
    check_labels(plot_similarities({letter * 60 + str(at): phi for at, letter in enumerate("WmilmWWW")}))
    check_labels(plot_similarity(phi, title="W" * 90))


def test_kinds_of_several_widths_have_a_panel_each(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    alike = layer_similarity(wide_and_narrow(rng))
    assert [each.kind for each in alike].count("fc1") == 2
    titles = [axes.get_title() for axes in plot_blocks(alike).axes if axes.images and axes.get_title()]
    assert len(set(titles)) == len(alike)
    assert {"fc1, from stages.0", "fc1, from stages.2"} <= set(titles)


def test_blocks_are_named_by_their_numbers(rng: torch.Generator):
    pytest.importorskip("matplotlib")
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 8)}) for _ in range(12))})
    attach(model, LoRAConfig(rank=2, target_modules=["h.3.q", "h.7.q", "h.11.q"]))
    train_all(model, rng)
    panel = plot_blocks(layer_similarity(model)).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["3", "7", "11"]


def test_energy_of_a_lower_rank_stays_whole(rng: torch.Generator):
    """An update of rank 1 holds everything in two directions, too."""
    pytest.importorskip("matplotlib")
    model = nn.ModuleDict({f"layer{at}": nn.Linear(16, 16) for at in range(20)})
    attach(model, LoRAConfig(rank=4, rank_pattern={f"layer{at}": 1 for at in range(15)}))
    train_all(model, rng)
    median = plot_energy(analyze(model)).axes[0].lines[0]
    assert list(median.get_ydata()) == pytest.approx([1, 1, 1, 1])


def test_every_label_takes_the_ink_of_the_page(rng: torch.Generator):
    """A label in another color would vanish on a dark page."""
    to_hex = pytest.importorskip("matplotlib.colors").to_hex
    for name, figure in pictures(adapted(2, rng), adapted(2, rng)).items():
        cells = {text for axes in figure.axes if axes.images for text in axes.texts}
        for text in drawn_texts(figure):
            assert text in cells or to_hex(text.get_color()) == INK, f"{text} in {name}"


def test_ranks_over_time_are_a_row_for_each_layer_and_a_column_for_each_decision() -> None:
    pytest.importorskip("matplotlib")
    ranks = {f"blocks.{block}.attention.{'projection_' * 5}{block}": [8, 6, block % 3] for block in range(100)}
    figure = plot_ranks(History([0, 1200, 2400], [10, 8, 5], ranks))
    axes = figure.axes[0]
    cells = axes.images[0].get_array()
    assert cells.shape == (40, 3)
    assert (cells[:, :2] == [8, 6]).all()
    assert set(cells[:, 2].tolist()) <= {0, 1, 2}
    assert axes.images[0].get_clim() == (0, 8)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "1,200", "2,400"]
    assert drawn(figure)
