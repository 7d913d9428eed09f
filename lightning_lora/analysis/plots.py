"""Draw what ``analyze`` and ``compare`` found; requires matplotlib, the optional extra ``plots``.

Each function returns one figure; nothing is shown or saved, and without ``pyplot`` nothing global changes. A scale of
one hue means "more"; unknown values are gray. The ink is one unique color, which a page replaces by that of its text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_lora.analysis.adapters import place
from lightning_lora.analysis.comparison import AdapterComparison, KindSimilarity, LayerComparison
from lightning_lora.analysis.summary import AdapterAnalysis, LayerAnalysis, metric_of

Metric = Literal["effective_rank", "stable_rank", "suggested_rank", "norm", "ratio", "amplification", "alignment"]
Likeness = Literal["cosine", "inputs", "outputs"]
Side = Literal["inputs", "outputs"]

_TITLES: dict[str, str] = {
    "effective_rank": "effective rank of the update",
    "stable_rank": "stable rank of the update",
    "suggested_rank": "suggested rank",
    "norm": "norm of the update",
    "ratio": "norm of the update over the weight's",
    "amplification": "amplification factor",
    "alignment": "alignment with the weight (1 = chance)",
}
_LIKENESSES: dict[str, tuple[str, Callable[[LayerComparison], float]]] = {
    "cosine": ("cosine between the updates", lambda layer: layer.cosine),
    "inputs": ("shared input directions, above chance", lambda layer: layer.of_inputs.above_chance),
    "outputs": ("shared output directions, above chance", lambda layer: layer.of_outputs.above_chance),
}
_MOST_NAMES = 12  # lines that a legend can tell apart
_ACROSS = 4
_OUTSIDE = "no block"
_WIDEST, _TALLEST = 24, 80  # cells; with more, such as many experts, each becomes thinner
INK = "#1c2127"
_UNKNOWN = "#9aa0a6"
_MOST_NUMBERS = 160  # with more cells, numbers do not fit into them
# Of medium lightness, to be visible on white, on black and in gray print.
HUES = ("#3b7dd8", "#dd6b35", "#2a9d6f", "#a565c9", "#b98a12", "#d1495b")
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "legend.labelcolor", "text.color"), INK),
    **{"axes.labelsize": 9, "axes.linewidth": 0.6, "axes.titlesize": 10, "figure.dpi": 130, "legend.frameon": False},
    # Dashes tell lines apart when the colors repeat.
    "axes.prop_cycle": f"cycler('linestyle', ['-', '--', ':']) * cycler('color', {list(HUES)})",
}


# --- subspace similarity


def plot_similarity(phi: Tensor, *, title: str = "", labels: tuple[str, str] = ("i", "j")) -> Any:
    """Return a heat map of ``phi(i, j)``, as in figures 3 and 4 of the LoRA paper; see ``plot_similarities``."""
    return plot_similarities({title or "subspace similarity": phi}, labels=labels)


def plot_similarities(phis: Mapping[str, Tensor], *, labels: tuple[str, str] = ("i", "j")) -> Any:
    """Return several heat maps of ``phi(i, j)`` on one scale, for example one for each layer.

    Args:
        phis: What is compared -> ``(r1, r2)`` from ``subspace_similarity`` or ``update_similarity``.
        labels: Names of the rows and the columns.

    Raises:
        ValueError: ``phis`` is empty.
    """
    return _tables(phis, labels, "$\\phi(i, j)$", first=1)


def plot_blocks(similarities: Sequence[KindSimilarity], side: Side = "inputs") -> Any:
    """Return what the updates of each kind of layer share between blocks: 0 is chance, 1 the same directions.

    Raises:
        ValueError: ``similarities`` is empty.
    """
    tables = {each.kind: getattr(each, side) for each in similarities}
    return _tables(tables, ("block", "block"), "shared, above chance", first=0)


def _tables(tables: Mapping[str, Tensor], labels: tuple[str, str], scale: str, *, first: int) -> Any:
    if not tables:
        raise ValueError("There is nothing to draw.")
    columns = min(_ACROSS, len(tables))
    rows = math.ceil(len(tables) / columns)
    is_alone = len(tables) == 1
    size = (5.2, 4.4) if is_alone else (2.3 * columns + 0.9, 2.2 * rows + 0.2)
    with new_figure(*size, rows, columns) as (figure, panels):
        for at, (axes, (name, table)) in enumerate(zip(panels.flat, tables.items(), strict=False)):
            image = _heat_map(axes, table, lowest=0.0, highest=1.0)
            for axis, count in zip((axes.yaxis, axes.xaxis), table.shape, strict=True):
                _name_ticks(axis, [str(first + cell) for cell in range(count)], most=9 if first else 8)
            axes.set_title(name, fontsize=10 if is_alone else 8)
            if at + columns >= len(tables):
                axes.set_xlabel(labels[1], fontsize=9 if is_alone else 8)
            if at % columns == 0:
                axes.set_ylabel(labels[0], fontsize=9 if is_alone else 8)
        for axes in panels.flat[len(tables) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=panels, pad=0.02, label=scale)
    return figure


# --- singular values


def plot_spectra(analysis: AdapterAnalysis) -> Any:
    """Return the singular values of every update by index, on a logarithmic scale.

    Up to a dozen updates get a line and a name each; more are shown as median, middle half and range.
    """
    layers = [layer for layer in analysis.layers if layer.numerical_rank]
    with _curves(layers, lambda layer: layer.singular_values[: layer.numerical_rank]) as (figure, axes):
        axes.set_title(f"spectra of {len(layers)} update{'s' * (len(layers) != 1)}")
        axes.set(yscale="log", xlabel="index of the singular value", ylabel="singular value of the update")
    return figure


def plot_energy(analysis: AdapterAnalysis) -> Any:
    """Return the share of an update's squared norm in its leading directions, by their number.

    The suggested rank is where a curve crosses the dotted line. Lines are drawn as in ``plot_spectra``.
    """
    layers = [layer for layer in analysis.layers if layer.numerical_rank]
    with _curves(layers, _held) as (figure, axes):
        axes.axhline(analysis.energy, color=INK, linewidth=0.9, linestyle=":")
        axes.set_title(f"energy of {len(layers)} update{'s' * (len(layers) != 1)}; dotted: {analysis.energy:.0%}")
        axes.set(ylim=(None, 1.0 + 0.02), xlabel="leading directions", ylabel="share of the squared norm")
    return figure


def _held(layer: LayerAnalysis) -> Sequence[float]:
    squares = torch.tensor(layer.singular_values, dtype=torch.float64).square()
    held: list[float] = (squares.cumsum(0) / squares.sum()).tolist()
    return held


@contextmanager
def _curves(
    layers: Sequence[LayerAnalysis], of: Callable[[LayerAnalysis], Sequence[float]]
) -> Iterator[tuple[Any, Any]]:
    """Give a figure with a curve for each layer, or with their ranges, and its axes."""
    is_few = len(layers) <= _MOST_NAMES
    with new_figure(6.4 if is_few else 5.3, 3.8) as (figure, panels):
        axes = panels[0, 0]
        if not is_few:
            _draw_ranges(axes, [of(layer) for layer in layers])
        for layer in layers if is_few else ():
            values = of(layer)
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=layer.name)
        if is_few and layers:
            axes.legend(fontsize=7, handlelength=3.5, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, alpha=0.25)
        yield figure, axes


def _draw_ranges(axes: Any, curves: Sequence[Sequence[float]]) -> None:
    table = pad_sequence([torch.tensor(curve, dtype=torch.float64) for curve in curves], padding_value=math.nan)
    shares = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    lowest, lower, middle, upper, highest = table.nanquantile(shares, dim=1).tolist()
    index = range(1, len(table) + 1)
    axes.fill_between(index, lowest, highest, color=HUES[0], alpha=0.2, linewidth=0, label="all")
    axes.fill_between(index, lower, upper, color=HUES[0], alpha=0.4, linewidth=0, label="middle half")
    axes.plot(index, middle, color=HUES[1], marker="o", markersize=3, label="median")
    axes.legend(fontsize=8)


# --- layer by layer


def plot_layers(analysis: AdapterAnalysis, metric: Metric = "effective_rank") -> Any:
    """Return a heat map of one metric: a row for each block, a column for each kind of layer.

    Raises:
        ValueError: The metric does not exist.
    """
    if metric not in _TITLES:
        raise ValueError(f"metric={metric!r} must be one of {', '.join(_TITLES)}.")
    # Ranks are shown on a scale up to the full rank, so that small differences look small.
    highest = max((layer.rank for layer in analysis.layers), default=1) if metric.endswith("rank") else None
    return _by_place({layer.name: metric_of(layer, metric) for layer in analysis.layers}, _TITLES[metric], highest)


def plot_comparison(comparison: AdapterComparison, of: Likeness = "cosine") -> Any:
    """Return a heat map of what two adapters share: a row for each block, a column for each kind of layer.

    ``of`` is the cosine between the updates, or the share of input or output directions above chance.

    Raises:
        ValueError: ``of`` is something else.
    """
    if of not in _LIKENESSES:
        raise ValueError(f"of={of!r} must be one of {', '.join(_LIKENESSES)}.")
    name, number = _LIKENESSES[of]
    return _by_place({layer.name: number(layer) for layer in comparison.layers}, name, 1.0, decimals=2)


def _by_place(
    numbers: Mapping[str, float], name: str, highest: float | None = None, *, decimals: int | None = None
) -> Any:
    places = {layer: place(layer) for layer in numbers}
    rows, columns = (list(dict.fromkeys(each[at] for each in places.values())) for at in (0, 1))
    table = torch.full((len(rows), len(columns)), math.nan, dtype=torch.float64)
    for layer, value in numbers.items():
        row, column = places[layer]
        table[rows.index(row), columns.index(column)] = value
    names = [row or _OUTSIDE for row in rows]
    across, down = min(max(3, len(columns)), _WIDEST), min(max(5, len(rows)), _TALLEST)
    known = table[~table.isnan()]
    lowest = min(0.0, float(known.min())) if len(known) else 0.0
    with new_figure(1.2 + 0.075 * max(map(len, names)) + 0.42 * across, 1.4 + 0.18 * down) as (figure, panels):
        axes = panels[0, 0]
        axes.set_title(name)
        image = _heat_map(axes, table, lowest=lowest, highest=highest)
        figure.colorbar(image, ax=axes, pad=0.02)
        _name_ticks(axes.yaxis, names, most=_TALLEST // 2)
        _name_ticks(axes.xaxis, columns, most=_WIDEST)
        for label in axes.get_xticklabels():  # slanted, so that they do not overlap
            label.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
        if len(columns) <= _WIDEST and table.numel() <= _MOST_NUMBERS * 2:
            _write_numbers(axes, image, table, decimals)
    return figure


# --- figures


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """Give a figure of this size in inches and a ``(rows, columns)`` array of its axes, to draw in the pages' style.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'lightning-lora[plots]'. Tables do not.") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)
    for axes in figure.axes:  # ticks are made when they are drawn, without the style
        axes.tick_params(colors=INK, labelsize=8)


