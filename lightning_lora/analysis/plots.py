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
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_lora.analysis.adapters import evenly, place
from lightning_lora.analysis.comparison import AdapterComparison, KindSimilarity, LayerComparison, kind_names
from lightning_lora.analysis.components import Component
from lightning_lora.analysis.summary import AdapterAnalysis, LayerAnalysis, metric_of
from lightning_lora.ranks.history import History

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
_FEWEST, _LONGEST = 8, 36  # characters of a name beside a picture
_PANEL, _ALONE = 148, 270  # points that the title of a panel may be wide
INK = "#1c2127"
_UNKNOWN = "#9aa0a6"
_MOST_NUMBERS = 320  # with more cells, the table is easier to read
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
    panels = []
    for name, phi in phis.items():
        rows, columns = ([str(1 + at) for at in range(size)] for size in phi.shape)
        panels.append(_Panel(name, phi, rows, columns))
    return _panels(panels, labels, "$\\phi(i, j)$")


def plot_blocks(similarities: Sequence[KindSimilarity], side: Side = "inputs") -> Any:
    """Return what the updates of each kind of layer share between blocks: 0 is chance, 1 the same directions.

    Raises:
        ValueError: ``similarities`` is empty.
    """
    panels = []
    for name, each in zip(kind_names(similarities), similarities, strict=True):
        numbers = [block.rpartition(".")[2] for block in each.blocks]
        panels.append(_Panel(name, getattr(each, side), numbers, numbers))
    return _panels(panels, ("block", "block"), "shared, above chance")


class _Panel(NamedTuple):
    """One of several heat maps: its title, its cells, and the names of its rows and columns."""

    title: str
    table: Tensor
    rows: Sequence[str]
    columns: Sequence[str]


def _panels(panels: Sequence[_Panel], labels: tuple[str, str], scale: str) -> Any:
    if not panels:
        raise ValueError("There is nothing to draw.")
    columns = min(_ACROSS, len(panels))
    rows = math.ceil(len(panels) / columns)
    is_alone = len(panels) == 1
    width, height = (5.2, 4.4) if is_alone else (2.3 * columns + 0.9, 2.2 * rows + 0.2)
    size, label_size, room = (10, 9, _ALONE) if is_alone else (8, 8, _PANEL)
    titles = _fitted([panel.title for panel in panels], room, size)
    with new_figure(width, height, rows, columns) as (figure, grid):
        for at, (axes, title, panel) in enumerate(zip(grid.flat, titles, panels, strict=False)):
            image = _heat_map(axes, panel.table, lowest=0.0, highest=1.0)
            _name_ticks(axes.yaxis, panel.rows, most=9)
            _name_ticks(axes.xaxis, panel.columns, most=9)
            axes.set_title(title, fontsize=size)
            if at + columns >= len(panels):
                axes.set_xlabel(labels[1], fontsize=label_size)
            if at % columns == 0:
                axes.set_ylabel(labels[0], fontsize=label_size)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        _scale(figure, image, grid, label=scale)
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
    with _curves(layers, _held, beyond=1.0) as (figure, axes):
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
    layers: Sequence[LayerAnalysis], of: Callable[[LayerAnalysis], Sequence[float]], beyond: float = math.nan
) -> Iterator[tuple[Any, Any]]:
    """Give a figure with a curve for each layer, or with their ranges, and its axes.

    ``beyond`` is the value of a curve that is shorter than others, after its end.
    """
    is_few = len(layers) <= _MOST_NAMES
    names = shortened([layer.name for layer in layers], _LONGEST) if is_few else []
    with new_figure(5.3 + 0.06 * max(map(len, names), default=0), 3.8) as (figure, panels):
        axes = panels[0, 0]
        if not is_few:
            _draw_ranges(axes, [of(layer) for layer in layers], beyond)
        for name, layer in zip(names, layers, strict=False):
            values = of(layer)
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
        if is_few and layers:
            axes.legend(fontsize=7, handlelength=3.5, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(True, alpha=0.25)
        yield figure, axes


def _draw_ranges(axes: Any, curves: Sequence[Sequence[float]], beyond: float) -> None:
    table = pad_sequence([torch.tensor(curve, dtype=torch.float64) for curve in curves], padding_value=beyond)
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
    row_names = shortened([row or _OUTSIDE for row in rows], _LONGEST)
    column_names = shortened(columns, _LONGEST)
    across, down = min(max(3, len(columns)), _WIDEST), min(max(5, len(rows)), _TALLEST)
    known = table[~table.isnan()]
    lowest = min(0.0, float(known.min())) if len(known) else 0.0
    # A slanted name is half as high as it is long.
    width = 1.2 + 0.075 * max(map(len, row_names)) + 0.42 * across
    height = 0.8 + 0.04 * max(map(len, column_names)) + 0.18 * down
    with new_figure(max(width, _width(name, 10) / 72 + 0.3), height) as (figure, panels):
        axes = panels[0, 0]
        figure.suptitle(name, fontsize=10)
        image = _heat_map(axes, table, lowest=lowest, highest=highest)
        _scale(figure, image, axes)
        _name_ticks(axes.yaxis, row_names, most=_TALLEST)
        _name_ticks(axes.xaxis, column_names, most=_WIDEST)
        for label in axes.get_xticklabels():  # slanted, so that they do not overlap
            label.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
        if len(columns) <= _WIDEST and len(rows) <= _TALLEST and table.numel() <= _MOST_NUMBERS:
            _write_numbers(axes, image, table, decimals)
    return figure


# --- ranks over time


def plot_ranks(history: History, most: int = 40) -> Any:
    """Return how a rank schedule has changed the rank of each layer: a row for each layer, a column for each decision.

    Args:
        history: The decisions, from ``AdapterAnalysis.ranks``.
        most: Layers to draw at most, evenly spaced.
    """
    layers = evenly(list(history.ranks.items()), most)
    table = torch.tensor([ranks for _, ranks in layers], dtype=torch.float64)
    names = shortened([name for name, _ in layers], _LONGEST)
    across, down = min(max(6, len(history.steps)), 2 * _WIDEST), max(5, len(layers))
    width = 1.3 + 0.075 * max(map(len, names)) + 0.3 * across
    with new_figure(width, 0.8 + 0.19 * down) as (figure, panels):
        axes = panels[0, 0]
        figure.suptitle("rank in use", fontsize=10)
        image = _heat_map(axes, table, lowest=0.0, highest=float(table.max()))
        _scale(figure, image, axes)
        _name_ticks(axes.yaxis, names, most=most)
        _name_ticks(axes.xaxis, [f"{step:,}" for step in history.steps], most=6)
        axes.set_xlabel("after step")
        if table.numel() <= _MOST_NUMBERS:
            _write_numbers(axes, image, table, decimals=0)
    return figure


# --- what components read


def plot_loadings(analysis: AdapterAnalysis, most: int = 8) -> Any:
    """Return how the leading components of convolutions lie in their kernels: a row for each layer.

    Zero is white, and gray where three channels are drawn as colors. Each picture has its own scale.

    Args:
        analysis: Of the adapter.
        most: Layers to draw at most, evenly spaced.

    Raises:
        ValueError: No layer has a kernel.
    """
    layers = evenly(with_pictures(analysis), most)
    if not layers:
        raise ValueError("There is nothing to draw: no update has a kernel of several positions.")
    names = shortened([layer.name for layer in layers], _LONGEST)
    columns = max(len(layer.components) for layer in layers)
    widest = max(_width(name, 8) for name in names) / 72
    with new_figure(widest + 0.3 + 1.05 * columns, 0.2 + 1.2 * len(layers), len(layers), columns) as (figure, grid):
        for row, name, layer in zip(grid, names, layers, strict=True):
            row[0].set_ylabel(name, fontsize=8, rotation=0, horizontalalignment="right", verticalalignment="center")
            for axes in row[len(layer.components) :]:
                axes.set_axis_off()
            for axes, component in zip(row, layer.components, strict=False):
                _draw_loadings(axes, component)
        for axes in grid.flat:
            axes.set(xticks=(), yticks=())
    return figure


def with_pictures(analysis: AdapterAnalysis) -> list[LayerAnalysis]:
    """Return the layers that ``plot_loadings`` can draw."""
    return [layer for layer in analysis.layers if any(each.picture is not None for each in layer.components)]


def _draw_loadings(axes: Any, component: Component) -> None:
    assert component.picture is not None
    picture = component.picture / component.picture.abs().max()
    aspect = "auto" if 1 in picture.shape[:2] else "equal"
    if picture.ndim == 3:
        axes.imshow((0.5 + picture / 2).numpy(), aspect=aspect, interpolation="nearest")
    else:
        axes.imshow(picture.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect=aspect, interpolation="nearest")
    axes.set_title("" if math.isnan(component.share) else f"{component.share:.0%}", fontsize=8)


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
        axes.tick_params(which="both", colors=INK, labelsize=8)


def _heat_map(axes: Any, table: Tensor, *, lowest: float | None = None, highest: float | None = None) -> Any:
    """Draw a table as colors, with unknown cells in gray, and return the image."""
    import matplotlib

    colors = matplotlib.colormaps["viridis"].with_extremes(bad=_UNKNOWN)
    cells = table.detach().cpu().double().numpy()
    return axes.imshow(cells, cmap=colors, vmin=lowest, vmax=highest, aspect="auto", interpolation="nearest")


def _scale(figure: Any, image: Any, axes: Any, **options: Any) -> None:
    """Draw the scale of the colors beside the axes, equally thin in low and high figures."""
    figure.colorbar(image, ax=axes, pad=0.02, aspect=max(20, 7 * figure.get_figheight()), **options)


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
                # Inside of the axes, so the layout need not ask each for its size.
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink, in_layout=False)