def _heat_map(axes: Any, table: Tensor, *, lowest: float | None = None, highest: float | None = None) -> Any:
    """Draw a table as colors, with unknown cells in gray, and return the image."""
    import matplotlib

    colors = matplotlib.colormaps["viridis"].with_extremes(bad=_UNKNOWN)
    cells = table.detach().cpu().double().numpy()
    return axes.imshow(cells, cmap=colors, vmin=lowest, vmax=highest, aspect="auto", interpolation="nearest")


def _name_ticks(axis: Any, names: Sequence[str], *, most: int) -> None:
    """Name the cells of an axis, at most so many of them, evenly spaced."""
    step = max(1, math.ceil(len(names) / most))
    axis.set_ticks(range(0, len(names), step), names[::step])


def _write_numbers(axes: Any, image: Any, table: Tensor, decimals: int | None = None) -> None:
    """Write its number into each known cell, in an ink that stands out from the cell's color."""
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            value = float(table[row, column])
            if not math.isnan(value):
                ink = "white" if float(image.norm(value)) < 0.6 else "black"
                text = _short(value) if decimals is None else f"{round(value, decimals) + 0.0:.{decimals}f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def as_svg(figure: Any, name: str) -> str:
    """Return a figure as SVG for a page: text stays text, and the ink takes the color of the page's text.

    The ids of its parts begin with ``name``, which must be unique on the page.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return svg.replace(INK, "currentColor")