def _short(value: float) -> str:
    if 100 <= abs(value) < 10_000:
        return f"{value:.0f}"
    return f"{value:.3g}" if 0.001 <= abs(value) < 100 or not value else f"{value:.0e}"


# --- names


def _fitted(names: Sequence[str], room: float, size: float) -> list[str]:
    """Return names as ``shortened`` does, so that none is wider than ``room`` points at this font size."""
    short = list(names)
    while (widest := max(_width(name, size) for name in short)) > room:
        longest = max(map(len, short))
        most = min(longest - 1, int(longest * room / widest) + 1)
        if most < _FEWEST:
            break
        short = shortened(names, most)
    return short


def _width(text: str, size: float) -> float:
    """Return the width in points of a text at a font size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), ismath=False)[0])


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Return names of at most ``most`` characters, with parts of their middle left out, that still differ.

    What all names begin with is left out if nothing else tells them apart.
    """
    parts = zip(*(name.split(".") for name in names), strict=False)
    shared = "".join(f"{each[0]}." for each in takewhile(lambda each: len(set(each)) == 1, parts))
    rests = ["…" + name.removeprefix(shared) for name in names]
    tries = ([_cut(name, most, head) for name in each] for each in (names, rests) for head in (1 / 3, 0, 2 / 3))
    return max(tries, key=lambda each: len(set(each)))


def _cut(name: str, most: int, head: float) -> str:
    """Return the first and the last parts of a name, whole ones where they fit; ``head`` is the share of the first."""
    if len(name) <= most:
        return name
    room = most - 1
    last = name[len(name) - room + int(head * room) :]
    last = last[last.find(".") + 1 :]
    first = name[: room - len(last)]
    return f"{first.rpartition('.')[0] or first}…{last}"


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
